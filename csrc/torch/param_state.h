// The state of one param of the C++ optimizer: created, loaded and shown. Python's class has its own,
// adamw_ext/state.py, which also serves params that torch updates; the tensors are the same.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <adamw_ext/adamw.h>

#include <string>

#include "../core/dtypes.h"

namespace adamw_ext {

using StateDict = c10::Dict<std::string, at::Tensor>;

struct ParamState {
  at::Tensor step, exp_avg, exp_avg_sq, max_exp_avg_sq, master;  // undefined where there is none
  at::Tensor param;  // of a loaded state: what the param is to become, where its master says so

  bool exists() const { return step.defined(); }
};

// What the options ask for, before the param's dtype is known. Throws c10::ValueError for another name than "", "fp32"
// and "split".
Master master_of(const AdamWOptions& options);

// These throw c10::ValueError where no kernel updates such a param with such options. name: of the param, for messages.
ParamState new_state(const at::Tensor& param, const AdamWOptions& options, const std::string& name);

// A copy of what was loaded, in the form that new_state has.
ParamState loaded_state(const at::Tensor& param, const AdamWOptions& options, const std::string& name,
                        const StateDict& loaded);

// Writes what loaded_state returned into the tensors of `to` that fit, and exchanges the others.
void load(const at::Tensor& param, ParamState& to, ParamState& from);

// Brings the state of a param that was moved into the form that the kernel takes: laid out as the param, with a master
// where its dtype now needs one. Other shapes and dtypes are left for the kernel's checks to refuse.
void conform(const at::Tensor& param, const AdamWOptions& options, const std::string& name, ParamState& state);

StateDict shown(const ParamState& state);

}  // namespace adamw_ext
