// THE arithmetic: one AdamW update of one element. Every path compiles this text and there is no other copy.
//
// Sources: Loshchilov and Hutter 2017 (arXiv 1711.05101), algorithm 2; amsgrad from Reddi, Kale and Kumar 2018
// (arXiv 1904.09237), with the maximum taken before the bias correction, as torch does.
//
// Only IEEE addition, subtraction, multiplication, division and square root in one fixed order, no fused
// multiply-add: every processor, and every vector width, gives the same bits (a NaN equals any NaN).
#pragma once

#include <cmath>
#include <limits>

#include "hyper.h"
#include "portable.h"

namespace adamw_ext {

template <class T>
struct Element {
  T param;
  T exp_avg;
  T exp_avg_sq;
  T max_exp_avg_sq;  // amsgrad only
};

// NaN in either argument gives NaN, as torch.maximum.
template <class T>
ADAMW_EXT_HD ADAMW_EXT_INLINE T maximum(T a, T b) {
  const T larger = a > b ? a : b;  // b where either is NaN
  return a == a ? larger : a;
}

template <class T>
ADAMW_EXT_HD ADAMW_EXT_INLINE T finite_or_zero(T x) {
  return std::fabs(x) <= std::numeric_limits<T>::max() ? x : T(0);
}

// Whether exp_avg is reckoned as beta1*m + (1 - beta1)*g. Where beta1 is small, m + (1 - beta1)*(g - m) would keep the
// rounding error of an m that is to be forgotten; where it is large, the float32 values of beta1 and 1 - beta1 would
// not add up to 1.
template <class T>
ADAMW_EXT_HD ADAMW_EXT_INLINE bool forgets_fast(const StepScalars<T>& s) {
  return s.beta1 < T(0.5);
}

// forgetful: what forgets_fast says of the scalars. A constant for a whole loop, so that the loop has no choice to
// make.
template <bool amsgrad, class T>
ADAMW_EXT_HD ADAMW_EXT_INLINE void update(Element<T>& e, T grad, const StepScalars<T>& s, bool forgetful) {
  e.exp_avg =
      forgetful ? s.beta1 * e.exp_avg + s.one_minus_beta1 * grad : e.exp_avg + s.one_minus_beta1 * (grad - e.exp_avg);
  e.exp_avg_sq = s.beta2 * e.exp_avg_sq + (s.one_minus_beta2 * grad) * grad;

  T second_moment = e.exp_avg_sq;
  // Where the caller flushes subnormal numbers, so does the addition; some instructions that select do, others not.
  if (amsgrad) second_moment = e.max_exp_avg_sq = maximum(e.exp_avg_sq, e.max_exp_avg_sq + T(0));

  const T denominator = std::sqrt(second_moment) * s.denominator_scale + s.eps;
  const T descent = s.step_size * (e.exp_avg / denominator);

  // p*(1 - lr*wd) - descent, rearranged so that p is rounded once and not twice, and so that 1 - lr*wd is never
  // rounded: in float32 that loses up to 30% of a decay of 1e-7 and 3% of one of 1e-6. An infinite param stays
  // infinite instead of becoming inf - inf.
  const T decay = s.lr_weight_decay * finite_or_zero(e.param);
  e.param = e.param - (decay + descent);
}

}  // namespace adamw_ext
