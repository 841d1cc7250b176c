#include "masters.h"

#include <ATen/ops/empty.h>

#include "../core/rounding.h"
#include "memory.h"

namespace adamw_ext {
namespace {

at::Tensor on_cpu(const at::Tensor& tensor, at::ScalarType dtype, const char* name) {
  TORCH_CHECK(tensor.defined() && tensor.scalar_type() == dtype && tensor.layout() == c10::kStrided, name,
              " must be a strided tensor of dtype ", dtype_name(dtype), ", but has ",
              describe(*tensor.unsafeGetTensorImpl()));
  TORCH_CHECK(is_plain(*tensor.unsafeGetTensorImpl()), name, " must be on the CPU or a CUDA device, but has ",
              describe(*tensor.unsafeGetTensorImpl()));
  check_within_storage(*tensor.unsafeGetTensorImpl(), name);
  return tensor.detach().to(c10::kCPU).contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> split_master(const at::Tensor& master) {
  const at::Tensor from = on_cpu(master, c10::kFloat, "master");
  at::Tensor param = at::empty(from.sizes(), c10::kBFloat16), remainder = at::empty(from.sizes(), c10::kShort);
  const auto* values = static_cast<const float*>(from.const_data_ptr());
  auto* high = static_cast<std::uint16_t*>(param.mutable_data_ptr());
  auto* low = static_cast<std::uint16_t*>(remainder.mutable_data_ptr());
  for (std::int64_t i = 0; i < from.numel(); ++i) {
    const SplitFloat halves = split(values[i]);
    high[i] = static_cast<std::uint16_t>(halves.high);
    low[i] = static_cast<std::uint16_t>(halves.low);
  }
  return {param, remainder};
}

at::Tensor join_master(const at::Tensor& param, const at::Tensor& remainder) {
  const at::Tensor shown = on_cpu(param, c10::kBFloat16, "param"), rest = on_cpu(remainder, c10::kShort, "remainder");
  TORCH_CHECK(shown.sizes() == rest.sizes(), "remainder must have sizes ", shown.sizes(), ", but has ", rest.sizes());
  at::Tensor master = at::empty(shown.sizes(), c10::kFloat);
  const auto* high = static_cast<const std::uint16_t*>(shown.const_data_ptr());
  const auto* low = static_cast<const std::uint16_t*>(rest.const_data_ptr());
  auto* values = static_cast<float*>(master.mutable_data_ptr());
  for (std::int64_t i = 0; i < shown.numel(); ++i) values[i] = join(high[i], low[i]);
  return master;
}

}  // namespace adamw_ext
