// The tensor table: which memory one step updates, and how it is cut into work.
//
// Plain pointers and counts, no owner: whoever fills it keeps the tensors alive and has checked every pointer. An
// entry is a run of `numel` elements in memory order, the same order in all of its pointers.
//
// Work is counted in units of 64 elements. A tensor takes whole units, so a cut never falls inside a cache line of a
// tensor, and tensors line up in one range of units that is cut into equal chunks, wherever tensors begin and end.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "hyper.h"
#include "portable.h"

namespace adamw_ext {

constexpr std::int64_t elements_per_unit = 64;

struct TensorEntry {
  void* param;
  void* grad;  // written only when gradients are unscaled in place
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;     // amsgrad only, else null
  std::int64_t numel;       // real numbers: a complex element counts twice; 0 where the param has no gradient
  std::int64_t first_unit;  // units of all entries before this one
  std::int32_t scalars;     // index into Table::scalars; -1: not part of this step
  std::uint8_t combination;
  DType grad_dtype;
  bool amsgrad;
};

struct Table {
  const TensorEntry* entries;
  std::int64_t entry_count;
  const Scalars* scalars;
  std::int64_t scalars_count;
  std::int64_t unit_count;
};

ADAMW_EXT_HD inline std::int64_t units_of(std::int64_t numel) {
  return (numel + elements_per_unit - 1) / elements_per_unit;
}

// Sets every first_unit; returns the table's unit count.
inline std::int64_t lay_out_units(TensorEntry* entries, std::int64_t entry_count) {
  std::int64_t unit = 0;
  for (std::int64_t i = 0; i < entry_count; ++i) {
    entries[i].first_unit = unit;
    unit += units_of(entries[i].numel);
  }
  return unit;
}

// The entry that holds `unit`: the last one that starts at or before it and is not empty.
ADAMW_EXT_HD inline std::int64_t find_entry(const Table& table, std::int64_t unit) {
  std::int64_t low = 0;
  std::int64_t high = table.entry_count;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (table.entries[middle].first_unit <= unit ? low : high) = middle;
  }
  return low;
}

// Calls segment(entry, begin, end) for each run of elements [begin, end) that units [unit_begin, unit_end) hold.
template <class Segment>
ADAMW_EXT_HD inline void for_each_segment(const Table& table, std::int64_t unit_begin, std::int64_t unit_end,
                                          const Segment& segment) {
  for (std::int64_t i = find_entry(table, unit_begin); unit_begin < unit_end; ++i) {
    const TensorEntry& entry = table.entries[i];
    const std::int64_t entry_end = entry.first_unit + units_of(entry.numel);
    const std::int64_t stop = entry_end < unit_end ? entry_end : unit_end;
    if (stop <= unit_begin) continue;
    const std::int64_t begin = (unit_begin - entry.first_unit) * elements_per_unit;
    const std::int64_t end = (stop - entry.first_unit) * elements_per_unit;
    segment(entry, begin, end < entry.numel ? end : entry.numel);
    unit_begin = stop;
  }
}

}  // namespace adamw_ext
