#include "../core/rounding.h"
#include "../core/update.h"
#include "kernels.h"

#if ADAMW_EXT_X86_LEVELS
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace adamw_ext::cpu::avx512 {
#include "kernels_body.inc"
}  // namespace adamw_ext::cpu::avx512
#endif
