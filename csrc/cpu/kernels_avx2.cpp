#include "../core/rounding.h"
#include "../core/update.h"
#include "kernels.h"

#if ADAMW_EXT_X86_LEVELS
#pragma GCC target("avx2")
namespace adamw_ext::cpu::avx2 {
#include "kernels_body.inc"
}  // namespace adamw_ext::cpu::avx2
#endif
