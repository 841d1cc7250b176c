// Markers that let one text compile for the host, for every instruction set of the host, and for CUDA devices.
//
// Promises: no includes, no types, nothing that depends on who compiles it.
#pragma once

#if defined(__CUDACC__)
#define ADAMW_EXT_HD __host__ __device__
#else
#define ADAMW_EXT_HD
#endif

// Kernel code must be inlined into the loop that was compiled for an instruction set. An out-of-line copy would be
// merged by the linker with the copies of other instruction sets, and a baseline machine could run AVX-512 code.
#define ADAMW_EXT_INLINE inline __attribute__((always_inline))

// The iterations of the next loop touch different elements.
#if defined(__clang__)
#define ADAMW_EXT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define ADAMW_EXT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#else
#define ADAMW_EXT_INDEPENDENT_ITERATIONS
#endif

// On a GPU, the next loop is to become straight code, so that arrays indexed by its counter stay in registers; or is to
// stay a loop.
#if defined(__CUDACC__)
#define ADAMW_EXT_UNROLL _Pragma("unroll")
#define ADAMW_EXT_NO_UNROLL _Pragma("unroll 1")
#else
#define ADAMW_EXT_UNROLL
#define ADAMW_EXT_NO_UNROLL
#endif
