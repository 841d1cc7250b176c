#include "stepper.h"

#include <ATen/core/grad_mode.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>

#include <cmath>

#include "../cpu/launch.h"
#include "overlap.h"

namespace adamw_ext {
namespace {

// About 100 microseconds of work: below that, handing the interpreter over costs more than it gives.
constexpr std::int64_t long_step_units = 4096;

double read_scalar(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.numel() == 1, name, " must have 1 element, but has ", describe(*tensor.unsafeGetTensorImpl()));
  return tensor.item().toDouble();
}

}  // namespace

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

Stepper::Checked::Checked(const at::Tensor& checked)
    : guard(checked.getIntrusivePtr()), tensor(checked.unsafeGetTensorImpl()) {}

void Stepper::Checked::look() {
  data = mutable_data(*tensor);
  storage_bytes = tensor->unsafe_storage().unsafeGetStorageImpl()->nbytes();
  keys = tensor->key_set();
  dtype = tensor->dtype();
}

bool Stepper::Checked::unchanged(const Layout& layout) const {
  return tensor->key_set() == keys && tensor->dtype() == dtype && tensor->unsafe_storage().unsafeGetStorageImpl()->nbytes() == storage_bytes &&
         mutable_data(*tensor) == data && layout.matches(*tensor);
}

Stepper::Stepper(const std::vector<Member>& members) : isa_(cpu::choose_isa()) {
  slots_.reserve(members.size());
  entries_.resize(members.size(), TensorEntry{});
  std::int32_t group_count = 0;
  for (const Member& member : members) {
    Slot slot;
    slot.param = Checked(member.param);
    if (member.step.defined()) {
      slot.step = Checked(member.step);
      slot.exp_avg = Checked(member.exp_avg);
      slot.exp_avg_sq = Checked(member.exp_avg_sq);
      if (member.max_exp_avg_sq.defined()) slot.max_exp_avg_sq = Checked(member.max_exp_avg_sq);
    }
    slot.group = member.group;
    slot.name = member.name;
    group_count = std::max(group_count, member.group + 1);
    slots_.push_back(std::move(slot));
    if (slots_.back().step) check(slots_.size() - 1);
  }
  first_key_.resize(group_count);
  scalars_.reserve(members.size());
  keys_.reserve(members.size());
  check_overlap();
}

// Everything a slot's tensors must be, whatever the gradient. On return the kernel may use their memory.
void Stepper::check(std::size_t index) {
  Slot& slot = slots_[index];
  const c10::TensorImpl& param = *slot.param.tensor;
  const auto dtype = storage_dtype(param.dtype().toScalarType());
  TORCH_CHECK(dtype && param.device().is_cpu() && param.layout() == c10::kStrided && param.has_storage(), slot.name,
              " must be a strided CPU tensor of a floating point or complex dtype, but has ", describe(param));
  check_within_storage(param, slot.name);
  slot.direct = is_dense(param);
  TORCH_CHECK(slot.direct || !may_overlap_itself(param), slot.name,
              " cannot be updated: more than one of its elements refers to a single memory location (strides ",
              param.strides(), " with sizes ", param.sizes(), "); clone() it before it becomes a parameter");
  TORCH_CHECK(!slot.param.tensor->is_inference() || c10::InferenceMode::is_enabled(), slot.name,
              " cannot be updated: Inplace update to inference tensor outside InferenceMode is not allowed");
  slot.param_layout = Layout::of(param);

  const c10::TensorImpl& step = *slot.step.tensor;
  TORCH_CHECK(is_plain_cpu(step) && step.numel() == 1 && step.dtype() == caffe2::TypeMeta::Make<float>(), "state 'step' of ",
              slot.name, " must be one torch.float32 on cpu, but has ", describe(step));
  check_within_storage(step, "state 'step' of " + slot.name);
  slot.layout = slot.direct ? slot.param_layout : Layout::of(*slot.exp_avg.tensor);
  check_state(slot, slot.exp_avg, "exp_avg");
  check_state(slot, slot.exp_avg_sq, "exp_avg_sq");
  if (slot.max_exp_avg_sq) check_state(slot, slot.max_exp_avg_sq, "max_exp_avg_sq");
  const auto moments = storage_dtype(slot.exp_avg.tensor->dtype().toScalarType());
  slot.combination = moments ? find_combination(*dtype, *moments) : -1;
  TORCH_CHECK(slot.combination >= 0, slot.name, " of dtype ", dtype_name(param.dtype().toScalarType()),
              " cannot have state of dtype ", dtype_name(slot.exp_avg.tensor->dtype().toScalarType()));

  TensorEntry& entry = entries_[index];
  for (Checked* checked : {&slot.param, &slot.step, &slot.exp_avg, &slot.exp_avg_sq, &slot.max_exp_avg_sq}) {
    if (*checked) checked->look();
  }
  entry.param = slot.param.data;
  entry.exp_avg = slot.exp_avg.data;
  entry.exp_avg_sq = slot.exp_avg_sq.data;
  entry.max_exp_avg_sq = slot.max_exp_avg_sq ? slot.max_exp_avg_sq.data : nullptr;
  entry.combination = static_cast<std::uint8_t>(slot.combination);
}

void Stepper::check_state(const Slot& slot, const Checked& state, const char* key) const {
  const c10::TensorImpl& tensor = *state.tensor;
  const c10::TensorImpl& param = *slot.param.tensor;
  const std::string name = std::string("state '") + key + "' of " + slot.name;
  TORCH_CHECK(is_plain_cpu(tensor), name, " must be a strided CPU tensor, but has ", describe(tensor));
  TORCH_CHECK(tensor.sizes() == param.sizes() && slot.layout.matches(tensor) && is_dense(tensor), name, " must have sizes ", param.sizes(), " and strides ",
              c10::IntArrayRef(slot.layout.strides), ", but has sizes ", tensor.sizes(), " and strides ",
              tensor.strides());
  const bool both_complex = c10::isComplexType(param.dtype().toScalarType()) ==
                            c10::isComplexType(tensor.dtype().toScalarType());
  TORCH_CHECK(tensor.dtype() == slot.exp_avg.tensor->dtype() && both_complex, name, " must have dtype ",
              dtype_name((both_complex ? slot.exp_avg : slot.param).tensor->dtype().toScalarType()), ", but has ",
              dtype_name(tensor.dtype().toScalarType()));
  check_within_storage(tensor, name);
}

void Stepper::check_overlap() const {
  std::vector<WrittenTensor> written;
  written.reserve(slots_.size() * 5);
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (!slot.step) continue;
    for (const Checked* checked : {&slot.param, &slot.step, &slot.exp_avg, &slot.exp_avg_sq, &slot.max_exp_avg_sq}) {
      if (*checked) written.push_back({checked->tensor, i});
    }
  }
  const Overlap overlap = find_overlap(written);
  TORCH_CHECK(!overlap.found, "a step cannot update two tensors that share memory: ", slots_[overlap.first_owner].name,
              " and ", slots_[overlap.second_owner].name, " (or their states) overlap");
}

bool Stepper::unchanged(const Slot& slot) const {
  static const Layout scalar;
  return slot.param.unchanged(slot.param_layout) && slot.exp_avg.unchanged(slot.layout) &&
         slot.exp_avg_sq.unchanged(slot.layout) && (!slot.max_exp_avg_sq || slot.max_exp_avg_sq.unchanged(slot.layout)) &&
         slot.step.unchanged(scalar);
}

Stepper::Ready Stepper::prepare(const StepInputs& inputs) {
  if (inputs.found_inf.defined() && read_scalar(inputs.found_inf, "found_inf") != 0.0) return Ready::skip;
  const double scale = inputs.grad_scale.defined() ? read_scalar(inputs.grad_scale, "grad_scale") : 1.0;
  TORCH_CHECK_VALUE(scale > 0.0 && std::isfinite(scale), "grad_scale must be positive and finite, but is ", scale);
  const bool write_back = scale != 1.0;
  unscale_ = 1.0 / scale;

  scalars_.clear();
  keys_.clear();
  staged_.clear();
  pinned_storages_.clear();
  pinned_tensors_.clear();
  std::fill(first_key_.begin(), first_key_.end(), -1);
  bool moved = false, resized = false;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    TensorEntry& entry = entries_[i];
    const at::Tensor& grad = grad_of(i, inputs.grads);
    std::int64_t numel = 0;
    entry.scalars = -1;
    if (grad.defined()) {
      if (!slot.step) return Ready::needs_state;
      if (!unchanged(slot)) {
        check(i);
        moved = true;
      }
      const GroupOptions& options = inputs.groups[slot.group];
      TORCH_CHECK(!options.amsgrad || slot.max_exp_avg_sq, "amsgrad=True needs state 'max_exp_avg_sq', which ",
                  slot.name, " does not have");
      entry.amsgrad = options.amsgrad;
      entry.grad = prepare_grad(slot, grad, write_back);
      entry.param = prepare_param(slot);
      entry.scalars = scalars_for(slot, options, options.maximize ? -unscale_ : unscale_);
      numel = slot.param.tensor->numel() * (c10::isComplexType(slot.param.dtype.toScalarType()) ? 2 : 1);
    }
    resized |= entry.numel != numel;
    entry.numel = numel;
  }
  if (moved) check_overlap();
  if (resized) unit_count_ = lay_out_units(entries_.data(), static_cast<std::int64_t>(entries_.size()));
  // Operators are called without the interpreter lock, so whatever their length other threads may run.
  if (is_long() || !inputs.grads.empty()) pin(inputs.grads);
  return Ready::run;
}

const at::Tensor& Stepper::grad_of(std::size_t index, at::TensorList grads) const {
  return grads.empty() ? slots_[index].param.tensor->grad() : grads[index];
}

void* Stepper::prepare_grad(const Slot& slot, const at::Tensor& grad, bool write_back) {
  const c10::TensorImpl& tensor = *grad.unsafeGetTensorImpl();
  const c10::TensorImpl& param = *slot.param.tensor;
  if (is_plain_cpu(tensor) && tensor.dtype() == param.dtype() && slot.layout.matches(tensor) &&
      run_within_storage(tensor)) {
    return write_back ? mutable_data(tensor) : const_cast<void*>(const_data(tensor));
  }
  TORCH_CHECK(tensor.layout() == c10::kStrided, "Adam does not support sparse gradients, please consider SparseAdam instead: the gradient of ", slot.name, " has ",
              describe(tensor));
  TORCH_CHECK(tensor.sizes() == param.sizes() && tensor.dtype() == param.dtype() && tensor.device() == param.device(),
              "the gradient of ", slot.name, " must have ", describe(param), ", but has ", describe(tensor));
  if (tensor.has_storage()) check_within_storage(tensor, "the gradient of " + slot.name);
  return stage(slot.layout, grad, write_back);
}

void* Stepper::prepare_param(const Slot& slot) {
  if (slot.direct) return slot.param.data;
  return stage(slot.layout, at::Tensor(slot.param.guard.lock()), true);
}

void* Stepper::stage(const Layout& layout, const at::Tensor& original, bool write_back) {
  const at::NoGradGuard no_grad;
  at::Tensor copy = at::empty_strided(layout.sizes, layout.strides, original.options());
  copy.copy_(original);
  staged_.push_back({original, copy, write_back});
  return mutable_data(*copy.unsafeGetTensorImpl());
}

std::int32_t Stepper::scalars_for(const Slot& slot, const GroupOptions& options, double grad_factor) {
  const double done = *static_cast<const float*>(slot.step.data);
  TORCH_CHECK(done >= 0.0 && done == std::floor(done) && done < 9007199254740992.0, "state 'step' of ", slot.name,
              " must be a whole number of updates, but is ", done);
  const auto step = static_cast<std::int64_t>(done) + 1;
  std::int32_t& first = first_key_[slot.group];
  for (std::int32_t key = first; key >= 0; key = keys_[key].next) {
    if (keys_[key].step == step) return key;
  }
  keys_.push_back({slot.group, first, step});
  scalars_.push_back(compute_scalars(options.hyper, step, grad_factor));
  return first = static_cast<std::int32_t>(keys_.size() - 1);
}

bool Stepper::is_long() const { return unit_count_ >= long_step_units; }

void Stepper::pin(at::TensorList grads) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (entries_[i].scalars < 0) continue;
    const at::Tensor& grad = grad_of(i, grads);
    if (grad.has_storage()) pinned_storages_.push_back(grad.storage());
    for (const Checked* checked : {&slot.param, &slot.step, &slot.exp_avg, &slot.exp_avg_sq, &slot.max_exp_avg_sq}) {
      if (!*checked) continue;
      pinned_storages_.push_back(checked->tensor->storage());
      pinned_tensors_.push_back(checked->guard.lock());
    }
  }
}

void Stepper::run() noexcept {
  const Table table{entries_.data(), static_cast<std::int64_t>(entries_.size()), scalars_.data(), unit_count_};
  cpu::launch(table, {isa_, at::get_num_threads(), units_per_chunk, unscale_});
}

void Stepper::finish() {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (entries_[i].scalars < 0) continue;
    *static_cast<float*>(slots_[i].step.data) += 1.0f;
    slots_[i].param.tensor->bump_version();
  }
  if (!staged_.empty()) {
    const at::NoGradGuard no_grad;
    for (const Staged& staged : staged_) {
      if (staged.write_back) staged.original.copy_(staged.copy);
    }
    staged_.clear();
  }
  pinned_storages_.clear();
  pinned_tensors_.clear();
}

}  // namespace adamw_ext
