// What must hold of a param and its state before a kernel may touch them.
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include "overlap.h"
#include "stepper.h"

namespace adamw_ext {

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

// Everything a slot's tensors must be, whatever the gradient. On return the kernel may use their memory.
void Stepper::check(std::size_t index) {
  Slot& slot = slots_[index];
  const std::string& name = names_[index];
  const c10::TensorImpl& param = *slot.param.tensor;
  const auto dtype = storage_dtype(param.dtype().toScalarType());
  TORCH_CHECK(dtype && param.device() == slot.bucket->device && param.layout() == c10::kStrided &&
                  param.has_storage() && has_sizes(param) && !param.key_set().has(c10::DispatchKey::ZeroTensor),
              name, " must be a strided tensor on ", slot.bucket->device,
              " of a floating point or complex dtype, but has ", describe(param));
  check_within_storage(param, name);
  slot.direct = is_dense(param);
  TORCH_CHECK(slot.direct || !may_overlap_itself(param), name,
              " cannot be updated: more than one of its elements refers to a single memory location (strides ",
              param.strides(), " with sizes ", param.sizes(), "); clone() it before it becomes a parameter");
  TORCH_CHECK(!slot.param.tensor->is_inference() || c10::InferenceMode::is_enabled(), name,
              " cannot be updated: Inplace update to inference tensor outside InferenceMode is not allowed");

  const c10::TensorImpl& step = *slot.step.tensor;
  const c10::Device step_device = slot.bucket->deferred ? slot.bucket->device : c10::Device(c10::kCPU);
  TORCH_CHECK(is_plain(step) && step.device() == step_device && step.numel() == 1 &&
                  step.dtype() == caffe2::TypeMeta::Make<float>(),
              "state 'step' of ", name, " must be one torch.float32 on ", step_device, ", but has ", describe(step));
  check_within_storage(step, "state 'step' of " + name);
  slot.param_layout = Layout(param);
  slot.layout = slot.direct ? slot.param_layout : Layout(*slot.exp_avg.tensor);
  check_state(index, slot.exp_avg, "exp_avg");
  check_state(index, slot.exp_avg_sq, "exp_avg_sq");
  if (slot.max_exp_avg_sq) check_state(index, slot.max_exp_avg_sq, "max_exp_avg_sq");
  check_master(index);
  const auto moments = storage_dtype(slot.exp_avg.tensor->dtype().toScalarType());
  const int combination = moments ? find_combination(*dtype, *moments, slot.master_kind(), slot.rounding) : -1;
  constexpr const char* masters[] = {"", " and a master of dtype torch.float32", " and a master of dtype torch.int16"};
  TORCH_CHECK(combination >= 0, name, " of dtype ", dtype_name(param.dtype().toScalarType()),
              " cannot have state of dtype ", dtype_name(slot.exp_avg.tensor->dtype().toScalarType()),
              masters[static_cast<int>(slot.master_kind())],
              slot.rounding == Rounding::stochastic ? ", rounded stochastically" : "");

  slot.for_each([](Checked& checked) { checked.look(); });
  slot.grad_dtype = caffe2::TypeMeta();
  slot.numel = param.numel() * (c10::isComplexType(param.dtype().toScalarType()) ? 2 : 1);
  slot.steps_done = static_cast<float*>(mutable_data(step));
  TensorEntry& entry = slot.entry();
  entry.param = mutable_data(param);
  entry.exp_avg = mutable_data(*slot.exp_avg.tensor);
  entry.exp_avg_sq = mutable_data(*slot.exp_avg_sq.tensor);
  entry.max_exp_avg_sq = slot.max_exp_avg_sq ? mutable_data(*slot.max_exp_avg_sq.tensor) : nullptr;
  entry.master = slot.master ? mutable_data(*slot.master.tensor) : nullptr;
  entry.combination = static_cast<std::uint8_t>(combination);
}

// A moment.
void Stepper::check_state(std::size_t index, const Checked& state, const char* key) const {
  const Slot& slot = slots_[index];
  const c10::TensorImpl& tensor = *state.tensor;
  const c10::TensorImpl& param = *slot.param.tensor;
  const std::string name = std::string("state '") + key + "' of " + names_[index];
  check_laid_out(index, state, name);
  const bool both_complex =
      c10::isComplexType(param.dtype().toScalarType()) == c10::isComplexType(tensor.dtype().toScalarType());
  TORCH_CHECK(tensor.dtype() == slot.exp_avg.tensor->dtype() && both_complex, name, " must have dtype ",
              dtype_name((both_complex ? slot.exp_avg : slot.param).tensor->dtype().toScalarType()), ", but has ",
              dtype_name(tensor.dtype().toScalarType()));
}

void Stepper::check_master(std::size_t index) const {
  const Slot& slot = slots_[index];
  const c10::ScalarType param_type = slot.param.tensor->dtype().toScalarType();
  const bool has_master = slot.master_kind() != Master::none;
  TORCH_CHECK(has_master || slot.group_master == Master::none || !needs_master(param_type), names_[index], " of dtype ",
              dtype_name(param_type), " needs a master, which it does not have");
  if (!has_master) return;
  const bool is_whole = slot.group_master == Master::float32;
  const std::string name =
      std::string("state '") + (is_whole ? "master_param" : "param_remainder") + "' of " + names_[index];
  check_laid_out(index, slot.master, name);
  const c10::ScalarType wanted = is_whole ? c10::kFloat : c10::kShort;
  const c10::ScalarType found = slot.master.tensor->dtype().toScalarType();
  TORCH_CHECK(found == wanted, name, " must have dtype ", dtype_name(wanted), ", but has ", dtype_name(found));
}

void Stepper::check_laid_out(std::size_t index, const Checked& state, const std::string& name) const {
  const Slot& slot = slots_[index];
  const c10::TensorImpl& tensor = *state.tensor;
  const c10::TensorImpl& param = *slot.param.tensor;
  TORCH_CHECK(is_plain(tensor) && tensor.device() == param.device(), name, " must be a strided tensor on ",
              param.device(), ", but has ", describe(tensor));
  TORCH_CHECK(tensor.sizes() == param.sizes() && slot.layout.matches(tensor) && is_dense(tensor), name,
              " must have sizes ", param.sizes(), " and strides ", slot.layout.strides(), ", but has sizes ",
              tensor.sizes(), " and strides ", tensor.strides());
  check_within_storage(tensor, name);
}

void Stepper::check_overlap() {
  std::vector<WrittenTensor> written;
  written.reserve(slots_.size() * 6);
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
         (!slot.max_exp_avg_sq || slot.max_exp_avg_sq.unchanged(slot.layout)) &&
         (!slot.master || slot.master.unchanged(slot.layout));
}

// Lets the entry have gradients of this dtype, or throws.
void Stepper::check_grad_dtype(std::size_t index, const c10::TensorImpl& grad) {
  Slot& slot = slots_[index];
  const c10::ScalarType param_type = slot.param.tensor->dtype().toScalarType(), type = grad.dtype().toScalarType();
  const auto param_dtype = storage_dtype(param_type), dtype = storage_dtype(type);
  TORCH_CHECK(dtype && takes_grad(*param_dtype, *dtype) && c10::isComplexType(type) == c10::isComplexType(param_type),
              "the gradient of ", names_[index], " must have ", describe(*slot.param.tensor), ", but has ",
              describe(grad));
  slot.grad_dtype = grad.dtype();
  slot.entry().grad_dtype = *dtype;
}

void Stepper::check_step(std::size_t index) const {
  const double done = *slots_[index].steps_done;
  TORCH_CHECK(is_step_count(done), "state 'step' of ", names_[index], " must be a whole number of updates, but is ",
              done);
}

}  // namespace adamw_ext
