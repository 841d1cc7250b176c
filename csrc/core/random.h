// Random bits without a state: a function of seed, step and element, the same wherever and whenever it is called.
//
// Source: Philox4x32-7 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
// whose authors report that seven rounds pass all of TestU01's BigCrush.
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
constexpr int philox_rounds = 7;

// An element's number among all elements of an optimizer: that of its param, and its place in the whole param, also
// where a process holds only a part of it. Neither may be larger than the other's bits leave.
constexpr int element_bits = 40;
constexpr std::uint64_t element_number(std::uint64_t param, std::uint64_t element) {
  return (param << element_bits) | element;
}

ADAMW_EXT_HD ADAMW_EXT_INLINE RandomBlock random_block(const RandomKey& key, std::uint64_t block) {
  constexpr std::uint64_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  constexpr std::uint32_t increment0 = 0x9E3779B9u, increment1 = 0xBB67AE85u;
  std::uint32_t x0 = static_cast<std::uint32_t>(block), x1 = static_cast<std::uint32_t>(block >> 32);
  std::uint32_t x2 = key.step, x3 = 0;
  std::uint32_t key0 = static_cast<std::uint32_t>(key.seed), key1 = static_cast<std::uint32_t>(key.seed >> 32);
  ADAMW_EXT_UNROLL
  for (int round = 0; round < philox_rounds; ++round) {
    const std::uint64_t product0 = multiplier0 * x0, product1 = multiplier1 * x2;
    const std::uint32_t y0 = static_cast<std::uint32_t>(product1 >> 32) ^ x1 ^ key0;
    const std::uint32_t y2 = static_cast<std::uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x1 = static_cast<std::uint32_t>(product1);
    x3 = static_cast<std::uint32_t>(product0);
    x0 = y0;
    x2 = y2;
    key0 += increment0;
    key1 += increment1;
  }
  return {{x0, x1, x2, x3}};
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
