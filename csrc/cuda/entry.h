// The entries of a tensor table as they travel to a kernel: what it needs and no more, so that many fit in a launch.
#pragma once

#include <cstdint>

#include "../core/table.h"

namespace adamw_ext::cuda {

// For the update kernel of one combination. Three numbers travel only where they are needed.
template <class C, bool amsgrad>
struct UpdateEntry {
  static constexpr int extras = amsgrad + C::has_master + C::is_stochastic;

  void* param;
  void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  std::uint64_t numel : 48;
  std::uint64_t places : 8;  // index into those of the launch, plus 1; 0: none
  std::uint64_t grad_dtype : 8;
  std::uint32_t first_unit;  // in this launch
  std::int32_t scalars;
  std::uint64_t extra[extras > 0 ? extras : 1];

  ADAMW_EXT_HD DType grad_type() const { return static_cast<DType>(grad_dtype); }
  ADAMW_EXT_HD void* max_exp_avg_sq() const { return reinterpret_cast<void*>(extra[0]); }
  ADAMW_EXT_HD void* master() const { return reinterpret_cast<void*>(extra[amsgrad ? 1 : 0]); }
  ADAMW_EXT_HD std::uint64_t element_number() const { return extra[amsgrad + C::has_master]; }

  static UpdateEntry of(const TensorEntry& entry, std::uint32_t first_unit, int places) {
    UpdateEntry packed{entry.param,
                       entry.grad,
                       entry.exp_avg,
                       entry.exp_avg_sq,
                       static_cast<std::uint64_t>(entry.numel),
                       static_cast<std::uint64_t>(places),
                       static_cast<std::uint64_t>(entry.grad_dtype),
                       first_unit,
                       entry.scalars,
                       {}};
    std::uint64_t* extra = packed.extra;
    if (amsgrad) *extra++ = reinterpret_cast<std::uint64_t>(entry.max_exp_avg_sq);
    if (C::has_master) *extra++ = reinterpret_cast<std::uint64_t>(entry.master);
    if (C::is_stochastic) *extra++ = entry.element_number;
    return packed;
  }
};

// For the norm kernel.
struct NormEntry {
  void* grad;
  std::uint64_t numel : 56;
  std::uint64_t grad_dtype : 8;
  std::int64_t first_piece;  // in the whole table
};

}  // namespace adamw_ext::cuda
