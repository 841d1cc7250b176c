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
constexpr std::int64_t long_step_units = 2048;

double read_scalar(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(holds_number(tensor), name, " must hold 1 element, but has ", describe(*tensor.unsafeGetTensorImpl()));
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

void Stepper::Checked::look() {
  storage = tensor->unsafe_storage().unsafeGetStorageImpl();
  base = storage->mutable_data();
  bytes = storage->nbytes();
  offset = tensor->storage_offset();
  keys = tensor->key_set();
  dtype = tensor->dtype();
}

bool Stepper::Checked::unchanged(const Layout& layout) const {
  return storage != nullptr && tensor->unsafe_storage().unsafeGetStorageImpl() == storage &&
         storage->mutable_data() == base && storage->nbytes() == bytes && tensor->storage_offset() == offset &&
         tensor->key_set() == keys && tensor->dtype() == dtype && layout.matches(*tensor);
}

Stepper::Stepper(const std::vector<Member>& members) : isa_(cpu::choose_isa()) {
  slots_.reserve(members.size());
  entries_.resize(members.size(), TensorEntry{});
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
    TORCH_CHECK(member.group >= 0, "the group of ", member.name, " must not be negative, but is ", member.group);
    slot.group = member.group;
    names_.push_back(member.name);
    group_count = std::max(group_count, member.group + 1);
    slots_.push_back(std::move(slot));
  }
  first_key_.resize(group_count);
  scalars_.reserve(members.size());
  keys_.reserve(members.size());
}

// Everything a slot's tensors must be, whatever the gradient. On return the kernel may use their memory.
void Stepper::check(std::size_t index) {
  Slot& slot = slots_[index];
  const std::string& name = names_[index];
  const c10::TensorImpl& param = *slot.param.tensor;
  const auto dtype = storage_dtype(param.dtype().toScalarType());
  TORCH_CHECK(dtype && param.device().is_cpu() && param.layout() == c10::kStrided && param.has_storage() &&
                  !param.key_set().has(c10::DispatchKey::ZeroTensor),
              name, " must be a strided CPU tensor of a floating point or complex dtype, but has ", describe(param));
  check_within_storage(param, name);
  slot.direct = is_dense(param);
  TORCH_CHECK(slot.direct || !may_overlap_itself(param), name,
              " cannot be updated: more than one of its elements refers to a single memory location (strides ",
              param.strides(), " with sizes ", param.sizes(), "); clone() it before it becomes a parameter");
  TORCH_CHECK(!slot.param.tensor->is_inference() || c10::InferenceMode::is_enabled(), name,
              " cannot be updated: Inplace update to inference tensor outside InferenceMode is not allowed");

  const c10::TensorImpl& step = *slot.step.tensor;
  TORCH_CHECK(is_plain_cpu(step) && step.numel() == 1 && step.dtype() == caffe2::TypeMeta::Make<float>(),
              "state 'step' of ", name, " must be one torch.float32 on cpu, but has ", describe(step));
  check_within_storage(step, "state 'step' of " + name);
  slot.param_layout = Layout(param);
  slot.layout = slot.direct ? slot.param_layout : Layout(*slot.exp_avg.tensor);
  check_state(index, slot.exp_avg, "exp_avg");
  check_state(index, slot.exp_avg_sq, "exp_avg_sq");
  if (slot.max_exp_avg_sq) check_state(index, slot.max_exp_avg_sq, "max_exp_avg_sq");
  const auto moments = storage_dtype(slot.exp_avg.tensor->dtype().toScalarType());
  const int combination = moments ? find_combination(*dtype, *moments) : -1;
  TORCH_CHECK(combination >= 0, name, " of dtype ", dtype_name(param.dtype().toScalarType()),
              " cannot have state of dtype ", dtype_name(slot.exp_avg.tensor->dtype().toScalarType()));

  slot.for_each([](Checked& checked) { checked.look(); });
  slot.numel = param.numel() * (c10::isComplexType(param.dtype().toScalarType()) ? 2 : 1);
  slot.steps_done = static_cast<float*>(mutable_data(step));
  TensorEntry& entry = entries_[index];
  entry.param = mutable_data(param);
  entry.exp_avg = mutable_data(*slot.exp_avg.tensor);
  entry.exp_avg_sq = mutable_data(*slot.exp_avg_sq.tensor);
  entry.max_exp_avg_sq = slot.max_exp_avg_sq ? mutable_data(*slot.max_exp_avg_sq.tensor) : nullptr;
  entry.combination = static_cast<std::uint8_t>(combination);
}

void Stepper::check_state(std::size_t index, const Checked& state, const char* key) const {
  const Slot& slot = slots_[index];
  const c10::TensorImpl& tensor = *state.tensor;
  const c10::TensorImpl& param = *slot.param.tensor;
  const std::string name = std::string("state '") + key + "' of " + names_[index];
  TORCH_CHECK(is_plain_cpu(tensor), name, " must be a strided CPU tensor, but has ", describe(tensor));
  TORCH_CHECK(tensor.sizes() == param.sizes() && slot.layout.matches(tensor) && is_dense(tensor), name,
              " must have sizes ", param.sizes(), " and strides ", slot.layout.strides(), ", but has sizes ",
              tensor.sizes(), " and strides ", tensor.strides());
  const bool both_complex =
      c10::isComplexType(param.dtype().toScalarType()) == c10::isComplexType(tensor.dtype().toScalarType());
  TORCH_CHECK(tensor.dtype() == slot.exp_avg.tensor->dtype() && both_complex, name, " must have dtype ",
              dtype_name((both_complex ? slot.exp_avg : slot.param).tensor->dtype().toScalarType()), ", but has ",
              dtype_name(tensor.dtype().toScalarType()));
  check_within_storage(tensor, name);
}

void Stepper::check_overlap() {
  std::vector<WrittenTensor> written;
  written.reserve(slots_.size() * 5);
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].param.storage == nullptr) continue;
    slots_[i].for_each([&](const Checked& checked) { written.push_back({checked.tensor, i}); });
  }
  const Overlap overlap = find_overlap(written);
  TORCH_CHECK(!overlap.found, "a step cannot update two tensors that share memory: ", names_[overlap.first_owner],
              " and ", names_[overlap.second_owner], " (or their states) overlap");
}

bool Stepper::unchanged(const Slot& slot) {
  static const Layout scalar;
  return slot.param.unchanged(slot.param_layout) && slot.step.unchanged(scalar) &&
         slot.exp_avg.unchanged(slot.layout) && slot.exp_avg_sq.unchanged(slot.layout) &&
         (!slot.max_exp_avg_sq || slot.max_exp_avg_sq.unchanged(slot.layout));
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
                  names_[i], " does not have");
      entry.amsgrad = options.amsgrad;
      entry.grad = prepare_grad(i, grad, write_back);
      if (!slot.direct) entry.param = stage(slot.layout, at::Tensor(TensorPtr::reclaim_copy(slot.param.tensor)), true);
      entry.scalars = scalars_for(i, options, options.maximize ? -unscale_ : unscale_);
      numel = slot.numel;
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

void* Stepper::prepare_grad(std::size_t index, const at::Tensor& grad, bool write_back) {
  const Slot& slot = slots_[index];
  const c10::TensorImpl& tensor = *grad.unsafeGetTensorImpl();
  if (is_plain_cpu(tensor) && tensor.dtype() == slot.param.dtype && slot.layout.matches(tensor) &&
      run_within_storage(tensor)) {
    return write_back ? mutable_data(tensor) : const_cast<void*>(const_data(tensor));
  }
  const c10::TensorImpl& param = *slot.param.tensor;
  const std::string& name = names_[index];
  TORCH_CHECK(tensor.layout() == c10::kStrided,
              "Adam does not support sparse gradients, please consider SparseAdam instead: the gradient of ", name,
              " has ", describe(tensor));
  TORCH_CHECK(tensor.sizes() == param.sizes() && tensor.dtype() == param.dtype() && tensor.device() == param.device(),
              "the gradient of ", name, " must have ", describe(param), ", but has ", describe(tensor));
  if (tensor.has_storage()) check_within_storage(tensor, "the gradient of " + name);
  TORCH_CHECK(
      !write_back || !may_overlap_itself(tensor), "the gradient of ", name,
      " cannot be unscaled in place: more than one of its elements refers to a single memory location (strides ",
      tensor.strides(), " with sizes ", tensor.sizes(), ")");
  // A zero tensor has no memory to be unscaled in, and nothing to unscale.
  return stage(slot.layout, grad, write_back && !tensor.key_set().has(c10::DispatchKey::ZeroTensor));
}

std::int32_t Stepper::scalars_for(std::size_t index, const GroupOptions& options, double grad_factor) {
  const Slot& slot = slots_[index];
  const double done = *slot.steps_done;
  std::int32_t& first = first_key_[slot.group];
  for (std::int32_t key = first; key >= 0; key = keys_[key].next) {
    if (keys_[key].steps_done == done) return key;
  }
  TORCH_CHECK(done >= 0.0 && done == std::floor(done) && done < 9007199254740992.0, "state 'step' of ", names_[index],
              " must be a whole number of updates, but is ", done);
  keys_.push_back({done, first});
  scalars_.push_back(compute_scalars(options.hyper, static_cast<std::int64_t>(done) + 1, grad_factor));
  return first = static_cast<std::int32_t>(keys_.size() - 1);
}

void* Stepper::stage(const Layout& layout, const at::Tensor& original, bool write_back) {
  const at::NoGradGuard no_grad;
  at::Tensor copy = at::empty_strided(layout.sizes(), layout.strides(), original.options());
  copy.copy_(original);
  staged_.push_back({original, copy, write_back});
  return mutable_data(*copy.unsafeGetTensorImpl());
}

bool Stepper::is_long() const { return unit_count_ >= long_step_units; }

void Stepper::pin(at::TensorList grads) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (entries_[i].scalars < 0) continue;
    const at::Tensor& grad = grad_of(i, grads);
    if (grad.has_storage()) pinned_storages_.push_back(grad.storage());
    slots_[i].for_each([&](const Checked& checked) {
      pinned_storages_.push_back(checked.tensor->storage());
      pinned_tensors_.push_back(TensorPtr::reclaim_copy(checked.tensor));
    });
  }
}

void Stepper::run() noexcept {
  const Table table{entries_.data(), static_cast<std::int64_t>(entries_.size()), scalars_.data(), unit_count_};
  cpu::launch(table, {isa_, at::get_num_threads(), units_per_chunk, unscale_});
}

void Stepper::finish() {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (entries_[i].scalars < 0) continue;
    *slots_[i].steps_done += 1.0f;
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
