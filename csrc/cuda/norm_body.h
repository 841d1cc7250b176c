// What one thread does to add up squares: its share of a piece, in the accumulators that core/norm.h names, whatever
// thread holds which.
#pragma once

#include "body.h"

namespace adamw_ext::cuda {

// A piece belongs to this many threads, each of which has some of its accumulators in registers.
constexpr int threads_per_piece = 32;
constexpr int accumulators_per_thread = piece_width / threads_per_piece;

// Sets the accumulators of thread `thread` to its share of the sum over `count` elements. A row is what all threads
// take at once, with vectors of `per` elements each; rows of 256 elements repeat the accumulators.
template <int per, class Grad>
ADAMW_EXT_HD ADAMW_EXT_INLINE void square_share(const Grad* grad, int count, int thread, double* accumulators) {
  constexpr int row = threads_per_piece * per;
  constexpr int rows = piece_width / row;
  double sums[accumulators_per_thread] = {};
  for (int base = 0; base < count; base += piece_width) {
    ADAMW_EXT_UNROLL
    for (int r = 0; r < rows; ++r) {
      const int first = base + r * row + thread * per;
      if (first + per <= count) {
        load_packet<per>(grad + first, true, [&](int k, Grad element) { sums[r * per + k] += square(load(element)); });
      } else {
        ADAMW_EXT_UNROLL
        for (int k = 0; k < per; ++k) {
          if (first + k < count) sums[r * per + k] += square(load(grad[first + k]));
        }
      }
    }
  }
  ADAMW_EXT_UNROLL
  for (int r = 0; r < rows; ++r) {
    ADAMW_EXT_UNROLL
    for (int k = 0; k < per; ++k) accumulators[r * row + thread * per + k] = sums[r * per + k];
  }
}

template <class Grad>
ADAMW_EXT_HD ADAMW_EXT_INLINE void square_piece(const Grad* grad, int count, int thread, double* accumulators) {
  if (reinterpret_cast<std::uintptr_t>(grad) % vector_bytes == 0) {
    square_share<vector_bytes / static_cast<int>(sizeof(Grad))>(grad, count, thread, accumulators);
  } else {
    square_share<1>(grad, count, thread, accumulators);
  }
}

}  // namespace adamw_ext::cuda
