// The CUDA path without a GPU: tables are cut into the same launches, and every thread of every block runs the same
// body, one after the other, on host memory. For tests.
#pragma once

#include "launch.h"

namespace adamw_ext::cuda {

Error emulate_advance(const StepTable& table, const Limits& limits) noexcept;

Error emulate_upload(const Table& table, Scalars* destination, const Limits& limits) noexcept;

Error emulate_update(const Table& table, const UpdateInputs& inputs, const Limits& limits) noexcept;

}  // namespace adamw_ext::cuda
