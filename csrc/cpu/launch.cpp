#include "launch.h"

#include <algorithm>
#include <atomic>
#include <cfenv>

#include "fork_join.h"
#include "forks.h"
#include "kernels.h"

namespace adamw_ext::cpu {
namespace {

constexpr std::int64_t min_units_per_chunk = 32;   // 2,048 elements: a few microseconds of work
constexpr std::int64_t max_units_per_chunk = 256;  // 16,384 elements: enough chunks for threads to even out
constexpr std::int64_t chunks_per_thread = 8;

// Shorter steps stay on the calling thread: waking others, and waiting for one that the system holds up, can take
// far longer than these 131,072 elements.
constexpr std::int64_t min_parallel_units = 2048;

std::int64_t choose_units_per_chunk(const Table& table, const LaunchOptions& options) {
  if (options.units_per_chunk > 0) return options.units_per_chunk;
  return std::clamp(table.unit_count / (options.threads * chunks_per_thread), min_units_per_chunk, max_units_per_chunk);
}

struct Sizes {
  DType param;
  int param_size;
  int moment_size;
  int master_size;
  bool is_stochastic;
};

template <class C>
constexpr Sizes sizes_of(DType param) {
  return {param, sizeof(typename C::Param), sizeof(typename C::Moment), sizeof(typename C::MasterStorage),
          C::is_stochastic};
}

constexpr Sizes sizes[combination_count] = {
#define ADAMW_EXT_SIZES(index, param, ...) sizes_of<ADAMW_EXT_COMBINATION(param, __VA_ARGS__)>(DType::param),
    ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_SIZES)
#undef ADAMW_EXT_SIZES
};

// The same entry from element `begin` on.
TensorEntry advanced(const TensorEntry& entry, std::int64_t begin) {
  const Sizes& size = sizes[entry.combination];
  const auto from = [&](void* pointer, std::int64_t bytes) -> void* {
    return pointer == nullptr ? nullptr : static_cast<char*>(pointer) + begin * bytes;
  };
  TensorEntry rest = entry;
  rest.param = from(entry.param, size.param_size);
  rest.grad = from(entry.grad, size_of(entry.grad_dtype));
  rest.exp_avg = from(entry.exp_avg, size.moment_size);
  rest.exp_avg_sq = from(entry.exp_avg_sq, size.moment_size);
  rest.max_exp_avg_sq = from(entry.max_exp_avg_sq, size.moment_size);
  rest.master = from(entry.master, size.master_size);
  return rest;
}

// What an update needs beside the tensors, made piece by piece in the first-level cache.
class Piece {
 public:
  static constexpr std::int64_t elements = 1024;

  // The gradient as floats.
  float* widen(const KernelSet& kernels, const TensorEntry& entry, std::int64_t count) {
    kernels.widen[static_cast<int>(entry.grad_dtype)](entry, grad_, 0, count);
    return grad_;
  }

  // The words of elements [begin, begin + count) of an entry.
  RandomWords fill(const KernelSet& kernels, const TensorEntry& entry, std::int64_t begin, std::int64_t count,
                   const RandomKey& key) {
    if (entry.places == nullptr) return fill_run(kernels, entry.element_number + begin, count, key);
    const std::int64_t run = entry.places->run;
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t length = std::min(run - (begin + done) % run, count - done);
      const std::uint64_t number = entry.element_number + entry.places->of(begin + done);
      const RandomWords words = fill_run(kernels, number, length, key);
      std::copy_n(words.first, length, gathered_first_ + done);
      std::copy_n(words.second, length, gathered_second_ + done);
      done += length;
    }
    return {gathered_first_, gathered_second_};
  }

 private:
  RandomWords fill_run(const KernelSet& kernels, std::uint64_t number, std::int64_t count, const RandomKey& key) {
    const std::uint64_t first = number / elements_per_block;
    const std::uint64_t last = (number + static_cast<std::uint64_t>(count) - 1) / elements_per_block;
    kernels.fill_random_words(key, first, static_cast<std::int64_t>(last - first + 1), first_words_, second_words_);
    const std::uint64_t skipped = number % elements_per_block;
    return {first_words_ + skipped, second_words_ + skipped};
  }

  // A run may begin with a block's second element.
  static constexpr std::int64_t words = elements + elements_per_block * random_block_multiple;
  static_assert(elements % (elements_per_block * random_block_multiple) == 0);

  alignas(64) float grad_[elements];
  alignas(64) std::uint32_t first_words_[words];
  alignas(64) std::uint32_t second_words_[words];
  std::uint32_t gathered_first_[elements];
  std::uint32_t gathered_second_[elements];
};

// Updates elements [begin, end) with a gradient of any type. Loops exist for float gradients and for those of the
// param's own type; other gradients are widened.
void update(const KernelSet& kernels, const TensorEntry& entry, const Scalars& scalars, std::int64_t begin,
            std::int64_t end) {
  const Sizes& size = sizes[entry.combination];
  const UpdateKernel own = kernels.update[entry.combination][entry.amsgrad];
  const UpdateKernel wide = kernels.update_wide[entry.combination][entry.amsgrad];
  if (own != nullptr && entry.grad_dtype == size.param) return own(entry, scalars, {}, begin, end);
  const bool is_wide = size_of(entry.grad_dtype) > 2;
  if (is_wide && !size.is_stochastic) return wide(entry, scalars, {}, begin, end);
  Piece piece;
  for (; begin < end; begin += Piece::elements) {
    const std::int64_t count = std::min(Piece::elements, end - begin);
    TensorEntry rest = advanced(entry, begin);
    if (!is_wide) rest.grad = piece.widen(kernels, rest, count);
    RandomWords random{};
    if (size.is_stochastic) random = piece.fill(kernels, entry, begin, count, scalars.in_float.random);
    wide(rest, scalars, random, 0, count);
  }
}

int threads_for(const Table& table, const LaunchOptions& options, std::int64_t tasks) {
  // An OpenMP runtime whose threads were lost in a fork never returns from its next parallel region.
  if (table.unit_count < min_parallel_units || forks > 0) return 1;
  return static_cast<int>(std::min<std::int64_t>(options.threads, tasks));
}

// Threads have floating point environments of their own. All of them compute in the caller's, so that its
// torch.set_flush_denormal and its rounding hold for every element or for none.
class CallersArithmetic {
 public:
  explicit CallersArithmetic(const std::fenv_t& callers) {
    std::fegetenv(&own_);
    std::fesetenv(&callers);
  }
  ~CallersArithmetic() { std::fesetenv(&own_); }

 private:
  std::fenv_t own_;
};

// Calls task(i) for each i below `tasks`, once. Threads take the next one when they are done with one, so a thread
// that the system holds up delays one task.
template <class Task>
void share_out(std::int64_t tasks, int threads, const Task& task) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
  };
  if (threads <= 1) return work();
  std::fenv_t callers;
  std::fegetenv(&callers);
  fork_join(threads, [&] {
    const CallersArithmetic same(callers);
    work();
  });
}

}  // namespace

void launch(const Table& table, const LaunchOptions& options) noexcept {
  const KernelSet& kernels = kernels_of(options.isa);
  const std::int64_t units_per_chunk = choose_units_per_chunk(table, options);
  const std::int64_t chunks = (table.unit_count + units_per_chunk - 1) / units_per_chunk;
  const auto update_segment = [&](const TensorEntry& entry, std::int64_t begin, std::int64_t end) {
    update(kernels, entry, table.scalars[entry.scalars], begin, end);
    const int grad = static_cast<int>(entry.grad_dtype);
    if (options.unscale != 1.0) kernels.unscale[grad](entry, options.unscale, begin, end);
  };
  share_out(chunks, threads_for(table, options, chunks), [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * units_per_chunk;
    const std::int64_t end = std::min(begin + units_per_chunk, table.unit_count);
    for_each_segment(table.entries, table.entry_count, begin, end, update_segment);
  });
}

double sum_squares(const Table& table, const LaunchOptions& options, double* sums) noexcept {
  const KernelSet& kernels = kernels_of(options.isa);
  constexpr std::int64_t pieces_per_task = 8;
  const std::int64_t tasks = (table.piece_count + pieces_per_task - 1) / pieces_per_task;
  const auto sum_piece = [&](const TensorEntry& entry, std::int64_t begin, std::int64_t end) {
    alignas(64) double accumulators[piece_width] = {};
    const void* grad = static_cast<const char*>(entry.grad) + begin * size_of(entry.grad_dtype);
    kernels.add_squares[static_cast<int>(entry.grad_dtype)](grad, end - begin, accumulators);
    for (int half = piece_width / 2; half > 0; half /= 2) fold(accumulators, half, 0, 1);
    return accumulators[0];
  };
  share_out(tasks, threads_for(table, options, tasks), [&](std::int64_t task) {
    const std::int64_t end = std::min((task + 1) * pieces_per_task, table.piece_count);
    for (std::int64_t piece = task * pieces_per_task; piece < end; ++piece) {
      visit_piece(table.entries, table.entry_count, piece,
                  [&](const TensorEntry& entry, std::int64_t from, std::int64_t to) {
                    sums[piece] = sum_piece(entry, from, to);
                  });
    }
  });
  return add_up(sums, table.piece_count);
}

}  // namespace adamw_ext::cpu
