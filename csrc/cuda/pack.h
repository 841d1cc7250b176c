// Cuts tables into launches: shared by the launcher, which gives them to a GPU, and the emulation.
//
// A launcher is an object with `update`, `advance`, `upload`, `norm` and `total`, which take what the kernel of that
// name takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arguments.h"
#include "launch.h"

namespace adamw_ext::cuda {

constexpr int threads_per_block = 128;

// As cudaErrorInvalidValue.
constexpr Error invalid_value = 1;

// For one thread each.
constexpr int blocks_for(int count) { return (count + threads_per_block - 1) / threads_per_block; }

// A block's share: 64 units are 4,096 elements, eight packets of float32 a thread. Smaller tables are cut finer, until
// several blocks for each multiprocessor have work.
inline std::int64_t choose_units_per_chunk(std::int64_t unit_count, const Limits& limits) {
  constexpr std::int64_t most = 64;
  constexpr std::int64_t blocks_per_multiprocessor = 8;
  if (limits.units_per_chunk > 0) return limits.units_per_chunk;
  const std::int64_t blocks = limits.multiprocessors * blocks_per_multiprocessor;
  return std::clamp<std::int64_t>(unit_count / blocks, 1, most);
}

// Collects entries into arguments, and launches them when they are full.
template <class C, bool amsgrad, int bytes, class Launcher>
class UpdatePacker {
 public:
  UpdatePacker(const Table& table, const UpdateInputs& inputs, const Limits& limits, const Launcher& launcher)
      : limits_(limits), launcher_(launcher) {
    arguments_.header.device_scalars = inputs.device_scalars;
    arguments_.header.found_inf = inputs.found_inf;
    arguments_.header.writes_grads = inputs.writes_grads;
    if (inputs.device_scalars == nullptr) {
      for (std::int64_t i = 0; i < table.scalars_count; ++i)
        arguments_.header.scalars[i] = table.scalars[i].as(typename C::T());
    }
    clear();
  }

  Error add(const TensorEntry& entry) {
    constexpr std::int64_t most_units = std::numeric_limits<std::uint32_t>::max();
    const std::int64_t units = units_of(entry.numel);
    int places = find_places(entry);
    if (arguments_.header.entry_count == arguments_.entry_capacity || places < 0 ||
        arguments_.header.unit_count + units > most_units) {
      if (const Error error = flush()) return error;
      if (units > most_units) return invalid_value;  // 2**38 elements: no device has them
      places = find_places(entry);
    }
    const auto first_unit = static_cast<std::uint32_t>(arguments_.header.unit_count);
    arguments_.entries[arguments_.header.entry_count++] = UpdateEntry<C, amsgrad>::of(entry, first_unit, places);
    arguments_.header.unit_count += units;
    return 0;
  }

  Error flush() {
    if (arguments_.header.entry_count == 0) return 0;
    arguments_.header.units_per_chunk = choose_units_per_chunk(arguments_.header.unit_count, limits_);
    const std::int64_t blocks =
        (arguments_.header.unit_count + arguments_.header.units_per_chunk - 1) / arguments_.header.units_per_chunk;
    const Error error = launcher_.update(arguments_, blocks);
    clear();
    return error;
  }

 private:
  // What the entry's `places` is to be: those of the launch get them, if they do not have them. -1: they are full.
  int find_places(const TensorEntry& entry) {
    if (!C::is_stochastic || entry.places == nullptr) return 0;
    std::int16_t& count = arguments_.header.places_count;
    for (int i = 0; i < count; ++i) {
      if (arguments_.header.places[i] == *entry.places) return i + 1;
    }
    if (count == places_capacity<C>) return -1;
    arguments_.header.places[count] = *entry.places;
    return ++count;
  }

  void clear() {
    arguments_.header.entry_count = 0;
    arguments_.header.unit_count = 0;
    arguments_.header.places_count = 0;
  }

  const Limits& limits_;
  const Launcher& launcher_;
  UpdateArguments<C, amsgrad, bytes> arguments_;
};

template <class C, bool amsgrad, int bytes, class Launcher>
Error update_all(int combination, const Table& table, const UpdateInputs& inputs, const Limits& limits,
                 const Launcher& launcher) {
  UpdatePacker<C, amsgrad, bytes, Launcher> packer(table, inputs, limits, launcher);
  for (std::int64_t i = 0; i < table.entry_count; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (entry.combination != combination || entry.amsgrad != amsgrad || entry.scalars < 0 || entry.numel == 0) continue;
    if (const Error error = packer.add(entry)) return error;
  }
  return packer.flush();
}

// Launches the update of every entry that is part of this step, one dtype combination after the other.
template <class Launcher>
Error pack_update(const Table& table, const UpdateInputs& inputs, const Limits& limits, const Launcher& launcher) {
  if (inputs.device_scalars == nullptr && table.scalars_count > scalars_by_value) return invalid_value;
  std::int64_t entries[combination_count][2] = {};
  for (std::int64_t i = 0; i < table.entry_count; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (entry.scalars >= 0 && entry.numel > 0) ++entries[entry.combination][entry.amsgrad];
  }
  // Few entries take the small arguments: a launch copies all of its arguments, used or not.
  const auto update = [&](auto combination, auto amsgrad, int index) -> Error {
    using C = decltype(combination);
    constexpr bool is_amsgrad = decltype(amsgrad)::value;
    const std::int64_t count = entries[index][is_amsgrad];
    if (count == 0) return 0;
    const bool fits = count <= UpdateArguments<C, is_amsgrad, small_arguments>::entry_capacity;
    return fits || limits.argument_bytes < large_arguments
               ? update_all<C, is_amsgrad, small_arguments>(index, table, inputs, limits, launcher)
               : update_all<C, is_amsgrad, large_arguments>(index, table, inputs, limits, launcher);
  };
#define ADAMW_EXT_UPDATE(index, ...)                                                                            \
  if (const Error error = update(ADAMW_EXT_COMBINATION(__VA_ARGS__){}, std::false_type{}, index)) return error; \
  if (const Error error = update(ADAMW_EXT_COMBINATION(__VA_ARGS__){}, std::true_type{}, index)) return error;
  ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_UPDATE)
#undef ADAMW_EXT_UPDATE
  return 0;
}

template <int bytes, class Launcher>
Error advance_all(const StepTable& table, const Launcher& launcher) {
  AdvanceArguments<bytes> arguments;
  arguments.scaling = table.scaling;
  arguments.scalars = table.scalars;
  arguments.skipped = table.skipped;
  arguments.sum_of_squares = table.sum_of_squares;
  std::int32_t source_count = 0;
  std::int32_t sources[AdvanceArguments<bytes>::source_capacity];
  arguments.entry_count = 0;
  for (std::int64_t i = 0; i < table.entry_count; ++i) {
    const StepEntry& entry = table.entries[i];
    const bool is_new = source_count == 0 || sources[source_count - 1] != entry.source;
    if (arguments.entry_count == arguments.entry_capacity || (is_new && source_count == arguments.source_capacity)) {
      if (const Error error = launcher.advance(arguments)) return error;
      arguments.entry_count = source_count = 0;
      arguments.skipped = nullptr;
    }
    if (source_count == 0 || sources[source_count - 1] != entry.source) {
      sources[source_count] = entry.source;
      arguments.sources[source_count++] = table.sources[entry.source];
    }
    arguments.entries[arguments.entry_count++] = {entry.step, source_count - 1, entry.scalars};
  }
  return arguments.entry_count > 0 ? launcher.advance(arguments) : 0;
}

// Launches the scalars of every entry.
template <class Launcher>
Error pack_advance(const StepTable& table, const Limits& limits, const Launcher& launcher) {
  const bool fits = table.entry_count <= AdvanceArguments<small_arguments>::source_capacity;
  return fits || limits.argument_bytes < large_arguments ? advance_all<small_arguments>(table, launcher)
                                                         : advance_all<large_arguments>(table, launcher);
}

template <int bytes, class Launcher>
Error upload_all(const Table& table, const double* sum_of_squares, Scalars* destination, const Launcher& launcher) {
  UploadArguments<bytes> arguments;
  arguments.sum_of_squares = sum_of_squares;
  for (std::int64_t begin = 0; begin < table.scalars_count; begin += arguments.scalars_capacity) {
    const std::int64_t count = std::min<std::int64_t>(arguments.scalars_capacity, table.scalars_count - begin);
    arguments.destination = destination + begin;
    arguments.count = static_cast<std::int32_t>(count);
    std::copy_n(table.scalars + begin, count, arguments.scalars);
    if (const Error error = launcher.upload(arguments)) return error;
  }
  return 0;
}

// Launches the writing of a table's scalars. sum_of_squares: where they are to be clipped, else null.
template <class Launcher>
Error pack_upload(const Table& table, const double* sum_of_squares, Scalars* destination, const Limits& limits,
                  const Launcher& launcher) {
  const bool fits = table.scalars_count <= UploadArguments<small_arguments>::scalars_capacity;
  return fits || limits.argument_bytes < large_arguments
             ? upload_all<small_arguments>(table, sum_of_squares, destination, launcher)
             : upload_all<large_arguments>(table, sum_of_squares, destination, launcher);
}

template <int bytes, class Launcher>
Error norm_all(const Table& table, const Scaling& scaling, double* sums, const Launcher& launcher) {
  NormArguments<bytes> arguments;
  arguments.sums = sums;
  arguments.found_inf = scaling.found_inf;
  arguments.entry_count = 0;
  const auto flush = [&]() -> Error {
    if (arguments.entry_count == 0) return 0;
    const NormEntry& last = arguments.entries[arguments.entry_count - 1];
    arguments.first_piece = arguments.entries[0].first_piece;
    arguments.piece_count = last.first_piece + pieces_of(last.numel) - arguments.first_piece;
    const Error error = launcher.norm(arguments);
    arguments.entry_count = 0;
    return error;
  };
  for (std::int64_t i = 0; i < table.entry_count; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (entry.scalars < 0 || entry.numel == 0) continue;
    if (arguments.entry_count == arguments.entry_capacity) {
      if (const Error error = flush()) return error;
    }
    arguments.entries[arguments.entry_count++] = {entry.grad, static_cast<std::uint64_t>(entry.numel),
                                                  static_cast<std::uint64_t>(entry.grad_dtype), entry.first_piece};
  }
  return flush();
}

// Launches the sum of the squares of all unscaled gradients.
template <class Launcher>
Error pack_norm(const Table& table, const Scaling& scaling, double unscale, double* sums, double* sum_of_squares,
                const Limits& limits, const Launcher& launcher) {
  const bool fits = table.entry_count <= NormArguments<small_arguments>::entry_capacity;
  const Error error = fits || limits.argument_bytes < large_arguments
                          ? norm_all<small_arguments>(table, scaling, sums, launcher)
                          : norm_all<large_arguments>(table, scaling, sums, launcher);
  return error ? error : launcher.total(TotalArguments{sums, table.piece_count, unscale, scaling, sum_of_squares});
}

// Launches a whole step.
template <class Launcher>
Error pack_step(const Table& table, StepTable steps, Scalars* device_scalars, bool writes_grads, const Limits& limits,
                const Launcher& launcher) {
  UpdateInputs inputs{nullptr, nullptr, writes_grads};
  if (steps.entry_count > 0) {
    steps.scalars = device_scalars;
    if (const Error error = pack_advance(steps, limits, launcher)) return error;
    inputs.device_scalars = device_scalars;
    inputs.found_inf = steps.scaling.found_inf;
  } else if (table.scalars_count > scalars_by_value || steps.sum_of_squares != nullptr) {
    if (const Error error = pack_upload(table, steps.sum_of_squares, device_scalars, limits, launcher)) return error;
    inputs.device_scalars = device_scalars;
  }
  return pack_update(table, inputs, limits, launcher);
}

}  // namespace adamw_ext::cuda
