#include "param_state.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>

#include <utility>

#include "masters.h"
#include "memory.h"
#include "stepper.h"

namespace adamw_ext {
namespace {

at::Tensor laid_out_as(const at::Tensor& param, at::ScalarType dtype, const at::Tensor& values) {
  const auto options = param.options().dtype(dtype).requires_grad(false);
  at::Tensor copy = at::empty_like(param, options, at::MemoryFormat::Preserve);
  return copy.copy_(values);
}

Master master_kind(const at::Tensor& param, const AdamWOptions& options, const std::string& name) {
  const Master wanted = master_of(options);
  const at::ScalarType dtype = param.scalar_type();
  const auto storage = storage_dtype(dtype);
  if (wanted == Master::none || (storage && size_of(*storage) > 2)) return Master::none;
  const bool takes = dtype == at::kBFloat16 || (dtype == at::kHalf && wanted == Master::float32);
  TORCH_CHECK_VALUE(takes, "master_weights='", options.master_weights, "' has no kernel for ", name, ", which has ",
                    describe(*param.unsafeGetTensorImpl()));
  return wanted;
}

bool has_kernel(const at::Tensor& param, at::ScalarType moments, const AdamWOptions& options, Master master) {
  const auto from = storage_dtype(param.scalar_type()), to = storage_dtype(moments);
  const auto rounding = options.stochastic_rounding ? Rounding::stochastic : Rounding::nearest;
  return from && to && param.is_complex() == at::isComplexType(moments) &&
         find_combination(*from, *to, master, rounding) >= 0;
}

// The moments' dtype, where `loaded` is that of a state dict or the param's own.
at::ScalarType moment_dtype(const at::Tensor& param, const AdamWOptions& options, Master master,
                            const std::string& name, at::ScalarType loaded) {
  if (!options.moment_dtype) return has_kernel(param, loaded, options, master) ? loaded : param.scalar_type();
  const at::ScalarType wanted = *options.moment_dtype;
  const bool complex = param.is_complex() && wanted == at::kFloat;
  const at::ScalarType dtype = complex ? at::kComplexFloat : wanted;
  TORCH_CHECK_VALUE(dtype == param.scalar_type() || has_kernel(param, dtype, options, master),
                    "moment_dtype=", dtype_name(wanted), " has no kernel for ", name, ", which has ",
                    describe(*param.unsafeGetTensorImpl()));
  return dtype;
}

at::Tensor step_tensor(const at::Tensor& param, const AdamWOptions& options) {
  return at::zeros({}, at::device(options.capturable ? param.device() : at::Device(at::kCPU)).dtype(at::kFloat));
}

// A bfloat16 param that shows its master rounded half to even, as others round, is to show what a kernel would.
at::Tensor shown_of(const at::Tensor& param, const at::Tensor& master) {
  const at::Tensor high = std::get<0>(split_master(master)).to(param.device());
  const at::Tensor rounded = master.to(param.device(), param.scalar_type());
  return at::where(param.detach().eq(rounded), high, param.detach());
}

bool may_write(const at::Tensor& tensor) { return !tensor.is_inference() || c10::InferenceMode::is_enabled(); }

at::Tensor new_master(const at::Tensor& param, Master kind, const std::string& name) {
  check_within_storage(*param.unsafeGetTensorImpl(), name);
  if (kind == Master::float32) return laid_out_as(param, at::kFloat, param.detach());
  return at::zeros_like(param, param.options().dtype(at::kShort).requires_grad(false), at::MemoryFormat::Preserve);
}

}  // namespace

Master master_of(const AdamWOptions& options) {
  if (options.master_weights.empty()) return Master::none;
  TORCH_CHECK_VALUE(options.master_weights == "fp32" || options.master_weights == "split",
                    "master_weights must be 'fp32', 'split' or None, but is '", options.master_weights, "'");
  return options.master_weights == "fp32" ? Master::float32 : Master::remainder;
}

ParamState new_state(const at::Tensor& param, const AdamWOptions& options, const std::string& name) {
  TORCH_CHECK(has_sizes(*param.unsafeGetTensorImpl()), name, " can have no state: it has ",
              describe(*param.unsafeGetTensorImpl()));
  const Master master = master_kind(param, options, name);
  const auto zeros = [&](at::ScalarType dtype) {
    return at::zeros_like(param, param.options().dtype(dtype).requires_grad(false), at::MemoryFormat::Preserve);
  };
  const at::ScalarType dtype = moment_dtype(param, options, master, name, param.scalar_type());
  ParamState state{step_tensor(param, options), zeros(dtype), zeros(dtype), {}, {}};
  if (options.amsgrad) state.max_exp_avg_sq = zeros(dtype);
  if (master != Master::none) state.master = new_master(param, master, name);
  if (is_plain(*param.unsafeGetTensorImpl())) check_has_memory(state.exp_avg, "the state of " + name);
  return state;
}

ParamState loaded_state(const at::Tensor& param, const AdamWOptions& options, const std::string& name,
                        const StateDict& loaded) {
  const Master master = master_kind(param, options, name);
  const auto find = [&](const char* key) { return loaded.contains(key) ? loaded.at(key) : at::Tensor(); };
  const auto refuse = [&](const char* key, const std::string& wanted, const at::Tensor& found) {
    TORCH_CHECK_VALUE(false, "loaded state '", key, "' of ", name, " must be ", wanted, ", but is ",
                      found.defined() ? describe(*found.unsafeGetTensorImpl()) : "missing");
  };
  const auto fits = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || !is_plain(*tensor.unsafeGetTensorImpl()) || tensor.sizes() != param.sizes()) return false;
    check_within_storage(*tensor.unsafeGetTensorImpl(), "loaded state of " + name);
    return true;
  };
  ParamState state;
  const at::Tensor step = find("step");
  if (!step.defined() || !holds_number(step) || step.is_complex()) refuse("step", "a whole number of updates", step);
  const double done = step.item().toDouble();
  TORCH_CHECK_VALUE(is_step_count(done), "loaded state 'step' of ", name, " must be a whole number of updates, but is ",
                    done);
  state.step = step_tensor(param, options).fill_(done);
  const auto load_moment = [&](const char* key) {
    const at::Tensor moment = find(key);
    const bool is_moment =
        fits(moment) && storage_dtype(moment.scalar_type()) && moment.is_complex() == param.is_complex();
    if (!is_moment) refuse(key, "of the param's shape and a floating point dtype", moment);
    const at::ScalarType loaded_dtype = state.exp_avg.defined() ? state.exp_avg.scalar_type() : moment.scalar_type();
    return laid_out_as(param, moment_dtype(param, options, master, name, loaded_dtype), moment);
  };
  state.exp_avg = load_moment("exp_avg");
  state.exp_avg_sq = load_moment("exp_avg_sq");
  if (options.amsgrad) state.max_exp_avg_sq = load_moment("max_exp_avg_sq");
  constexpr const char* keys[] = {"", "master_param", "param_remainder"};
  for (const Master other : {Master::float32, Master::remainder}) {
    TORCH_CHECK_VALUE(other == master || !find(keys[static_cast<int>(other)]).defined(), "loaded state '",
                      keys[static_cast<int>(other)], "' of ", name,
                      " is a master of another kind than the param has: ", "master_weights is '",
                      options.master_weights, "'. Python's adamw_ext.AdamW converts it");
  }
  if (master == Master::none) return state;
  const char* key = keys[static_cast<int>(master)];
  const at::Tensor value = find(key);
  const at::ScalarType dtype = master == Master::float32 ? at::kFloat : at::kShort;
  if (!fits(value) || value.scalar_type() != dtype) refuse(key, "of the param's shape and " + dtype_name(dtype), value);
  state.master = laid_out_as(param, dtype, value);
  if (master == Master::float32 && param.scalar_type() == at::kBFloat16) {
    TORCH_CHECK(may_write(param), name, " is an inference tensor, which cannot be updated outside InferenceMode");
    state.param = shown_of(param, value);
  }
  return state;
}

void load(const at::Tensor& param, ParamState& to, ParamState& from) {
  if (from.param.defined()) param.detach().copy_(from.param);
  const auto write = [](at::Tensor& into, at::Tensor& value) {
    const bool fits = into.defined() && value.defined() && into.sizes() == value.sizes() &&
                      into.strides() == value.strides() && into.scalar_type() == value.scalar_type() &&
                      into.device() == value.device() && is_plain(*into.unsafeGetTensorImpl()) && may_write(into) &&
                      run_within_storage(*into.unsafeGetTensorImpl());
    if (fits) {
      into.copy_(value);
    } else {
      std::swap(into, value);
    }
  };
  write(to.step, from.step);
  write(to.exp_avg, from.exp_avg);
  write(to.exp_avg_sq, from.exp_avg_sq);
  write(to.max_exp_avg_sq, from.max_exp_avg_sq);
  write(to.master, from.master);
}

void conform(const at::Tensor& param, const AdamWOptions& options, const std::string& name, ParamState& state) {
  const Master master = master_kind(param, options, name);
  if (master != Master::none && !state.master.defined()) state.master = new_master(param, master, name);
  if (!is_dense(*param.unsafeGetTensorImpl())) return;
  const Layout layout(*param.unsafeGetTensorImpl());
  for (at::Tensor* tensor : {&state.exp_avg, &state.exp_avg_sq, &state.max_exp_avg_sq, &state.master}) {
    const bool is_laid_out = !tensor->defined() || tensor->sizes() != param.sizes() ||
                             !is_plain(*tensor->unsafeGetTensorImpl()) ||
                             layout.matches(*tensor->unsafeGetTensorImpl());
    if (is_laid_out) continue;
    check_within_storage(*tensor->unsafeGetTensorImpl(), "the state of " + name);
    *tensor = laid_out_as(param, tensor->scalar_type(), *tensor);
  }
}

StateDict shown(const ParamState& state) {
  StateDict items;
  items.insert("step", state.step);
  items.insert("exp_avg", state.exp_avg);
  items.insert("exp_avg_sq", state.exp_avg_sq);
  if (state.max_exp_avg_sq.defined()) items.insert("max_exp_avg_sq", state.max_exp_avg_sq);
  if (state.master.defined()) {
    items.insert(state.master.scalar_type() == at::kFloat ? "master_param" : "param_remainder", state.master);
  }
  return items;
}

}  // namespace adamw_ext
