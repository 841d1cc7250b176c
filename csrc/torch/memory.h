// What a tensor's memory looks like, and what of it a kernel may touch directly.
//
// A kernel walks a tensor as `numel` consecutive elements from one pointer. That is right only for a plain strided CPU
// or CUDA tensor, without lazy conjugation or negation, whose elements fill their memory without gaps. Everything here
// decides that question, or explains in words why the answer is no.
#pragma once

#include <ATen/core/Tensor.h>
#include <adamw_ext/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../core/dtypes.h"

namespace adamw_ext {

// Sizes and strides that several tensors share.
class Layout {
 public:
  Layout() = default;
  explicit Layout(const c10::TensorImpl& tensor);

  c10::IntArrayRef sizes() const { return {numbers_.data(), dim()}; }
  c10::IntArrayRef strides() const { return {numbers_.data() + dim(), dim()}; }

  // Whether the tensor puts every element where this layout does. Strides of dimensions of size 1 do not matter.
  bool matches(const c10::TensorImpl& tensor) const {
    const c10::IntArrayRef tensor_sizes = tensor.sizes(), tensor_strides = tensor.strides();
    if (tensor_sizes.size() != dim()) return false;
    bool same = true;
    for (std::size_t i = 0; i < dim(); ++i) {
      same &= tensor_sizes[i] == numbers_[i] && tensor_strides[i] == numbers_[dim() + i];
    }
    return same || matches_loosely(tensor);
  }

 private:
  std::size_t dim() const { return numbers_.size() / 2; }
  bool matches_loosely(const c10::TensorImpl& tensor) const;

  std::vector<std::int64_t> numbers_;  // sizes, then strides
};

// The storage type that holds a tensor's numbers (a complex tensor's real and imaginary parts), if kernels know it.
std::optional<DType> storage_dtype(c10::ScalarType dtype);

// Plain strided memory on the CPU or a CUDA device: no subclass, no sparse, quantized, meta or lazy representation.
inline bool is_plain(const c10::TensorImpl& tensor) {
  using c10::DispatchKey;
  constexpr auto plain_keys =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU, DispatchKey::CUDA,
                           DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA, DispatchKey::ADInplaceOrView});
  const c10::DispatchKeySet keys = tensor.key_set();
  return (keys.raw_repr() & ~plain_keys.raw_repr()) == 0 && (tensor.is_cpu() || tensor.is_cuda()) &&
         tensor.has_storage();
}

// Whether sizes and strides are numbers, which those of nested and of traced tensors are not. A tensor of Python can be
// given the data of such a one, and passes for strided.
inline bool has_sizes(const c10::TensorImpl& tensor) {
  return !tensor.is_nested() && !tensor.has_symbolic_sizes_strides();
}

// Plain, and its elements fill a range of memory without gaps or overlap.
bool is_dense(const c10::TensorImpl& tensor);

// Whether two indices of this tensor may name the same memory. True where that cannot be excluded cheaply.
bool may_overlap_itself(const c10::TensorImpl& tensor);

// The first element, for reading and writing. Shared copy-on-write memory is made the tensor's own.
inline void* mutable_data(const c10::TensorImpl& tensor) {
  if (tensor.numel() == 0) return nullptr;
  auto* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
  return static_cast<char*>(storage->mutable_data()) + tensor.storage_offset() * tensor.itemsize();
}

inline const void* const_data(const c10::TensorImpl& tensor) {
  if (tensor.numel() == 0) return nullptr;
  const auto* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
  return static_cast<const char*>(storage->data()) + tensor.storage_offset() * tensor.itemsize();
}

// Whether the storage holds `numel` elements from the tensor's first on: all of a dense tensor.
inline bool run_within_storage(const c10::TensorImpl& tensor) {
  if (tensor.numel() == 0) return true;
  const auto* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
  return storage->data() != nullptr &&
         static_cast<std::size_t>(tensor.storage_offset() + tensor.numel()) * tensor.itemsize() <= storage->nbytes();
}

// Throws unless the tensor's storage holds all of its elements, whatever its strides. `name` opens the message.
void check_within_storage(const c10::TensorImpl& tensor, const std::string& name);

// Throws unless a tensor that was made for a plain one is plain: modes such as FakeTensorMode make others. `what` opens
// the message.
ADAMW_EXT_API void check_has_memory(const at::Tensor& made, const std::string& what);

// Whether the tensor is one element that can be read.
ADAMW_EXT_API bool holds_number(const at::Tensor& tensor);

// "shape [2, 3], torch.float32, on cpu", for messages.
ADAMW_EXT_API std::string describe(const c10::TensorImpl& tensor);
std::string dtype_name(c10::ScalarType dtype);

}  // namespace adamw_ext
