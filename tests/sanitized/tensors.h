// The memory of a tensor table: every tensor of every entry a heap block of its own.
#pragma once

#include <array>

#include "check.h"
#include "core/random.h"
#include "core/table.h"

namespace adamw_ext::sanitized {

constexpr int pointer_count = 6;  // param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master

struct Kind {
  DType param;
  DType moments;
  Master master;
  Rounding rounding;
};

#define ADAMW_EXT_KIND(index, param, moments, master, rounding) \
  {DType::param, DType::moments, Master::master, Rounding::rounding},
constexpr Kind kinds[combination_count] = {ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_KIND)};
#undef ADAMW_EXT_KIND

using Offsets = std::array<int, pointer_count>;  // in elements, behind a multiple of 16 bytes

inline Offsets all_at(int offset) {
  Offsets offsets;
  offsets.fill(offset);
  return offsets;
}

struct Shape {
  int combination;
  bool amsgrad;
  std::int64_t numel;
  std::int32_t scalars = 0;
  Offsets offsets{};
  int other_grad = 0;  // which of the param's other gradient types; 0: its own
  std::uint64_t element_number = 0;
  const Places* places = nullptr;

  const Kind& kind() const { return kinds[combination]; }

  DType dtype(int pointer) const {
    if (pointer == 0) return kind().param;
    if (pointer == 1) return grad_dtype();
    if (pointer < 5) return kind().moments;
    return kind().master == Master::float32 ? DType::float32 : DType::bfloat16;  // or a remainder of its size
  }

  DType grad_dtype() const {
    constexpr int shorter_types = dtype_count - 1;
    const int own = static_cast<int>(kind().param);
    return own == 0 ? DType::float64 : static_cast<DType>(1 + (own - 1 + other_grad) % shorter_types);
  }

  bool has(int pointer) const { return pointer < 4 || (pointer == 4 ? amsgrad : kind().master != Master::none); }
};

// One copy of it. The shapes must outlive it.
class Tensors {
 public:
  Tensors(const std::vector<Shape>& shapes, Random& random) : shapes_(shapes) {
    memory_.reserve(shapes.size() * pointer_count);
    for (const Shape& shape : shapes) {
      for (int pointer = 0; pointer < pointer_count; ++pointer) {
        const DType dtype = shape.dtype(pointer);
        const bool is_remainder = pointer == 5 && shape.kind().master == Master::remainder;
        memory_.emplace_back(dtype, shape.has(pointer) ? shape.numel : 0, shape.offsets[pointer] * size_of(dtype),
                             is_remainder);
        if (pointer < 5) fill(memory_.back(), pointer, random);
      }
      fill_master(shape, memory_[memory_.size() - pointer_count], memory_.back(), random);
    }
  }

  // Units and pieces are not laid out.
  std::vector<TensorEntry> entries() const {
    std::vector<TensorEntry> entries;
    entries.reserve(shapes_.size());  // and no more: AddressSanitizer shall see an access behind them
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      const Shape& shape = shapes_[i];
      const auto data = [&](int pointer) {
        return shape.has(pointer) ? memory_[i * pointer_count + pointer].data() : nullptr;
      };
      entries.push_back({data(0), data(1), data(2), data(3), data(4), data(5), shape.numel, /*first_unit=*/-1,
                         /*first_piece=*/-1, shape.element_number, shape.places, shape.scalars,
                         static_cast<std::uint8_t>(shape.combination), shape.grad_dtype(), shape.amsgrad});
    }
    return entries;
  }

  void require_same(const Tensors& expected, const std::string& what) const {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      const auto where = [&] { return what + ", tensor " + std::to_string(i / pointer_count); };
      if (!memory_[i].same(expected.memory_[i])) fail(where() + ": another bit than the CPU kernel's");
      if (!memory_[i].front_is_whole()) fail(where() + ": a write before the tensor");
    }
  }

 private:
  static void fill(Memory& memory, int pointer, Random& random) {
    for (std::int64_t i = 0; i < memory.numel(); ++i) {
      const double number = any_number(random);
      memory.set(i, pointer >= 3 ? number * number : number);
    }
  }

  // Most params show their float32 master; some have been written to. Remainders are any words.
  static void fill_master(const Shape& shape, Memory& param, Memory& master, Random& random) {
    for (std::int64_t i = 0; i < master.numel(); ++i) {
      if (shape.kind().master == Master::remainder) {
        master.set_word(i, random());
        continue;
      }
      const float number = static_cast<float>(any_number(random));
      master.set(i, number);
      if (below(random, 4) != 0) param.set(i, number);
    }
  }

  const std::vector<Shape>& shapes_;
  std::vector<Memory> memory_;
};

}  // namespace adamw_ext::sanitized
