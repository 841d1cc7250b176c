// What every processor of the architecture runs: SSE2 on x86-64, NEON on ARM.
#include "../core/rounding.h"
#include "../core/update.h"
#include "kernels.h"

#if defined(__AVX__)
#error "the baseline must run on every x86-64: remove -march and -mavx options from CFLAGS and CXXFLAGS"
#endif

namespace adamw_ext::cpu::baseline {
#include "kernels_body.inc"
}  // namespace adamw_ext::cpu::baseline
