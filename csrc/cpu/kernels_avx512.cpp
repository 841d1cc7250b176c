#include "../core/rounding.h"
#include "../core/update.h"
#include "kernels.h"

#if ADAMW_EXT_X86_LEVELS
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace adamw_ext::cpu::avx512 {

using Lanes = std::uint64_t __attribute__((vector_size(64)));

ADAMW_EXT_INLINE void multiply_low_halves(Lanes& numbers, std::uint32_t factor) {
  const __m512i factors = _mm512_set1_epi64(factor);
  numbers = reinterpret_cast<Lanes>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(numbers), factors));
}

#include "kernels_body.inc"
}  // namespace adamw_ext::cpu::avx512
#endif
