// The loops over the elements of one chunk: one set per instruction set, all compiled from kernels_body.inc.
#pragma once

#include <cstdint>

#include "../core/dtypes.h"
#include "../core/table.h"
#include "isa.h"

// Levels beyond the baseline are built where the compiler can aim parts of a file at them, as Clang cannot.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADAMW_EXT_X86_LEVELS 1
#else
#define ADAMW_EXT_X86_LEVELS 0
#endif

namespace adamw_ext::cpu {

// The random words of elements, from an entry's first one on; null unless the combination rounds at random.
struct RandomWords {
  const std::uint32_t* first;
  const std::uint32_t* second;
};

// Updates elements [begin, end) of one entry.
using UpdateKernel = void (*)(const TensorEntry& entry, const Scalars& scalars, const RandomWords& random,
                              std::int64_t begin, std::int64_t end);

// Multiplies elements [begin, end) of one entry's gradient by `factor`, in place.
using UnscaleKernel = void (*)(const TensorEntry& entry, double factor, std::int64_t begin, std::int64_t end);

// Widens elements [begin, end) of one entry's 16-bit gradient to float, into wide[0] and on.
using WidenKernel = void (*)(const TensorEntry& entry, float* wide, std::int64_t begin, std::int64_t end);

// Writes the first and second words of the elements of `blocks` blocks, and of those after them up to a multiple of
// random_block_multiple blocks.
constexpr int random_block_multiple = 8;
using RandomKernel = void (*)(const RandomKey& key, std::uint64_t first_block, std::int64_t blocks,
                              std::uint32_t* first, std::uint32_t* second);

// Adds the squares of a piece's `count` elements to its accumulators.
using SquareKernel = void (*)(const void* grad, std::int64_t count, double* accumulators);

struct KernelSet {
  UpdateKernel update[combination_count][2];       // by combination and amsgrad; gradients of the param's type; or null
  UpdateKernel update_wide[combination_count][2];  // gradients of the type that the arithmetic runs in
  UnscaleKernel unscale[dtype_count];              // by the gradient's type
  WidenKernel widen[dtype_count];                  // null for types that need none
  RandomKernel fill_random_words;
  SquareKernel add_squares[dtype_count];  // by the gradient's type
};

namespace baseline {
extern const KernelSet kernels;
}
#if ADAMW_EXT_X86_LEVELS
namespace avx2 {
extern const KernelSet kernels;
}
namespace avx512 {
extern const KernelSet kernels;
}
#endif

inline const KernelSet& kernels_of(Isa isa) {
#if ADAMW_EXT_X86_LEVELS
  if (isa == Isa::avx2) return avx2::kernels;
  if (isa == Isa::avx512) return avx512::kernels;
#endif
  (void)isa;
  return baseline::kernels;
}

}  // namespace adamw_ext::cpu
