#include "../core/rounding.h"
#include "../core/update.h"
#include "kernels.h"

#if ADAMW_EXT_X86_LEVELS
#include <immintrin.h>
#pragma GCC target("avx2")
namespace adamw_ext::cpu::avx2 {

using Lanes = std::uint64_t __attribute__((vector_size(32)));

ADAMW_EXT_INLINE void multiply_low_halves(Lanes& numbers, std::uint32_t factor) {
  const __m256i factors = _mm256_set1_epi64x(factor);
  numbers = reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(numbers), factors));
}

#include "kernels_body.inc"
}  // namespace adamw_ext::cpu::avx2
#endif
