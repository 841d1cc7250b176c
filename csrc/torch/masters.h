// Float32 masters as tensors: taken apart and put together as the kernels do it, for checkpoints.
#pragma once

#include <ATen/core/Tensor.h>
#include <adamw_ext/export.h>

#include <tuple>

namespace adamw_ext {

// (bfloat16, int16), contiguous and on the CPU, of a float32 tensor on any device.
ADAMW_EXT_API std::tuple<at::Tensor, at::Tensor> split_master(const at::Tensor& master);

// The float32 master, contiguous and on the CPU, of a bfloat16 param and its int16 remainder, of one shape.
ADAMW_EXT_API at::Tensor join_master(const at::Tensor& param, const at::Tensor& remainder);

}  // namespace adamw_ext
