// What travels to a kernel by value: a piece of the tensor table, small enough to be a kernel argument, so that a
// captured graph holds no pointer into host memory. And the kernels' bodies, as one block's thread runs them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/advance.h"
#include "../core/table.h"
#include "body.h"
#include "launch.h"

namespace adamw_ext::cuda {

// How many bytes of arguments a launch may have: anywhere, and with compute capability 7.0 and CUDA 12.1 or newer.
constexpr int small_arguments = 4096;
constexpr int large_arguments = 32764;

// The most pieces that fit behind a header.
constexpr int capacity(int bytes, std::size_t header, std::size_t piece) {
  return static_cast<int>((bytes - header) / piece);
}

template <class T, int bytes>
struct UpdateArguments {
  static constexpr int entry_capacity =
      capacity(bytes, 40 + scalars_by_value * sizeof(StepScalars<T>), sizeof(TensorEntry));

  const Scalars* device_scalars;  // in device memory, or null: those below
  const float* found_inf;         // in device memory, or null
  std::int64_t unit_count;
  std::int64_t units_per_chunk;
  std::int32_t entry_count;
  bool writes_grads;
  StepScalars<T> scalars[scalars_by_value];
  TensorEntry entries[entry_capacity];  // not empty, laid out anew
};

template <int bytes>
struct AdvanceArguments {
  static constexpr int source_capacity = capacity(bytes / 2, 0, sizeof(HyperSource));
  static constexpr int entry_capacity = capacity(bytes - bytes / 2, 40, sizeof(StepEntry));

  Scaling scaling;
  Scalars* scalars;
  std::int64_t* skipped;  // of the first launch of a step, else null
  std::int32_t entry_count;
  HyperSource sources[source_capacity];
  StepEntry entries[entry_capacity];
};

template <int bytes>
struct UploadArguments {
  static constexpr int scalars_capacity = capacity(bytes, 16, sizeof(Scalars));

  Scalars* destination;
  std::int32_t count;
  Scalars scalars[scalars_capacity];
};

static_assert(UpdateArguments<float, large_arguments>::entry_capacity >= 500, "500 tensors in one launch");
static_assert(sizeof(UpdateArguments<float, large_arguments>) <= large_arguments, "too large");
static_assert(sizeof(UpdateArguments<double, large_arguments>) <= large_arguments, "too large");
static_assert(sizeof(UpdateArguments<float, small_arguments>) <= small_arguments, "too large");
static_assert(sizeof(UpdateArguments<double, small_arguments>) <= small_arguments, "too large");
static_assert(sizeof(AdvanceArguments<large_arguments>) <= large_arguments, "too large");
static_assert(sizeof(AdvanceArguments<small_arguments>) <= small_arguments, "too large");
static_assert(sizeof(UploadArguments<large_arguments>) <= large_arguments, "too large");
static_assert(sizeof(UploadArguments<small_arguments>) <= small_arguments, "too large");

// The update kernel: thread `thread` of `threads` in the block that updates chunk `chunk`.
template <class Param, class Moment, bool amsgrad, class T, int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE void update_chunk(const UpdateArguments<T, bytes>& arguments, std::int64_t chunk,
                                                int thread, int threads) {
  if (Scaling{nullptr, arguments.found_inf}.skips()) return;
  const std::int64_t begin = chunk * arguments.units_per_chunk;
  const std::int64_t end = begin + arguments.units_per_chunk;
  const Table table{arguments.entries, arguments.entry_count, nullptr, 0, arguments.unit_count};
  for_each_segment(table, begin, end < arguments.unit_count ? end : arguments.unit_count,
                   [&](const TensorEntry& entry, std::int64_t from, std::int64_t to) {
                     const StepScalars<T> scalars = arguments.device_scalars != nullptr
                                                        ? arguments.device_scalars[entry.scalars].as(T())
                                                        : arguments.scalars[entry.scalars];
                     const UpdateOptions<T> options{scalars, forgets_fast(scalars), arguments.writes_grads};
                     update_segment<Param, Moment, amsgrad>(entry, from, to, thread, threads, options);
                   });
}

// The scalar kernel: thread `thread` of the whole grid.
template <int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE void advance_entry(const AdvanceArguments<bytes>& arguments, int thread) {
  if (arguments.scaling.skips()) {
    if (thread == 0 && arguments.skipped != nullptr) ++*arguments.skipped;
    return;
  }
  if (thread >= arguments.entry_count) return;
  const StepEntry& entry = arguments.entries[thread];
  arguments.scalars[entry.scalars] = advance(*entry.step, arguments.sources[entry.source], arguments.scaling);
}

// The upload kernel.
template <int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE void upload_scalars(const UploadArguments<bytes>& arguments, int thread) {
  if (thread < arguments.count) arguments.destination[thread] = arguments.scalars[thread];
}

}  // namespace adamw_ext::cuda
