#include "launch.h"

#include <algorithm>
#include <atomic>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

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

struct DTypes {
  DType param;
  std::size_t param_size;
  std::size_t moment_size;
};

constexpr DTypes dtypes_of[combination_count] = {
#define ADAMW_EXT_DTYPES(index, param, moment) {DType::param, sizeof(storage::param), sizeof(storage::moment)},
    ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_DTYPES)
#undef ADAMW_EXT_DTYPES
};

// The same entry from element `begin` on, with another gradient.
TensorEntry advanced(const TensorEntry& entry, std::int64_t begin, float* grad) {
  const auto [param, param_size, moment_size] = dtypes_of[entry.combination];
  const auto from = [&](void* pointer, std::size_t size) -> void* {
    return pointer == nullptr ? nullptr : static_cast<char*>(pointer) + begin * static_cast<std::int64_t>(size);
  };
  TensorEntry rest = entry;
  rest.param = from(entry.param, param_size);
  rest.grad = grad;
  rest.exp_avg = from(entry.exp_avg, moment_size);
  rest.exp_avg_sq = from(entry.exp_avg_sq, moment_size);
  rest.max_exp_avg_sq = from(entry.max_exp_avg_sq, moment_size);
  return rest;
}

// Updates elements [begin, end) with a gradient of any type. Loops exist for the param's own type and for float; other
// gradients are widened piece by piece, in the first-level cache.
void update(const KernelSet& kernels, const TensorEntry& entry, const Scalars& scalars, std::int64_t begin,
            std::int64_t end) {
  if (entry.grad_dtype == dtypes_of[entry.combination].param) {
    return kernels.update[entry.combination][entry.amsgrad](entry, scalars, begin, end);
  }
  const UpdateKernel update_wide = kernels.update_wide[entry.combination][entry.amsgrad];
  if (entry.grad_dtype == DType::float32) return update_wide(entry, scalars, begin, end);
  constexpr std::int64_t piece = 1024;
  alignas(64) float wide[piece];
  for (; begin < end; begin += piece) {
    const std::int64_t stop = std::min(begin + piece, end);
    kernels.widen[static_cast<int>(entry.grad_dtype)](entry, wide, begin, stop);
    update_wide(advanced(entry, begin, wide), scalars, 0, stop - begin);
  }
}

// An OpenMP runtime whose threads were lost in a fork never returns from its next parallel region.
std::atomic<bool> in_forked_child{false};

#if defined(__unix__) || defined(__APPLE__)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace

void launch(const Table& table, const LaunchOptions& options) noexcept {
  const KernelSet& kernels = kernels_of(options.isa);
  const std::int64_t units_per_chunk = choose_units_per_chunk(table, options);
  const std::int64_t chunk_count = (table.unit_count + units_per_chunk - 1) / units_per_chunk;

  const auto update_segment = [&](const TensorEntry& entry, std::int64_t begin, std::int64_t end) {
    update(kernels, entry, table.scalars[entry.scalars], begin, end);
    const int grad = static_cast<int>(entry.grad_dtype);
    if (options.unscale != 1.0) kernels.unscale[grad](entry, options.unscale, begin, end);
  };

  // Threads take the next chunk when they are done with one, so a thread that the system holds up delays one chunk.
  std::atomic<std::int64_t> next_chunk{0};
  const auto work = [&] {
    for (std::int64_t chunk; (chunk = next_chunk.fetch_add(1, std::memory_order_relaxed)) < chunk_count;) {
      const std::int64_t begin = chunk * units_per_chunk;
      for_each_segment(table, begin, std::min(begin + units_per_chunk, table.unit_count), update_segment);
    }
  };

  const int threads = static_cast<int>(std::min<std::int64_t>(options.threads, chunk_count));
  if (threads <= 1 || table.unit_count < min_parallel_units || in_forked_child) return work();
#pragma omp parallel num_threads(threads)
  work();
}

}  // namespace adamw_ext::cpu
