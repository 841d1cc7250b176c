// The tensor table: which memory one step updates, and how it is cut into work.
//
// Plain pointers and counts, no owner: whoever fills it keeps the tensors alive and has checked every pointer. An
// entry is a run of `numel` elements in memory order, the same order in all of its pointers.
//
// Work is counted in units of 64 elements. A tensor takes whole units, so a cut never falls inside a cache line of a
// tensor, and tensors line up in one range of units that is cut into equal chunks, wherever tensors begin and end.
// The norm of the gradients is counted in pieces instead (norm.h), of which a tensor takes whole ones, too.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "hyper.h"
#include "norm.h"
#include "portable.h"
#include "random.h"

namespace adamw_ext {

constexpr std::int64_t elements_per_unit = 64;

struct TensorEntry {
  void* param;
  void* grad;  // written only when gradients are unscaled in place
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;          // amsgrad only, else null
  void* master;                  // as the combination says, else null
  std::int64_t numel;            // real numbers: a complex element counts twice; 0 where the param has no gradient
  std::int64_t first_unit;       // units of all entries before this one
  std::int64_t first_piece;      // pieces of all entries before this one
  std::uint64_t element_number;  // of the first element, for random bits
  const Places* places;          // of the others; null: they follow the first one
  std::int32_t scalars;          // index into Table::scalars; -1: not part of this step
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
  std::int64_t piece_count;
};

ADAMW_EXT_HD inline std::int64_t units_of(std::int64_t numel) {
  return (numel + elements_per_unit - 1) / elements_per_unit;
}

struct Extent {
  std::int64_t units;
  std::int64_t pieces;
};

// Sets every first_unit and first_piece; returns the table's counts.
inline Extent lay_out(TensorEntry* entries, std::int64_t entry_count) {
  Extent extent{0, 0};
  for (std::int64_t i = 0; i < entry_count; ++i) {
    entries[i].first_unit = extent.units;
    entries[i].first_piece = extent.pieces;
    extent.units += units_of(entries[i].numel);
    extent.pieces += pieces_of(entries[i].numel);
  }
  return extent;
}

// The entry that holds a unit or a piece: the last one that starts at or before it and is not empty. first: where an
// entry starts.
template <class Entry, class First>
ADAMW_EXT_HD inline std::int64_t find_entry(const Entry* entries, std::int64_t entry_count, std::int64_t index,
                                            const First& first) {
  std::int64_t low = 0;
  std::int64_t high = entry_count;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (static_cast<std::int64_t>(first(entries[middle])) <= index ? low : high) = middle;
  }
  return low;
}

// Calls segment(entry, begin, end) for each run of elements [begin, end) that units [unit_begin, unit_end) hold.
template <class Entry, class Segment>
ADAMW_EXT_HD inline void for_each_segment(const Entry* entries, std::int64_t entry_count, std::int64_t unit_begin,
                                          std::int64_t unit_end, const Segment& segment) {
  const auto first_unit = [](const Entry& entry) { return entry.first_unit; };
  for (std::int64_t i = find_entry(entries, entry_count, unit_begin, first_unit); unit_begin < unit_end; ++i) {
    const Entry& entry = entries[i];
    const std::int64_t entry_end = entry.first_unit + units_of(entry.numel);
    const std::int64_t stop = entry_end < unit_end ? entry_end : unit_end;
    if (stop <= unit_begin) continue;
    const std::int64_t numel = entry.numel;
    const std::int64_t begin = (unit_begin - entry.first_unit) * elements_per_unit;
    const std::int64_t end = (stop - entry.first_unit) * elements_per_unit;
    segment(entry, begin, end < numel ? end : numel);
    unit_begin = stop;
  }
}

// Calls piece(entry, begin, end) with the elements [begin, end) of the piece of this number.
template <class Entry, class Piece>
ADAMW_EXT_HD inline void visit_piece(const Entry* entries, std::int64_t entry_count, std::int64_t index,
                                     const Piece& piece) {
  const auto first_piece = [](const Entry& entry) { return entry.first_piece; };
  const Entry& entry = entries[find_entry(entries, entry_count, index, first_piece)];
  const std::int64_t numel = entry.numel;
  const std::int64_t begin = (index - entry.first_piece) * elements_per_piece;
  const std::int64_t end = begin + elements_per_piece;
  piece(entry, begin, end < numel ? end : numel);
}

}  // namespace adamw_ext
