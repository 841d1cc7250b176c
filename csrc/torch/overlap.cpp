#include "overlap.h"

#include <algorithm>
#include <cstdint>

#include "memory.h"

namespace adamw_ext {
namespace {

struct ByteRange {
  std::uintptr_t begin;
  std::uintptr_t end;
  WrittenTensor written;
};

ByteRange extent_of(const WrittenTensor& written) {
  const c10::TensorImpl& tensor = *written.tensor;
  std::int64_t elements = 1;
  for (std::int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.sizes()[i] - 1) * tensor.strides()[i];
  const auto begin = reinterpret_cast<std::uintptr_t>(const_data(tensor));
  return {begin, begin + static_cast<std::uintptr_t>(elements) * tensor.dtype().itemsize(), written};
}

// Calls visit(byte offset) for every element.
template <class Visit>
bool all_elements(const c10::TensorImpl& tensor, const Visit& visit) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::int64_t> index(sizes.size(), 0);
  std::int64_t offset = 0;
  for (std::int64_t left = tensor.numel(); left > 0; --left) {
    if (!visit(static_cast<std::uintptr_t>(offset) * tensor.dtype().itemsize())) return false;
    for (std::size_t d = sizes.size(); d-- > 0;) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= sizes[d] * strides[d];
      index[d] = 0;
    }
  }
  return true;
}

// Extents [first, last) chain into one range of memory: marks every byte they hold.
Overlap compare_bytes(const ByteRange* first, const ByteRange* last, std::uintptr_t end) {
  std::vector<bool> taken(end - first->begin, false);
  for (const ByteRange* extent = first; extent != last; ++extent) {
    const c10::TensorImpl& tensor = *extent->written.tensor;
    const std::uintptr_t base = extent->begin - first->begin;
    const bool disjoint = all_elements(tensor, [&](std::uintptr_t offset) {
      for (std::size_t byte = 0; byte < tensor.dtype().itemsize(); ++byte) {
        if (taken[base + offset + byte]) return false;
        taken[base + offset + byte] = true;
      }
      return true;
    });
    if (disjoint) continue;
    const ByteRange* other = std::find_if(first, extent, [&](const ByteRange& e) { return e.end > extent->begin; });
    return {other->written.owner, extent->written.owner, true};
  }
  return {};
}

}  // namespace

Overlap find_overlap(const std::vector<WrittenTensor>& tensors) {
  std::vector<ByteRange> extents;
  extents.reserve(tensors.size());
  for (const WrittenTensor& written : tensors) {
    if (written.tensor->numel() > 0) extents.push_back(extent_of(written));
  }
  std::sort(extents.begin(), extents.end(), [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });

  for (std::size_t i = 0; i < extents.size();) {
    std::uintptr_t end = extents[i].end;
    bool gaps = !extents[i].written.tensor->is_non_overlapping_and_dense();
    std::size_t j = i + 1;
    for (; j < extents.size() && extents[j].begin < end; ++j) {
      gaps = gaps || !extents[j].written.tensor->is_non_overlapping_and_dense();
      end = std::max(end, extents[j].end);
    }
    if (j - i > 1) {
      if (!gaps) return {extents[i].written.owner, extents[i + 1].written.owner, true};
      const Overlap overlap = compare_bytes(&extents[i], &extents[i] + (j - i), end);
      if (overlap.found) return overlap;
    }
    i = j;
  }
  return {};
}

}  // namespace adamw_ext
