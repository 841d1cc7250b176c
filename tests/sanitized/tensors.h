// The memory of a tensor table: every tensor of every entry a heap block of its own.
#pragma once

#include <array>

#include "check.h"
#include "core/table.h"

namespace adamw_ext::sanitized {

constexpr int pointer_count = 5;  // param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq

#define ADAMW_EXT_DTYPES(index, param, moments) {DType::param, DType::moments},
constexpr DType dtypes[combination_count][2] = {ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_DTYPES)};
#undef ADAMW_EXT_DTYPES

struct Shape {
  int combination;
  bool amsgrad;
  std::int64_t numel;
  std::int32_t scalars = 0;
  std::array<int, pointer_count> offsets{};  // in elements, behind a multiple of 16 bytes
  int other_grad = 0;                        // which of the param's other gradient types; 0: its own

  DType dtype(int pointer) const { return pointer == 1 ? grad_dtype() : dtypes[combination][pointer >= 2]; }

  DType grad_dtype() const {
    constexpr int shorter_types = dtype_count - 1;
    const int own = static_cast<int>(dtypes[combination][0]);
    return own == 0 ? DType::float64 : static_cast<DType>(1 + (own - 1 + other_grad) % shorter_types);
  }
};

// One copy of it. The shapes must outlive it.
class Tensors {
 public:
  Tensors(const std::vector<Shape>& shapes, Random& random) : shapes_(shapes) {
    memory_.reserve(shapes.size() * pointer_count);
    for (const Shape& shape : shapes) {
      for (int pointer = 0; pointer < pointer_count; ++pointer) {
        const DType dtype = shape.dtype(pointer);
        memory_.emplace_back(dtype, shape.numel, shape.offsets[pointer] * size_of(dtype));
        for (std::int64_t i = 0; i < shape.numel; ++i) {
          const double number = any_number(random);
          memory_.back().set(i, pointer >= 3 ? number * number : number);
        }
      }
    }
  }

  // Units are not laid out.
  std::vector<TensorEntry> entries() const {
    std::vector<TensorEntry> entries;
    entries.reserve(shapes_.size());  // and no more: AddressSanitizer shall see an access behind them
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      const Shape& shape = shapes_[i];
      const Memory* memory = &memory_[i * pointer_count];
      entries.push_back({memory[0].data(), memory[1].data(), memory[2].data(), memory[3].data(),
                         shape.amsgrad ? memory[4].data() : nullptr, shape.numel, /*first_unit=*/-1, shape.scalars,
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
  const std::vector<Shape>& shapes_;
  std::vector<Memory> memory_;
};

}  // namespace adamw_ext::sanitized
