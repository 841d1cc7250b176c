// Storage types, their load and store, and the one list of dtype combinations.
//
// `load` widens a stored value to the type that the arithmetic runs in (double for double, float for all others) and
// is exact. `store` rounds back to nearest, ties to even; NaN stays NaN, overflow becomes infinity. Both are plain
// integer and float operations without a branch, so that compilers vectorise them on every instruction set, and so
// that every processor, and every flush-to-zero setting, gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "portable.h"

namespace adamw_ext {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

// What the arithmetic runs in, for a parameter stored as Storage.
template <class Storage>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};

template <class To, class From>
ADAMW_EXT_HD ADAMW_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The 16 bits of a half-width type, as the low half of a word, to float and back. A NaN given to encode is the result
// of an operation and therefore quiet: its highest mantissa bit is set and survives truncation.
template <class Half>
struct codec;

template <>
struct codec<bfloat16> {
  static ADAMW_EXT_HD ADAMW_EXT_INLINE float decode(std::uint32_t half) { return bit_cast<float>(half << 16); }

  static ADAMW_EXT_HD ADAMW_EXT_INLINE std::uint32_t encode(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    const std::uint32_t rounding = 0x7fffu + ((bits >> 16) & 1u);
    return (bits + (value == value ? rounding : 0u)) >> 16;
  }
};

// float16 has 5 exponent bits with bias 15, float32 has 8 with bias 127, and 13 more bits of mantissa.
template <>
struct codec<float16> {
  static constexpr std::uint32_t rebias = 112u << 23;           // from bias 15 to bias 127
  static constexpr std::uint32_t smallest_normal = 113u << 23;  // 2**-14
  static constexpr std::uint32_t overflow = 143u << 23;         // 2**16
  static constexpr std::uint32_t infinity = 255u << 23;

  // Infinity and NaN are rebiased twice, to the largest exponent. Subnormals get an implicit one that the subtraction
  // takes away again, and the float unit normalises what is left.
  static ADAMW_EXT_HD ADAMW_EXT_INLINE float decode(std::uint32_t half) {
    constexpr std::uint32_t largest_exponent = 31u << 23;
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t magnitude = (half & 0x7fffu) << 13;
    const std::uint32_t normal = magnitude + (magnitude >= largest_exponent ? 2 * rebias : rebias);
    const float subnormal = bit_cast<float>(magnitude + smallest_normal) - bit_cast<float>(smallest_normal);
    return bit_cast<float>(sign | (magnitude < (1u << 23) ? bit_cast<std::uint32_t>(subnormal) : normal));
  }

  // Below the smallest normal float16, adding 0.5 (whose unit in the last place is float16's smallest subnormal)
  // makes the float unit round, and the low bits of the sum are the subnormal. Above, the integer addition rounds and
  // its carry steps the exponent, up to infinity.
  static ADAMW_EXT_HD ADAMW_EXT_INLINE std::uint32_t encode(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - rebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const std::uint32_t subnormal =
        bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<std::uint32_t>(0.5f);
    const std::uint32_t special = magnitude > infinity ? 0x7e00u : 0x7c00u;
    const std::uint32_t finite = magnitude < smallest_normal ? subnormal : normal;
    return sign | (magnitude >= overflow ? special : finite);
  }
};

ADAMW_EXT_HD ADAMW_EXT_INLINE double load(double stored) { return stored; }
ADAMW_EXT_HD ADAMW_EXT_INLINE float load(float stored) { return stored; }
template <class Half>
ADAMW_EXT_HD ADAMW_EXT_INLINE float load(Half stored) {
  return codec<Half>::decode(stored.bits);
}

ADAMW_EXT_HD ADAMW_EXT_INLINE void store(double& stored, double value) { stored = value; }
ADAMW_EXT_HD ADAMW_EXT_INLINE void store(float& stored, float value) { stored = value; }
template <class Half>
ADAMW_EXT_HD ADAMW_EXT_INLINE void store(Half& stored, float value) {
  stored.bits = static_cast<std::uint16_t>(codec<Half>::encode(value));
}

// The storage type of each DType, by the same name.
namespace storage {
using float64 = double;
using float32 = float;
using adamw_ext::bfloat16;
using adamw_ext::float16;
}  // namespace storage

enum class DType : std::uint8_t { float64, float32, bfloat16, float16 };

// Every storage type, in the order of DType.
#define ADAMW_EXT_FOR_EACH_DTYPE(X) X(float64) X(float32) X(bfloat16) X(float16)

constexpr int dtype_count = 4;

ADAMW_EXT_HD constexpr int size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// What a param's value is kept in: the param itself, a float32 beside it, or the 16 bits that a bfloat16 param lacks of
// a float32.
enum class Master : std::uint8_t { none, float32, remainder };

// How params (without a master) and moments in bfloat16 are rounded.
enum class Rounding : std::uint8_t { nearest, stochastic };

// Every supported combination, as X(index, type of the param, type of both moments, master, rounding). Instantiations,
// checks and messages are made from this list and nowhere else.
#define ADAMW_EXT_FOR_EACH_COMBINATION(X)        \
  X(0, float64, float64, none, nearest)          \
  X(1, float32, float32, none, nearest)          \
  X(2, float32, bfloat16, none, nearest)         \
  X(3, bfloat16, bfloat16, none, nearest)        \
  X(4, bfloat16, float32, none, nearest)         \
  X(5, float16, float16, none, nearest)          \
  X(6, float16, float32, none, nearest)          \
  X(7, float16, bfloat16, none, nearest)         \
  X(8, bfloat16, bfloat16, float32, nearest)     \
  X(9, bfloat16, float32, float32, nearest)      \
  X(10, float16, float16, float32, nearest)      \
  X(11, float16, float32, float32, nearest)      \
  X(12, float16, bfloat16, float32, nearest)     \
  X(13, bfloat16, bfloat16, remainder, nearest)  \
  X(14, bfloat16, float32, remainder, nearest)   \
  X(15, float32, bfloat16, none, stochastic)     \
  X(16, bfloat16, bfloat16, none, stochastic)    \
  X(17, bfloat16, float32, none, stochastic)     \
  X(18, bfloat16, bfloat16, float32, stochastic) \
  X(19, float16, bfloat16, float32, stochastic)  \
  X(20, bfloat16, bfloat16, remainder, stochastic)

constexpr int combination_count = 21;

// One combination as a type.
template <class ParamStorage, class MomentStorage, Master master_, Rounding rounding_>
struct Combination {
  using Param = ParamStorage;
  using Moment = MomentStorage;
  using T = typename compute_type<Param>::type;
  static constexpr Master master = master_;
  static constexpr bool has_master = master != Master::none;
  static constexpr bool is_stochastic = rounding_ == Rounding::stochastic;
  static constexpr bool rounds_param_at_random = is_stochastic && !has_master && sizeof(Param) == 2;
  static constexpr bool rounds_moments_at_random = is_stochastic && sizeof(Moment) == 2;
  using MasterStorage = typename std::conditional<master == Master::remainder, std::uint16_t, float>::type;
};

#define ADAMW_EXT_COMBINATION(param, moments, master, rounding) \
  Combination<storage::param, storage::moments, Master::master, Rounding::rounding>

// Which gradients a param may have: a float64 one float64, all others any of the shorter types.
constexpr bool takes_grad(DType param, DType grad) { return (param == DType::float64) == (grad == DType::float64); }

// The index of a combination in the list, or -1. Stochastic rounding asks for nothing where nothing has 16 bits.
inline int find_combination(DType param, DType moments, Master master, Rounding rounding) {
  const DType kept = master == Master::none ? param : DType::float32;
  if (size_of(kept) > 2 && size_of(moments) > 2) rounding = Rounding::nearest;
#define ADAMW_EXT_MATCH(index, param_type, moment_type, master_kind, rounding_kind)                   \
  if (param == DType::param_type && moments == DType::moment_type && master == Master::master_kind && \
      rounding == Rounding::rounding_kind) {                                                          \
    return index;                                                                                     \
  }
  ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_MATCH)
#undef ADAMW_EXT_MATCH
  return -1;
}

}  // namespace adamw_ext
