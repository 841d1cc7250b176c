// One step over a tensor table on the CPU: one parallel region, whatever the tensors and dtypes.
#pragma once

#include <cstdint>

#include "../core/table.h"
#include "isa.h"

namespace adamw_ext::cpu {

struct LaunchOptions {
  Isa isa;
  int threads;                   // upper bound; small steps take fewer
  std::int64_t units_per_chunk;  // 0: chosen from the table's size
  double unscale;                // gradients are multiplied by this in place; 1 leaves them untouched
};

// Updates every element of the table. The bits do not depend on isa, threads or units_per_chunk.
void launch(const Table& table, const LaunchOptions& options) noexcept;

// The sum of the squares of all gradients of the table, as norm.h orders it. sums: memory for one of each piece.
double sum_squares(const Table& table, const LaunchOptions& options, double* sums) noexcept;

}  // namespace adamw_ext::cpu
