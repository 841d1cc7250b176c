#include "memory.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <sstream>

namespace adamw_ext {
Layout::Layout(const c10::TensorImpl& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  numbers_.reserve(2 * sizes.size());
  numbers_.insert(numbers_.end(), sizes.begin(), sizes.end());
  numbers_.insert(numbers_.end(), strides.begin(), strides.end());
}

bool Layout::matches_loosely(const c10::TensorImpl& tensor) const {
  if (tensor.sizes() != sizes()) return false;
  if (tensor.numel() <= 1) return true;
  for (std::size_t i = 0; i < dim(); ++i) {
    if (sizes()[i] != 1 && tensor.strides()[i] != strides()[i]) return false;
  }
  return true;
}

std::optional<DType> storage_dtype(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kDouble:
    case c10::kComplexDouble:
      return DType::float64;
    case c10::kFloat:
    case c10::kComplexFloat:
      return DType::float32;
    case c10::kBFloat16:
      return DType::bfloat16;
    case c10::kHalf:
    case c10::kComplexHalf:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

bool is_dense(const c10::TensorImpl& tensor) { return is_plain(tensor) && tensor.is_non_overlapping_and_dense(); }

bool may_overlap_itself(const c10::TensorImpl& tensor) {
  if (tensor.numel() <= 1 || tensor.is_non_overlapping_and_dense()) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return strides[a] < strides[b]; });
  std::int64_t reach = 0;  // the largest offset of the dimensions so far
  for (const std::size_t i : order) {
    if (sizes[i] == 1) continue;
    if (strides[i] <= reach) return true;
    reach += (sizes[i] - 1) * strides[i];
  }
  return false;
}

void check_within_storage(const c10::TensorImpl& tensor, const std::string& name) {
  if (tensor.numel() == 0) return;
  std::int64_t last = tensor.storage_offset();
  for (std::int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.sizes()[i] - 1) * tensor.strides()[i];
  const std::size_t needed = static_cast<std::size_t>(last + 1) * tensor.dtype().itemsize();
  const std::size_t held = tensor.unsafe_storage().nbytes();
  TORCH_CHECK(held >= needed, name, " needs ", needed, " bytes of storage, but its storage holds ", held,
              " bytes: it was freed or resized");
  const bool has_data = tensor.unsafe_storage().data() != nullptr || tensor.key_set().has(c10::DispatchKey::ZeroTensor);
  TORCH_CHECK(has_data, name, " has no memory: its data was that of a tensor without");
}

void check_has_memory(const at::Tensor& made, const std::string& what) {
  TORCH_CHECK(is_plain(*made.unsafeGetTensorImpl()), what,
              " cannot be made: a mode that is switched on makes tensors without memory");
}

bool holds_number(const at::Tensor& tensor) {
  if (!has_sizes(*tensor.unsafeGetTensorImpl()) || tensor.numel() != 1 || tensor.is_meta() ||
      tensor.layout() != c10::kStrided)
    return false;
  return !is_plain(*tensor.unsafeGetTensorImpl()) || run_within_storage(*tensor.unsafeGetTensorImpl());
}

std::string dtype_name(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kDouble:
      return "torch.float64";
    case c10::kFloat:
      return "torch.float32";
    case c10::kHalf:
      return "torch.float16";
    case c10::kBFloat16:
      return "torch.bfloat16";
    case c10::kComplexDouble:
      return "torch.complex128";
    case c10::kComplexFloat:
      return "torch.complex64";
    case c10::kComplexHalf:
      return "torch.complex32";
    case c10::kLong:
      return "torch.int64";
    case c10::kInt:
      return "torch.int32";
    case c10::kShort:
      return "torch.int16";
    case c10::kBool:
      return "torch.bool";
    default:
      return c10::toString(dtype);
  }
}

std::string describe(const c10::TensorImpl& tensor) {
  std::ostringstream text;
  if (has_sizes(tensor)) {
    text << "shape " << tensor.sizes();
  } else {
    text << (tensor.is_nested() ? "nested" : "symbolic") << " sizes";
  }
  text << ", " << dtype_name(tensor.dtype().toScalarType()) << ", on " << tensor.device();
  if (tensor.layout() != c10::kStrided) text << ", layout " << tensor.layout();
  return text.str();
}

}  // namespace adamw_ext
