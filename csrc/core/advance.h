// One step forward: counts the update of a param, and makes the scalars of it, from numbers that lie in memory.
//
// This is the capturable branch: the host decides nothing, so the same call can be replayed. On CUDA one thread does
// it for one param, on the CPU a loop; whoever calls it has checked every pointer. Where found_inf says that the step
// is skipped, nothing may be advanced.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "hyper.h"
#include "norm.h"
#include "portable.h"

namespace adamw_ext {

// One floating point number in memory; a null address stands for none.
struct NumberPointer {
  const void* address;
  DType dtype;

  ADAMW_EXT_HD double read() const {
    switch (dtype) {
      case DType::float64:
        return load(*static_cast<const double*>(address));
      case DType::float32:
        return load(*static_cast<const float*>(address));
      case DType::bfloat16:
        return load(*static_cast<const bfloat16*>(address));
      default:
        return load(*static_cast<const float16*>(address));
    }
  }
};

// Where one param group's hyperparameters are found.
struct HyperSource {
  Hyper values;
  const Hyper* mirror;  // null, or memory that holds them instead of `values`
  NumberPointer lr;     // each of these, where not null, takes precedence over either
  NumberPointer beta1;
  NumberPointer beta2;
  bool maximize;

  ADAMW_EXT_HD Hyper read() const {
    Hyper hyper = mirror != nullptr ? *mirror : values;
    if (lr.address != nullptr) hyper.lr = lr.read();
    if (beta1.address != nullptr) hyper.beta1 = beta1.read();
    if (beta2.address != nullptr) hyper.beta2 = beta2.read();
    return hyper;
  }
};

// One param that a step advances.
struct StepEntry {
  float* step;  // updates made
  std::int32_t source;
  std::int32_t scalars;  // which of the scalars are its own
};

// A gradient scaler's numbers; null where there is none.
struct Scaling {
  const float* grad_scale;
  const float* found_inf;

  // Any number but 0, NaN too: it may be a sum over devices.
  ADAMW_EXT_HD bool skips() const { return found_inf != nullptr && *found_inf != 0.0f; }
  ADAMW_EXT_HD double unscale() const { return grad_scale != nullptr ? 1.0 / *grad_scale : 1.0; }
};

// The params that a step advances, and what they advance with. Where the host has counted there are no entries, but
// clipping all the same.
struct StepTable {
  const StepEntry* entries;
  std::int64_t entry_count;
  const HyperSource* sources;
  Scaling scaling;
  Scalars* scalars;
  std::int64_t* skipped;   // counts the steps that found_inf skips; null: nobody does
  double* sum_of_squares;  // of all unscaled gradients, where they are to be clipped, else null
};

// Counts the update and returns its scalars. A step that is no count (negative, NaN) shows as numbers that are not
// finite.
ADAMW_EXT_HD inline Scalars advance(float& step, const HyperSource& source, const Scaling& scaling,
                                    const double* sum_of_squares) {
  constexpr float largest_count = 9007199254740992.0f;  // 2**53
  const std::int64_t done = step >= 0.0f && step < largest_count ? static_cast<std::int64_t>(step) : -1;
  step += 1.0f;
  Scalars scalars = compute_scalars(source.read(), done + 1, scaling.unscale(), source.maximize);
  if (sum_of_squares != nullptr) clip(scalars, *sum_of_squares);
  return scalars;
}

}  // namespace adamw_ext
