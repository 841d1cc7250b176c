// Random bits without a state: a function of seed, step and element, the same wherever and whenever it is called.
#pragma once

#include <cstdint>

#include "portable.h"

namespace adamw_ext {

// One (seed, step).
struct RandomKey {
  std::uint64_t seed;
  std::uint32_t step;
};

// The bits of two neighbours: words 0 and 1 belong to the even element, 2 and 3 to the odd one.
struct RandomBlock {
  std::uint32_t words[4];
};

constexpr int elements_per_block = 2;

// An element's number among all elements of an optimizer: that of its param, and its place in the whole param, also
// where a process holds only a part of it. Neither may be larger than the other's bits leave.
constexpr int element_bits = 40;
constexpr std::uint64_t element_number(std::uint64_t param, std::uint64_t element) {
  return (param << element_bits) | element;
}

namespace one_block {

ADAMW_EXT_HD ADAMW_EXT_INLINE void multiply_low_halves(std::uint64_t& number, std::uint32_t factor) {
  number = (number & 0xffffffffu) * factor;
}

#include "philox.inc"

}  // namespace one_block

ADAMW_EXT_HD ADAMW_EXT_INLINE RandomBlock random_block(const RandomKey& key, std::uint64_t block) {
  std::uint64_t words[4];
  one_block::philox(key, block, words);
  return {{static_cast<std::uint32_t>(words[0]), static_cast<std::uint32_t>(words[1]),
           static_cast<std::uint32_t>(words[2]), static_cast<std::uint32_t>(words[3])}};
}

// Where the elements of a part of a tensor are in the whole: runs of `run` neighbours, from one to the next `stride`
// elements; `rows` runs make a block, from one to the next `block_stride` elements. A part that is cut out of the inner
// dimensions of a tensor, in memory order.
struct Places {
  std::uint32_t run;   // at least 1
  std::uint32_t rows;  // at least 1
  std::uint64_t stride;
  std::uint64_t block_stride;

  bool operator==(const Places& other) const {
    return run == other.run && rows == other.rows && stride == other.stride && block_stride == other.block_stride;
  }

  // The place of the part's element `index`, counted from that of its first element.
  ADAMW_EXT_HD ADAMW_EXT_INLINE std::uint64_t of(std::uint64_t index) const {
    const std::uint64_t row = index / run;
    return row / rows * block_stride + row % rows * stride + index % run;
  }
};

// An element's two words as what its numbers are rounded with: 16 bits each.
struct RandomBits {
  std::uint32_t param;
  std::uint32_t exp_avg;
  std::uint32_t exp_avg_sq;
  std::uint32_t max_exp_avg_sq;
};

ADAMW_EXT_HD ADAMW_EXT_INLINE RandomBits random_bits(std::uint32_t first, std::uint32_t second) {
  return {first & 0xffffu, first >> 16, second & 0xffffu, second >> 16};
}

}  // namespace adamw_ext
