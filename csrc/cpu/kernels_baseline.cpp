// What every processor of the architecture runs: SSE2 on x86-64, NEON on ARM.
#include "../core/rounding.h"
#include "../core/update.h"
#include "kernels.h"

#if defined(__AVX__)
#error "the baseline must run on every x86-64: remove -march and -mavx options from CFLAGS and CXXFLAGS"
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace adamw_ext::cpu::baseline {

using Lanes = std::uint64_t __attribute__((vector_size(16)));

ADAMW_EXT_INLINE void multiply_low_halves(Lanes& numbers, std::uint32_t factor) {
#if defined(__SSE2__)
  numbers = reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(numbers), _mm_set1_epi64x(factor)));
#else
  numbers = (numbers & 0xffffffffu) * factor;
#endif
}

#include "kernels_body.inc"
}  // namespace adamw_ext::cpu::baseline
