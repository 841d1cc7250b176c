// The scalars of one step: what `update.h` needs beside the four numbers of an element.
//
// They are computed once per (group, step) in double, with additions, multiplications, divisions and square roots
// only, so that every machine computes the same bits, and rounded to float once.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"
#include "random.h"

namespace adamw_ext {

// One param group's hyperparameters, as the user gave them.
struct Hyper {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double max_grad_norm;  // or no_max_grad_norm
  std::uint64_t seed;    // of stochastic rounding
};

constexpr double no_max_grad_norm = -1.0;

template <class T>
struct StepScalars {
  T grad_factor;  // the gradient is multiplied by this: -1 to maximize, 1/grad_scale, the clip coefficient
  T beta1;
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T step_size;          // lr / (1 - beta1**step)
  T denominator_scale;  // 1 / sqrt(1 - beta2**step)
  T eps;
  T lr_weight_decay;  // lr * weight_decay
  T unscale;          // 1/grad_scale alone, for gradients that are unscaled in place
  RandomKey random;

  template <class To>
  ADAMW_EXT_HD ADAMW_EXT_INLINE StepScalars<To> to() const {
    return {To(grad_factor),
            To(beta1),
            To(one_minus_beta1),
            To(beta2),
            To(one_minus_beta2),
            To(step_size),
            To(denominator_scale),
            To(eps),
            To(lr_weight_decay),
            To(unscale),
            random};
  }
};

// The scalars of one (group, step), for every type that the arithmetic runs in.
struct Scalars {
  StepScalars<double> in_double;
  StepScalars<float> in_float;
  double max_grad_norm;

  ADAMW_EXT_HD ADAMW_EXT_INLINE const StepScalars<double>& as(double) const { return in_double; }
  ADAMW_EXT_HD ADAMW_EXT_INLINE const StepScalars<float>& as(float) const { return in_float; }
};

// base**exponent by squaring. `pow` is not used: its last bit differs between libraries and devices.
ADAMW_EXT_HD inline double power(double base, std::int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// step counts from 1: the number of this update.
ADAMW_EXT_HD inline Scalars compute_scalars(const Hyper& hyper, std::int64_t step, double unscale, bool maximize) {
  const double bias_correction1 = 1.0 - power(hyper.beta1, step);
  const double bias_correction2 = 1.0 - power(hyper.beta2, step);
  const StepScalars<double> scalars{maximize ? -unscale : unscale,
                                    hyper.beta1,
                                    1.0 - hyper.beta1,
                                    hyper.beta2,
                                    1.0 - hyper.beta2,
                                    hyper.lr / bias_correction1,
                                    1.0 / std::sqrt(bias_correction2),
                                    hyper.eps,
                                    hyper.lr * hyper.weight_decay,
                                    unscale,
                                    {hyper.seed, static_cast<std::uint32_t>(step)}};
  return {scalars, scalars.to<float>(), hyper.max_grad_norm};
}

}  // namespace adamw_ext
