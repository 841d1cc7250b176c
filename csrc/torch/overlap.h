// Whether any two of the tensors that a step writes share memory. Written elements that belong to two tensors would
// depend on the order of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace adamw_ext {

struct WrittenTensor {
  const c10::TensorImpl* tensor;  // plain memory, checked to lie within its storage
  std::size_t owner;              // whatever the caller wants to hear back
};

struct Overlap {
  std::size_t first_owner;
  std::size_t second_owner;
  bool found = false;
};

// Exact: interleaved views (`x[::2]` and `x[1::2]`) do not overlap. O(n log n) unless gaps make a closer look needed.
Overlap find_overlap(const std::vector<WrittenTensor>& tensors);

}  // namespace adamw_ext
