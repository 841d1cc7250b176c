// What travels to a kernel by value: a piece of the tensor table, small enough to be a kernel argument, so that a
// captured graph holds no pointer into host memory. And the kernels' bodies, as one block's thread runs them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/advance.h"
#include "../core/table.h"
#include "body.h"
#include "launch.h"
#include "norm_body.h"

namespace adamw_ext::cuda {

// How many bytes of arguments a launch may have: anywhere, and with compute capability 7.0 and CUDA 12.1 or newer.
constexpr int small_arguments = 4096;
constexpr int large_arguments = 32764;

// The most pieces that fit behind a header.
constexpr int capacity(int bytes, std::size_t header, std::size_t piece) {
  return static_cast<int>((bytes - header) / piece);
}

// How many blocks of 128 threads a multiprocessor has registers for at least. With 4 there are 128 for each thread, and
// no update kernel that rounds to nearest spills on any architecture (102 are too few for float64 with amsgrad on
// compute capability 10.0); random words ask for more. 384 threads with 64 bytes of loads each have 24 KB in flight,
// where 3.35 TB/s and 0.7 microseconds of latency ask for 18 KB on each of 132 multiprocessors.
template <class C>
constexpr int resident_blocks = C::is_stochastic ? 3 : 4;

// How many different places the entries of a launch may have.
template <class C>
constexpr int places_capacity = C::is_stochastic ? 5 : 0;

template <class C>
struct UpdateHeader {
  using T = typename C::T;

  const Scalars* device_scalars;  // in device memory, or null: those below
  const float* found_inf;         // in device memory, or null
  std::int64_t unit_count;
  std::int64_t units_per_chunk;
  std::int32_t entry_count;
  std::int16_t places_count;
  bool writes_grads;
  StepScalars<T> scalars[scalars_by_value];
  Places places[places_capacity<C> > 0 ? places_capacity<C> : 1];
};

template <class C, bool amsgrad, int bytes>
struct UpdateArguments {
  using Entry = UpdateEntry<C, amsgrad>;
  static constexpr int blocks_per_multiprocessor = resident_blocks<C>;
  static constexpr int entry_capacity = capacity(bytes, sizeof(UpdateHeader<C>), sizeof(Entry));

  UpdateHeader<C> header;
  Entry entries[entry_capacity];  // not empty, laid out anew
};

template <int bytes>
struct AdvanceArguments {
  static constexpr int source_capacity = capacity(bytes / 2, 0, sizeof(HyperSource));
  static constexpr int entry_capacity = capacity(bytes - bytes / 2, 48, sizeof(StepEntry));

  Scaling scaling;
  Scalars* scalars;
  std::int64_t* skipped;  // of the first launch of a step, else null
  const double* sum_of_squares;
  std::int32_t entry_count;
  HyperSource sources[source_capacity];
  StepEntry entries[entry_capacity];
};

template <int bytes>
struct UploadArguments {
  static constexpr int scalars_capacity = capacity(bytes, 24, sizeof(Scalars));

  Scalars* destination;
  const double* sum_of_squares;
  std::int32_t count;
  Scalars scalars[scalars_capacity];
};

template <int bytes>
struct NormArguments {
  static constexpr int entry_capacity = capacity(bytes, 40, sizeof(NormEntry));

  double* sums;            // of pieces
  const float* found_inf;  // in device memory, or null
  std::int64_t first_piece;
  std::int64_t piece_count;
  std::int32_t entry_count;
  NormEntry entries[entry_capacity];  // not empty
};

// Pieces are added up by one block.
struct TotalArguments {
  const double* sums;
  std::int64_t count;
  double unscale;  // where the host knows it, else 1
  Scaling scaling;
  double* sum_of_squares;
};

#define ADAMW_EXT_CHECK_SIZES(index, ...)                                                                           \
  static_assert(                                                                                                    \
      sizeof(UpdateArguments<ADAMW_EXT_COMBINATION(__VA_ARGS__), true, small_arguments>) <= small_arguments &&      \
          sizeof(UpdateArguments<ADAMW_EXT_COMBINATION(__VA_ARGS__), false, small_arguments>) <= small_arguments && \
          sizeof(UpdateArguments<ADAMW_EXT_COMBINATION(__VA_ARGS__), true, large_arguments>) <= large_arguments &&  \
          sizeof(UpdateArguments<ADAMW_EXT_COMBINATION(__VA_ARGS__), false, large_arguments>) <= large_arguments,   \
      "too large");                                                                                                 \
  static_assert(UpdateArguments<ADAMW_EXT_COMBINATION(__VA_ARGS__), false, large_arguments>::entry_capacity >= 500, \
                "500 tensors in one launch");
ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_CHECK_SIZES)
#undef ADAMW_EXT_CHECK_SIZES
static_assert(sizeof(NormArguments<large_arguments>) <= large_arguments, "too large");
static_assert(sizeof(NormArguments<small_arguments>) <= small_arguments, "too large");
static_assert(sizeof(AdvanceArguments<large_arguments>) <= large_arguments, "too large");
static_assert(sizeof(AdvanceArguments<small_arguments>) <= small_arguments, "too large");
static_assert(sizeof(UploadArguments<large_arguments>) <= large_arguments, "too large");
static_assert(sizeof(UploadArguments<small_arguments>) <= small_arguments, "too large");

// The update kernel: thread `thread` of `threads` in the block that updates chunk `chunk`.
template <class C, bool amsgrad>
ADAMW_EXT_HD inline void update_chunk(const UpdateHeader<C>& header, const UpdateEntry<C, amsgrad>* entries,
                                      std::int64_t chunk, int thread, int threads) {
  using T = typename C::T;
  if (Scaling{nullptr, header.found_inf}.skips()) return;
  const std::int64_t begin = chunk * header.units_per_chunk;
  const std::int64_t end = begin + header.units_per_chunk;
  for_each_segment(entries, header.entry_count, begin, end < header.unit_count ? end : header.unit_count,
                   [&](const UpdateEntry<C, amsgrad>& entry, std::int64_t from, std::int64_t to) {
                     const StepScalars<T> scalars = header.device_scalars != nullptr
                                                        ? header.device_scalars[entry.scalars].as(T())
                                                        : header.scalars[entry.scalars];
                     Places places{};
                     if (C::is_stochastic && entry.places > 0) places = header.places[entry.places - 1];
                     const UpdateOptions<T> options{scalars, forgets_fast(scalars), header.writes_grads, places};
                     update_segment(entry, from, to, thread, threads, options);
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
  arguments.scalars[entry.scalars] =
      advance(*entry.step, arguments.sources[entry.source], arguments.scaling, arguments.sum_of_squares);
}

// The upload kernel.
template <int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE void upload_scalars(const UploadArguments<bytes>& arguments, int thread) {
  if (thread >= arguments.count) return;
  Scalars scalars = arguments.scalars[thread];
  if (arguments.sum_of_squares != nullptr) clip(scalars, *arguments.sum_of_squares);
  arguments.destination[thread] = scalars;
}

// The norm kernel, before its accumulators are folded: thread `thread` of those of one piece of the launch. False:
// there is nothing to fold.
template <int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE bool square_share_of(const NormArguments<bytes>& arguments, std::int64_t piece,
                                                   int thread, double* accumulators) {
  if (Scaling{nullptr, arguments.found_inf}.skips() || piece >= arguments.piece_count) return false;
  visit_piece(arguments.entries, arguments.entry_count, arguments.first_piece + piece,
              [&](const NormEntry& entry, std::int64_t begin, std::int64_t end) {
                const auto square = [&](const auto* grad) {
                  square_piece(grad, static_cast<int>(end - begin), thread, accumulators);
                };
                const auto dtype = static_cast<DType>(entry.grad_dtype);
                if (dtype == DType::float64) return visit_grad<double>(entry.grad, dtype, begin, square);
                visit_grad<float>(entry.grad, dtype, begin, square);
              });
  return true;
}

template <int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE void finish_piece(const NormArguments<bytes>& arguments, std::int64_t piece,
                                                const double* accumulators) {
  arguments.sums[arguments.first_piece + piece] = accumulators[0];
}

// The total kernel, before its accumulators are folded. False: there is nothing to fold.
ADAMW_EXT_HD ADAMW_EXT_INLINE bool total_share_of(const TotalArguments& arguments, int thread, double* accumulators) {
  if (arguments.scaling.skips()) return false;
  double sum = 0.0;
  for (std::int64_t i = thread; i < arguments.count; i += total_width) sum += arguments.sums[i];
  accumulators[thread] = sum;
  return true;
}

ADAMW_EXT_HD ADAMW_EXT_INLINE void finish_total(const TotalArguments& arguments, const double* accumulators) {
  const double unscale = arguments.unscale * arguments.scaling.unscale();
  *arguments.sum_of_squares = unscale_squares(accumulators[0], unscale);
}

}  // namespace adamw_ext::cuda
