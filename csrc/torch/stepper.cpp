#include "stepper.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/ne.h>

#include <algorithm>
#include <cmath>

namespace adamw_ext {
namespace {

// About 100 microseconds of work: below that, handing the interpreter over costs more than it gives.
constexpr std::int64_t long_step_units = 2048;

double read_scalar(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(holds_number(tensor), name, " must hold 1 element, but has ", describe(*tensor.unsafeGetTensorImpl()));
  return tensor.item().toDouble();
}

}  // namespace

Hyper read_on_host(const GroupOptions& options) {
  Hyper hyper = options.hyper;
  if (options.lr.defined()) hyper.lr = read_scalar(options.lr, "lr");
  if (options.beta1.defined()) hyper.beta1 = read_scalar(options.beta1, "beta1");
  if (options.beta2.defined()) hyper.beta2 = read_scalar(options.beta2, "beta2");
  return hyper;
}

void check_hyper(const Hyper& hyper, std::int64_t group) {
  const auto check = [&](bool usable, const char* what, double value) {
    TORCH_CHECK_VALUE(usable, "Invalid ", what, ": ", value, group < 0 ? "" : " in param group ",
                      group < 0 ? "" : std::to_string(group));
  };
  check(hyper.lr >= 0.0, "learning rate", hyper.lr);
  check(hyper.eps >= 0.0, "epsilon value", hyper.eps);
  check(hyper.beta1 >= 0.0 && hyper.beta1 < 1.0, "beta parameter at index 0", hyper.beta1);
  check(hyper.beta2 >= 0.0 && hyper.beta2 < 1.0, "beta parameter at index 1", hyper.beta2);
  check(hyper.weight_decay >= 0.0, "weight_decay value", hyper.weight_decay);
}

Stepper::Stepper(const std::vector<Member>& members) : tuning{cpu::choose_isa()} {
  slots_.reserve(members.size());
  std::int32_t group_count = 0;
  for (const Member& member : members) {
    Slot slot;
    slot.param.tensor = member.param.unsafeGetTensorImpl();
    const auto guard = [&](Checked& checked, const at::Tensor& tensor) {
      if (!tensor.defined()) return;
      checked.tensor = tensor.unsafeGetTensorImpl();
      guards_.emplace_back(tensor.getIntrusivePtr());
    };
    guard(slot.step, member.step);
    guard(slot.exp_avg, member.exp_avg);
    guard(slot.exp_avg_sq, member.exp_avg_sq);
    guard(slot.max_exp_avg_sq, member.max_exp_avg_sq);
    guard(slot.master, member.master);
    slot.group_master = member.group_master;
    slot.rounding = member.rounding;
    TORCH_CHECK(member.group >= 0, "the group of ", member.name, " must not be negative, but is ", member.group);
    slot.group = member.group;
    slot.bucket = &bucket_of(member);
    slot.position = static_cast<std::int32_t>(slot.bucket->entries.size());
    slot.bucket->entries.push_back({});
    slot.entry().element_number = member.element_number;
    if (member.places) slot.entry().places = &places_.emplace_back(*member.places);
    last_sum_ = std::max(last_sum_, member.sum);
    names_.push_back(member.name);
    group_count = std::max(group_count, member.group + 1);
    slots_.push_back(std::move(slot));
  }
  first_key_.resize(group_count);
  hypers_.resize(group_count);
  scalars_.reserve(members.size());
  keys_.reserve(members.size());
  for (Bucket& bucket : buckets_) {
    bucket.step_entries.reserve(bucket.entries.size());
    bucket.sources.resize(group_count);
  }
}

Stepper::Bucket& Stepper::bucket_of(const Member& member) {
  const c10::Device device = member.param.device();
  auto bucket = std::find_if(buckets_.begin(), buckets_.end(), [&](const Bucket& b) {
    return b.device == device && b.deferred == member.deferred && b.sum == member.sum;
  });
  if (bucket == buckets_.end()) {
    TORCH_CHECK(has_kernels(device.type()), member.name, " must be a strided CPU tensor in this build, but has ",
                describe(*member.param.unsafeGetTensorImpl()));
    buckets_.push_back({device, member.deferred, member.sum, make_executor(device)});
    bucket = std::prev(buckets_.end());
  }
  if (bucket->groups.empty() || bucket->groups.back() != member.group) bucket->groups.push_back(member.group);
  return *bucket;
}

Stepper::Ready Stepper::prepare(const StepInputs& inputs) {
  scalars_.clear();
  keys_.clear();
  staged_.clear();
  held_.clear();
  pinned_storages_.clear();
  pinned_tensors_.clear();
  std::fill(first_key_.begin(), first_key_.end(), -1);
  const bool capturing = begin_capture(inputs);
  for (Bucket& bucket : buckets_) begin_on_device(bucket, inputs);

  bool begun_on_host = false;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    Bucket& bucket = *slot.bucket;
    TensorEntry& entry = slot.entry();
    const at::Tensor& grad = grad_of(i, inputs.grads);
    std::int64_t numel = 0;
    entry.scalars = -1;
    if (grad.defined()) {
      if (!slot.step) return Ready::needs_state;
      TORCH_CHECK(!capturing || bucket.capturing, names_[i], " is on ", bucket.device,
                  ", which is not part of the graph that is being captured: replays would not update it");
      if (!bucket.deferred && !begun_on_host) {
        begun_on_host = true;
        if (begin_on_host(inputs)) return Ready::skip;
      }
      if (!unchanged(slot)) {
        check(i);
        moved_ = true;
      }
      const GroupOptions& options = inputs.groups[slot.group];
      TORCH_CHECK(!options.amsgrad || slot.max_exp_avg_sq, "amsgrad=True needs state 'max_exp_avg_sq', which ",
                  names_[i], " does not have");
      entry.amsgrad = options.amsgrad;
      entry.grad = prepare_grad(i, grad, bucket.writes_grads);
      if (!slot.direct) entry.param = stage(slot.layout, at::Tensor(TensorPtr::reclaim_copy(slot.param.tensor)), true);
      entry.scalars = scalars_for(i, options);
      if (bucket.deferred) bucket.step_entries.push_back({slot.steps_done, slot.group, entry.scalars});
      bucket.active = true;
      numel = slot.numel;
    }
    bucket.resized |= entry.numel != numel;
    entry.numel = numel;
  }
  if (moved_) check_overlap();
  moved_ = false;
  for (Bucket& bucket : buckets_) {
    if (!bucket.resized) continue;
    const Extent extent = lay_out(bucket.entries.data(), static_cast<std::int64_t>(bucket.entries.size()));
    bucket.unit_count = extent.units;
    bucket.piece_count = extent.pieces;
    bucket.resized = false;
  }
  begin_norm(inputs);
  for (Bucket& bucket : buckets_) {
    if (!bucket.active) continue;
    bucket.executor->reserve(std::max(bucket.entries.size(), scalars_.size()), clips_ ? bucket.piece_count : 0);
  }
  if (is_long() || inputs.is_shared || (clips_ && last_sum_ > 0)) pin(inputs.grads);
  return Ready::run;
}

// Whether a graph is being captured on any of the devices. Comes before all else: reading a number breaks a capture.
bool Stepper::begin_capture(const StepInputs& inputs) {
  bool capturing = false;
  for (Bucket& bucket : buckets_) {
    bucket.capturing = bucket.executor->is_capturing();
    capturing |= bucket.capturing;
    for (const std::int32_t group : bucket.groups) {
      TORCH_CHECK(!bucket.capturing || inputs.groups[group].capturable,
                  "Attempting CUDA graph capture of step() for an instance of AdamW but param_groups' capturable is "
                  "False.");
    }
  }
  return capturing;
}

// Reads the numbers that the host needs for the buckets it counts for, once it is known that one of their params has a
// gradient. True: the step is skipped.
bool Stepper::begin_on_host(const StepInputs& inputs) {
  if (inputs.found_inf.defined() && read_scalar(inputs.found_inf, "found_inf") != 0.0) {
    if (inputs.skips != nullptr) ++*inputs.skips->on(c10::kCPU).mutable_data_ptr<std::int64_t>();
    return true;
  }
  const double scale = inputs.grad_scale.defined() ? read_scalar(inputs.grad_scale, "grad_scale") : 1.0;
  TORCH_CHECK_VALUE(scale > 0.0 && std::isfinite(scale), "grad_scale must be positive and finite, but is ", scale);
  unscale_ = 1.0 / scale;
  for (Bucket& bucket : buckets_) {
    if (bucket.deferred) continue;
    bucket.writes_grads = unscale_ != 1.0;
    for (const std::int32_t group : bucket.groups) {
      hypers_[group] = read_on_host(inputs.groups[group]);
      check_hyper(hypers_[group], group);
    }
  }
  return false;
}

void Stepper::begin_on_device(Bucket& bucket, const StepInputs& inputs) {
  bucket.active = false;
  bucket.step_entries.clear();
  if (!bucket.deferred) return;
  bucket.writes_grads = inputs.grad_scale.defined();
  for (const std::int32_t group : bucket.groups) bucket.sources[group] = source_of(group, bucket, inputs);
  bucket.scaling = {scaling_number(inputs.grad_scale, "grad_scale", bucket, /*is_flag=*/false),
                    scaling_number(inputs.found_inf, "found_inf", bucket, /*is_flag=*/true)};
  const bool counts = inputs.found_inf.defined() && inputs.skips != nullptr;
  bucket.skipped = counts ? inputs.skips->on(bucket.device).mutable_data_ptr<std::int64_t>() : nullptr;
}

HyperSource Stepper::source_of(std::int32_t group, const Bucket& bucket, const StepInputs& inputs) const {
  const GroupOptions& options = inputs.groups[group];
  TORCH_CHECK(!bucket.capturing || options.host_tensor == nullptr, "param group ", group, ": ", options.host_tensor,
              " is a CPU tensor, whose value a captured graph would keep forever: give a tensor on ", bucket.device,
              ", or a float and sync_hyperparameters()");
  HyperSource source{options.hyper, nullptr, {}, {}, {}, options.maximize};
  const auto place = [&](const at::Tensor& tensor, const char* name, double& value, NumberPointer& pointer) {
    if (!tensor.defined()) return;
    const auto dtype = storage_dtype(tensor.scalar_type());
    TORCH_CHECK(holds_number(tensor), name, " must hold 1 element, but has ", describe(*tensor.unsafeGetTensorImpl()));
    if (tensor.device() == bucket.device && dtype && is_plain(*tensor.unsafeGetTensorImpl())) {
      pointer = {const_data(*tensor.unsafeGetTensorImpl()), *dtype};
      return;
    }
    TORCH_CHECK(!bucket.capturing, "param group ", group, ": ", name, " must be on ", bucket.device,
                " to be captured, but has ", describe(*tensor.unsafeGetTensorImpl()));
    value = tensor.item().toDouble();
  };
  place(options.lr, "lr", source.values.lr, source.lr);
  place(options.beta1, "beta1", source.values.beta1, source.beta1);
  place(options.beta2, "beta2", source.values.beta2, source.beta2);
  if (bucket.capturing && inputs.mirror != nullptr) {
    source.mirror = inputs.mirror->hold(bucket.device, group, source.values);
  }
  return source;
}

// Where the kernels of a bucket read one of a scaler's numbers. is_flag: only whether it is 0 counts.
const float* Stepper::scaling_number(const at::Tensor& tensor, const char* name, const Bucket& bucket, bool is_flag) {
  if (!tensor.defined()) return nullptr;
  TORCH_CHECK(holds_number(tensor), name, " must hold 1 element, but has ", describe(*tensor.unsafeGetTensorImpl()));
  const bool direct = is_plain(*tensor.unsafeGetTensorImpl()) && tensor.device() == bucket.device &&
                      tensor.scalar_type() == c10::kFloat;
  TORCH_CHECK(direct || !bucket.capturing, name, " must be a torch.float32 on ", bucket.device,
              " to be captured, but has ", describe(*tensor.unsafeGetTensorImpl()));
  if (!direct) {
    // A copy in any case: of a lazily negated number, or one without memory, none is made where device and dtype fit.
    held_.push_back(
        (is_flag ? tensor.ne(0) : tensor).to(bucket.device, c10::kFloat, /*non_blocking=*/false, /*copy=*/true));
    TORCH_CHECK(is_plain(*held_.back().unsafeGetTensorImpl()) && held_.back().numel() == 1, name,
                " must be a plain tensor, but has ", describe(*tensor.unsafeGetTensorImpl()));
  }
  return static_cast<const float*>(const_data(*(direct ? tensor : held_.back()).unsafeGetTensorImpl()));
}

const at::Tensor& Stepper::grad_of(std::size_t index, at::TensorList grads) const {
  return grads.empty() ? slots_[index].param.tensor->grad() : grads[index];
}

void* Stepper::prepare_grad(std::size_t index, const at::Tensor& grad, bool write_back) {
  const Slot& slot = slots_[index];
  const c10::TensorImpl& tensor = *grad.unsafeGetTensorImpl();
  if (tensor.dtype() != slot.grad_dtype) check_grad_dtype(index, tensor);
  if (is_plain(tensor) && tensor.device() == slot.bucket->device && slot.layout.matches(tensor) &&
      run_within_storage(tensor)) {
    return write_back ? mutable_data(tensor) : const_cast<void*>(const_data(tensor));
  }
  const c10::TensorImpl& param = *slot.param.tensor;
  const std::string& name = names_[index];
  TORCH_CHECK(tensor.layout() == c10::kStrided,
              "Adam does not support sparse gradients, please consider SparseAdam instead: the gradient of ", name,
              " has ", describe(tensor));
  TORCH_CHECK(has_sizes(tensor) && tensor.sizes() == param.sizes() && tensor.device() == param.device(),
              "the gradient of ", name, " must have ", describe(param), ", but has ", describe(tensor));
  if (tensor.has_storage()) check_within_storage(tensor, "the gradient of " + name);
  TORCH_CHECK(
      !write_back || !may_overlap_itself(tensor), "the gradient of ", name,
      " cannot be unscaled in place: more than one of its elements refers to a single memory location (strides ",
      tensor.strides(), " with sizes ", tensor.sizes(), ")");
  // A zero tensor has no memory to be unscaled in, and nothing to unscale.
  return stage(slot.layout, grad, write_back && !tensor.key_set().has(c10::DispatchKey::ZeroTensor));
}

// Where the entry's scalars are: those of its (group, step) pair, or, where the kernels count, its own.
std::int32_t Stepper::scalars_for(std::size_t index, const GroupOptions& options) {
  const Slot& slot = slots_[index];
  if (slot.bucket->deferred) {
    if (slot.bucket->device.is_cpu()) check_step(index);
    return slot.position;
  }
  const double done = *slot.steps_done;
  std::int32_t& first = first_key_[slot.group];
  constexpr int most = 256;  // then some scalars are there twice, rather than all keys read for each of many counts
  std::int32_t key = first;
  for (int looks = 0; key >= 0 && looks < most; key = keys_[key].next, ++looks) {
    if (keys_[key].steps_done == done) return key;
  }
  check_step(index);
  keys_.push_back({done, first});
  scalars_.push_back(
      compute_scalars(hypers_[slot.group], static_cast<std::int64_t>(done) + 1, unscale_, options.maximize));
  return first = static_cast<std::int32_t>(keys_.size() - 1);
}

void* Stepper::stage(const Layout& layout, const at::Tensor& original, bool write_back) {
  const at::NoGradGuard no_grad;
  at::Tensor copy = at::empty_strided(layout.sizes(), layout.strides(), original.options());
  check_has_memory(copy, "a step");
  copy.copy_(original);
  staged_.push_back({original, copy, write_back});
  return mutable_data(*copy.unsafeGetTensorImpl());
}

bool Stepper::is_long() const {
  return std::any_of(buckets_.begin(), buckets_.end(),
                     [](const Bucket& b) { return b.device.is_cpu() && b.unit_count >= long_step_units; });
}

void Stepper::pin(at::TensorList grads) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].entry().scalars < 0) continue;
    const at::Tensor& grad = grad_of(i, grads);
    if (grad.has_storage()) pinned_storages_.push_back(grad.storage());
    slots_[i].for_each([&](const Checked& checked) {
      pinned_storages_.push_back(checked.tensor->storage());
      pinned_tensors_.push_back(TensorPtr::reclaim_copy(checked.tensor));
    });
  }
}

// Finds memory for the norm of the gradients. The buckets' own sums are added up where there are several.
void Stepper::begin_norm(const StepInputs& inputs) {
  clips_ = inputs.norms != nullptr && std::any_of(inputs.groups.begin(), inputs.groups.end(), [](const auto& group) {
             return group.hyper.max_grad_norm != no_max_grad_norm;
           });
  const auto is_active = [](const Bucket& bucket) { return bucket.active; };
  const bool several = std::count_if(buckets_.begin(), buckets_.end(), is_active) > 1;
  int place = 0;
  for (Bucket& bucket : buckets_) {
    if (!clips_) continue;
    bucket.sum_of_squares = inputs.norms->on(bucket.device);
    const bool apart = several || bucket.sum != 0;
    bucket.own_sum_of_squares = apart ? inputs.norms->on(bucket.device, ++place) : bucket.sum_of_squares;
  }
}

Work Stepper::work_of(const Bucket& bucket) const {
  Work work{};
  work.table.entries = bucket.entries.data();
  work.table.entry_count = static_cast<std::int64_t>(bucket.entries.size());
  work.table.scalars = scalars_.data();
  work.table.scalars_count = static_cast<std::int64_t>(scalars_.size());
  work.table.unit_count = bucket.unit_count;
  work.table.piece_count = bucket.piece_count;
  work.unscale = bucket.deferred ? 1.0 : unscale_;
  work.writes_grads = bucket.writes_grads;
  if (clips_) work.steps.sum_of_squares = bucket.sum_of_squares.mutable_data_ptr<double>();
  if (bucket.deferred) {
    work.steps.entries = bucket.step_entries.data();
    work.steps.entry_count = static_cast<std::int64_t>(bucket.step_entries.size());
    work.steps.sources = bucket.sources.data();
    work.steps.scaling = bucket.scaling;
    work.steps.skipped = bucket.skipped;
  }
  return work;
}

void Stepper::measure(const CompleteSum& complete) {
  if (!clips_) return;
  const at::NoGradGuard no_grad;
  const auto add = [](at::Tensor& total, const at::Tensor& part) {
    total = total.defined() ? at::add(total, part.to(total.device())) : part;
  };
  at::Tensor total;
  for (std::int32_t sum = 0; sum <= last_sum_; ++sum) {
    at::Tensor part;
    for (Bucket& bucket : buckets_) {
      if (bucket.sum != sum || (sum == 0 && !bucket.active)) continue;
      if (bucket.active) {
        Work work = work_of(bucket);
        work.steps.sum_of_squares = bucket.own_sum_of_squares.mutable_data_ptr<double>();
        bucket.executor->measure(work, tuning);
      } else {
        bucket.own_sum_of_squares.zero_();  // the other processes wait for it
      }
      add(part, bucket.own_sum_of_squares);
    }
    if (part.defined()) add(total, sum == 0 ? part : complete(sum, part));
  }
  for (Bucket& bucket : buckets_) {
    if (!total.defined()) {
      bucket.sum_of_squares.zero_();
    } else if (!bucket.sum_of_squares.is_same(total)) {
      bucket.sum_of_squares.copy_(total);
    }
  }
}

void Stepper::run() {
  for (Bucket& bucket : buckets_) {
    if (bucket.active) bucket.executor->run(work_of(bucket), tuning);
  }
}

void Stepper::finish() {
  for (const Slot& slot : slots_) {
    if (slot.entry().scalars < 0) continue;
    if (!slot.bucket->deferred) *slot.steps_done += 1.0f;
    slot.param.tensor->bump_version();
  }
  if (!staged_.empty()) {
    const at::NoGradGuard no_grad;
    for (const Staged& staged : staged_) {
      if (staged.write_back) staged.original.copy_(staged.copy);
    }
    staged_.clear();
  }
  held_.clear();
  pinned_storages_.clear();
  pinned_tensors_.clear();
}

}  // namespace adamw_ext
