// How a float becomes 16 bits otherwise than by rounding to nearest even: split into a bfloat16 and a remainder, or
// rounded at random.
//
// Everything is integer arithmetic without a branch on 16-bit halves, held in the low half of a word.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "portable.h"

namespace adamw_ext {

// A float32 as the bfloat16 nearest to it (ties away from zero) and the float's low 16 bits, a signed remainder. The
// layout is apex's and TransformerEngine's. Every NaN becomes the quiet one of its sign: an increment could carry the
// largest NaNs into zero.
struct SplitFloat {
  std::uint32_t high;
  std::uint32_t low;
};

ADAMW_EXT_HD ADAMW_EXT_INLINE SplitFloat split(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t nan = (bits & 0x80000000u) | 0x7fc00000u;
  const std::uint32_t kept = value == value ? bits : nan;
  return {(kept + 0x8000u) >> 16, kept & 0xffffu};
}

// The float again. Where someone has written another bfloat16 beside the remainder, the result still rounds to that
// one: a remainder that no float with this high half has (below zero's magnitude, above infinity) counts as none.
ADAMW_EXT_HD ADAMW_EXT_INLINE float join(std::uint32_t high, std::uint32_t low) {
  const std::uint32_t magnitude = high & 0x7fffu;
  const std::uint32_t borrow = low >> 15;
  const bool is_impossible = magnitude == (borrow != 0 ? 0u : 0x7f80u);
  const std::uint32_t remainder = is_impossible ? 0u : low;
  return bit_cast<float>(((high - (remainder >> 15)) << 16) | remainder);
}

// The bfloat16 above or below value, by chance in proportion to nearness, so that the mean is the value. random: 16
// bits. What a bfloat16 holds exactly stays, infinities too; a NaN is quiet, as codec<bfloat16>::encode says.
ADAMW_EXT_HD ADAMW_EXT_INLINE std::uint32_t round_at_random(float value, std::uint32_t random) {
  return (bit_cast<std::uint32_t>(value) + (value == value ? random : 0u)) >> 16;
}

// What a param shows of its float32 master: the nearest value. As split for bfloat16, so that both ways of keeping a
// master show the same.
template <class Half>
ADAMW_EXT_HD ADAMW_EXT_INLINE std::uint32_t show_master(float master) {
  return codec<Half>::encode(master);
}
template <>
ADAMW_EXT_HD ADAMW_EXT_INLINE std::uint32_t show_master<bfloat16>(float master) {
  return split(master).high;
}

// The master that a step starts from. It is the stored one unless someone has written another value into the param:
// then the param counts, for bfloat16 with the master's low bits as remainder, exactly as with a split master.
template <class Half>
ADAMW_EXT_HD ADAMW_EXT_INLINE float recall_master(float stored, std::uint32_t param) {
  const std::uint32_t written = bit_cast<std::uint32_t>(codec<Half>::decode(param));
  const std::uint32_t is_unwritten = codec<Half>::encode(stored) == param ? ~0u : 0u;
  return bit_cast<float>((bit_cast<std::uint32_t>(stored) & is_unwritten) | (written & ~is_unwritten));
}
template <>
ADAMW_EXT_HD ADAMW_EXT_INLINE float recall_master<bfloat16>(float stored, std::uint32_t param) {
  return join(param, bit_cast<std::uint32_t>(stored) & 0xffffu);
}

// A param with a master, as a combination stores it.
template <class C>
struct Kept {
  std::uint32_t shown;  // the param's bits
  typename C::MasterStorage stored;
};

template <class C>
ADAMW_EXT_HD ADAMW_EXT_INLINE Kept<C> keep(float master) {
  if constexpr (C::master == Master::remainder) {
    const SplitFloat halves = split(master);
    return {halves.high, static_cast<std::uint16_t>(halves.low)};
  } else {
    return {show_master<typename C::Param>(master), master};
  }
}

template <class C>
ADAMW_EXT_HD ADAMW_EXT_INLINE float recall(const Kept<C>& kept) {
  if constexpr (C::master == Master::remainder) {
    return join(kept.shown, kept.stored);
  } else {
    return recall_master<typename C::Param>(kept.stored, kept.shown);
  }
}

}  // namespace adamw_ext
