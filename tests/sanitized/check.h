// What all checks share: how they fail and count, random numbers, and memory that ends where a tensor ends.
#pragma once

#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/dtypes.h"
#include "core/hyper.h"

namespace adamw_ext::sanitized {

// Ends the process with status 1 and says what.
[[noreturn]] void fail(const std::string& what);

template <class What>
void require(bool holds, const What& what) {
  if (!holds) fail(what);
}

// One more case of this kind was checked.
void count(const std::string& kind);

// What is seeded to show that a fault is noticed.
enum class Fault { none, short_memory, misaligned_memory, another_bit, short_norm };
extern Fault fault;

void check_updates();
void check_huge_tensor();
void check_advances();
void check_norms();
void check_huge_norm();
void check_packing();
void print_capacities();

using Random = std::mt19937_64;

inline std::int64_t below(Random& random, std::int64_t bound) { return static_cast<std::int64_t>(random() % bound); }

template <class Choices>
auto one_of(Random& random, const Choices& choices) {
  return choices[below(random, static_cast<std::int64_t>(std::size(choices)))];
}

// Magnitudes from 2**-12 to 2**12; one in 16 is zero, denormal, huge, infinite or NaN.
inline double any_number(Random& random) {
  static const double specials[] = {0.0,  -0.0,  1e-45,    -1e-40,    1e-30,
                                    1e30, -3e38, INFINITY, -INFINITY, std::numeric_limits<double>::quiet_NaN()};
  if (below(random, 16) == 0) return one_of(random, specials);
  const double magnitude = std::ldexp(1.0 + static_cast<double>(random() >> 12) * 0x1p-52, 12 - below(random, 25));
  return below(random, 2) == 0 ? magnitude : -magnitude;
}

// Calls visit with a null pointer to the dtype's storage type.
template <class Visit>
auto visit_storage(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::float64:
      return visit(static_cast<storage::float64*>(nullptr));
    case DType::float32:
      return visit(static_cast<storage::float32*>(nullptr));
    case DType::bfloat16:
      return visit(static_cast<storage::bfloat16*>(nullptr));
    default:
      return visit(static_cast<storage::float16*>(nullptr));
  }
}

// Numbers of one dtype in a heap block that ends where they end, so that AddressSanitizer sees an access behind them.
// They begin `offset` bytes behind a multiple of 16. What lies before them is poisoned but for the last few bytes,
// which must keep their pattern. holds_words: they are words of the dtype's size instead, of which none is a NaN.
class Memory {
 public:
  Memory(DType dtype, std::int64_t numel, std::size_t offset, bool holds_words = false)
      : dtype_(dtype),
        holds_words_(holds_words),
        numel_(numel),
        front_(margin + offset),
        bytes_(numel * size_of(dtype)) {
    allocate();
  }
  Memory(const Memory& other)
      : dtype_(other.dtype_),
        holds_words_(other.holds_words_),
        numel_(other.numel_),
        front_(other.front_),
        bytes_(other.bytes_) {
    allocate();
    std::memcpy(data(), other.data(), bytes_);
  }
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    ASAN_UNPOISON_MEMORY_REGION(block_, front_);
    std::free(block_);
  }

  void* data() const { return block_ + front_; }
  DType dtype() const { return dtype_; }
  std::int64_t numel() const { return numel_; }

  void set(std::int64_t index, double value) {
    visit_storage(dtype_, [&](auto* null) {
      using Storage = std::remove_pointer_t<decltype(null)>;
      store(static_cast<Storage*>(data())[index], static_cast<decltype(load(Storage{}))>(value));
    });
  }

  void set_word(std::int64_t index, std::uint64_t word) {
    std::memcpy(static_cast<char*>(data()) + index * size_of(dtype_), &word, size_of(dtype_));
  }

  // Whether all numbers have the same bits, a NaN being equal to any NaN.
  bool same(const Memory& other) const {
    if (holds_words_) return std::memcmp(data(), other.data(), bytes_) == 0;
    return visit_storage(dtype_, [&](auto* null) {
      const auto* a = static_cast<decltype(null)>(data());
      const auto* b = static_cast<decltype(null)>(other.data());
      for (std::int64_t i = 0; i < numel_; ++i) {
        if (std::memcmp(a + i, b + i, sizeof(*a)) == 0) continue;
        if (load(a[i]) == load(a[i]) || load(b[i]) == load(b[i])) return false;
      }
      return true;
    });
  }

  bool front_is_whole() const {
    for (std::size_t i = front_ / 8 * 8; i < front_; ++i) {
      if (block_[i] != pattern) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t margin = 16;
  static constexpr unsigned char pattern = 0xa5;

  void allocate() {
    void* block = nullptr;
    require(posix_memalign(&block, 16, front_ + bytes_) == 0, "memory");
    block_ = static_cast<unsigned char*>(block);
    std::memset(block_, pattern, front_);
    ASAN_POISON_MEMORY_REGION(block_, front_ / 8 * 8);
  }

  DType dtype_;
  bool holds_words_;
  std::int64_t numel_;
  std::size_t front_, bytes_;
  unsigned char* block_;
};

inline Hyper any_hyper(Random& random) {
  return {one_of(random, std::vector{0.0, 1e-3, 0.1}),
          one_of(random, std::vector{0.0, 0.3, 0.499, 0.5, 0.9}),
          one_of(random, std::vector{0.0, 0.5, 0.99, 0.9999}),
          one_of(random, std::vector{0.0, 1e-8, 1e-3}),
          one_of(random, std::vector{0.0, 0.01, 0.7}),
          one_of(random, std::vector{no_max_grad_norm, 0.0, 0.3, 1e9}),
          random()};
}

}  // namespace adamw_ext::sanitized
