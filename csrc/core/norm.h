// The global L2 norm of the gradients: the order in which squares are added, and the clip coefficient.
//
// One order for every path, so that the norm's bits depend on the gradients alone. Squares are taken and added in
// double: that of a float is exact there, and neither 1e-30 nor 1e30 leaves its range. A tensor is cut into pieces of
// 4,096 elements. Within a piece, element i goes to accumulator i % 256, in order, and the accumulators are added
// pairwise: the upper half to the lower, until one is left. The pieces' sums, in the order of the table, are added in
// the same way, over 1,024 accumulators.
#pragma once

#include <cmath>
#include <cstdint>

#include "hyper.h"
#include "portable.h"

namespace adamw_ext {

constexpr std::int64_t elements_per_piece = 4096;
constexpr int piece_width = 256;
constexpr int total_width = 1024;

ADAMW_EXT_HD inline std::int64_t pieces_of(std::int64_t numel) {
  return (numel + elements_per_piece - 1) / elements_per_piece;
}

ADAMW_EXT_HD ADAMW_EXT_INLINE double square(double x) { return x * x; }

// Adds the upper half of 2*half accumulators to the lower one: the share of thread `thread` of `threads`.
ADAMW_EXT_HD ADAMW_EXT_INLINE void fold(double* accumulators, int half, int thread, int threads) {
  for (int i = thread; i < half; i += threads) accumulators[i] += accumulators[i + half];
}

// The sum of the pieces' sums.
inline double add_up(const double* sums, std::int64_t count) {
  double accumulators[total_width] = {};
  for (std::int64_t i = 0; i < count; ++i) accumulators[i % total_width] += sums[i];
  for (int half = total_width / 2; half > 0; half /= 2) fold(accumulators, half, 0, 1);
  return accumulators[0];
}

// As torch.nn.utils.clip_grad_norm_: an infinite norm gives 0, NaN gives NaN.
ADAMW_EXT_HD inline double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient >= 1.0 ? 1.0 : coefficient;
}

// The sum of the squares of unscaled gradients, from that of scaled ones.
ADAMW_EXT_HD inline double unscale_squares(double sum, double unscale) { return sum * unscale * unscale; }

// Folds clipping into the gradient's factor. sum_of_squares: of all unscaled gradients.
ADAMW_EXT_HD inline void clip(Scalars& scalars, double sum_of_squares) {
  if (scalars.max_grad_norm == no_max_grad_norm) return;
  scalars.in_double.grad_factor *= clip_coefficient(std::sqrt(sum_of_squares), scalars.max_grad_norm);
  scalars.in_float.grad_factor = static_cast<float>(scalars.in_double.grad_factor);
}

}  // namespace adamw_ext
