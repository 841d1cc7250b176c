// The CUDA path without a GPU: tables are cut into the same launches, and every thread of every block runs the same
// body, one after the other, on host memory. For tests.
#pragma once

#include "launch.h"

namespace adamw_ext::cuda {

// As launch_step, and its three parts one by one.
Error emulate_step(const Table& table, const StepTable& steps, Scalars* device_scalars, bool writes_grads,
                   const Limits& limits) noexcept;

Error emulate_advance(const StepTable& table, const Limits& limits) noexcept;

Error emulate_upload(const Table& table, Scalars* destination, const Limits& limits) noexcept;

Error emulate_norm(const Table& table, const Scaling& scaling, double unscale, double* sums, double* sum_of_squares,
                   const Limits& limits) noexcept;

Error emulate_update(const Table& table, const UpdateInputs& inputs, const Limits& limits) noexcept;

}  // namespace adamw_ext::cuda
