// Cuts tables into launches: shared by the launcher, which gives them to a GPU, and the emulation.
//
// A launcher is an object with `update`, `advance` and `upload`, which take what the kernel of that name takes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arguments.h"
#include "launch.h"

namespace adamw_ext::cuda {

constexpr int threads_per_block = 128;

// What a multiprocessor has registers for at least: 128 for each thread, with which no update kernel spills on any
// architecture (102 are too few for float64 with amsgrad on compute capability 10.0), and 512 threads with 64 bytes of
// loads each: 32 KB in flight, where 3.35 TB/s and 0.7 microseconds of latency ask for 18 KB on each of 132.
constexpr int resident_blocks = 4;

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
template <class Param, class Moment, bool amsgrad, int bytes, class Launcher>
class UpdatePacker {
  using T = typename compute_type<Param>::type;

 public:
  UpdatePacker(const Table& table, const UpdateInputs& inputs, const Limits& limits, const Launcher& launcher)
      : limits_(limits), launcher_(launcher) {
    arguments_.device_scalars = inputs.device_scalars;
    arguments_.found_inf = inputs.found_inf;
    arguments_.writes_grads = inputs.writes_grads;
    if (inputs.device_scalars == nullptr) {
      for (std::int64_t i = 0; i < table.scalars_count; ++i) arguments_.scalars[i] = table.scalars[i].as(T());
    }
    clear();
  }

  Error add(const TensorEntry& entry) {
    if (arguments_.entry_count == arguments_.entry_capacity) {
      if (const Error error = flush()) return error;
    }
    TensorEntry& added = arguments_.entries[arguments_.entry_count++] = entry;
    added.first_unit = arguments_.unit_count;
    arguments_.unit_count += units_of(entry.numel);
    return 0;
  }

  Error flush() {
    if (arguments_.entry_count == 0) return 0;
    arguments_.units_per_chunk = choose_units_per_chunk(arguments_.unit_count, limits_);
    const std::int64_t blocks = (arguments_.unit_count + arguments_.units_per_chunk - 1) / arguments_.units_per_chunk;
    const Error error = launcher_.template update<Param, Moment, amsgrad>(arguments_, blocks);
    clear();
    return error;
  }

 private:
  void clear() {
    arguments_.entry_count = 0;
    arguments_.unit_count = 0;
  }

  const Limits& limits_;
  const Launcher& launcher_;
  UpdateArguments<T, bytes> arguments_;
};

template <class Param, class Moment, bool amsgrad, int bytes, class Launcher>
Error update_all(int combination, const Table& table, const UpdateInputs& inputs, const Limits& limits,
                 const Launcher& launcher) {
  UpdatePacker<Param, Moment, amsgrad, bytes, Launcher> packer(table, inputs, limits, launcher);
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
  constexpr Error invalid_value = 1;
  if (inputs.device_scalars == nullptr && table.scalars_count > scalars_by_value) return invalid_value;
  std::int64_t entries[combination_count][2] = {};
  for (std::int64_t i = 0; i < table.entry_count; ++i) {
    const TensorEntry& entry = table.entries[i];
    if (entry.scalars >= 0 && entry.numel > 0) ++entries[entry.combination][entry.amsgrad];
  }
  // Few entries take the small arguments: a launch copies all of its arguments, used or not.
  const auto update = [&](auto param, auto moment, auto amsgrad, int combination) -> Error {
    using Param = decltype(param);
    using Moment = decltype(moment);
    using T = typename compute_type<Param>::type;
    const std::int64_t count = entries[combination][amsgrad];
    if (count == 0) return 0;
    const bool fits = count <= UpdateArguments<T, small_arguments>::entry_capacity;
    return fits || limits.argument_bytes < large_arguments
               ? update_all<Param, Moment, amsgrad, small_arguments>(combination, table, inputs, limits, launcher)
               : update_all<Param, Moment, amsgrad, large_arguments>(combination, table, inputs, limits, launcher);
  };
#define ADAMW_EXT_UPDATE(index, param, moment)                                                                 \
  if (const Error error = update(storage::param{}, storage::moment{}, std::false_type{}, index)) return error; \
  if (const Error error = update(storage::param{}, storage::moment{}, std::true_type{}, index)) return error;
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
Error upload_all(const Table& table, Scalars* destination, const Launcher& launcher) {
  UploadArguments<bytes> arguments;
  for (std::int64_t begin = 0; begin < table.scalars_count; begin += arguments.scalars_capacity) {
    const std::int64_t count = std::min<std::int64_t>(arguments.scalars_capacity, table.scalars_count - begin);
    arguments.destination = destination + begin;
    arguments.count = static_cast<std::int32_t>(count);
    std::copy_n(table.scalars + begin, count, arguments.scalars);
    if (const Error error = launcher.upload(arguments)) return error;
  }
  return 0;
}

// Launches the writing of a table's scalars.
template <class Launcher>
Error pack_upload(const Table& table, Scalars* destination, const Limits& limits, const Launcher& launcher) {
  const bool fits = table.scalars_count <= UploadArguments<small_arguments>::scalars_capacity;
  return fits || limits.argument_bytes < large_arguments ? upload_all<small_arguments>(table, destination, launcher)
                                                         : upload_all<large_arguments>(table, destination, launcher);
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
  } else if (table.scalars_count > scalars_by_value) {
    if (const Error error = pack_upload(table, device_scalars, limits, launcher)) return error;
    inputs.device_scalars = device_scalars;
  }
  return pack_update(table, inputs, limits, launcher);
}

}  // namespace adamw_ext::cuda
