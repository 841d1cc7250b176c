// One step over a tensor table on a CUDA device: plain structs and a stream in, an error code out.
//
// Every pointer of the tables is device memory, except the tables' own arrays, which are read before a call returns
// and need not outlive it. Nothing here allocates, synchronises or copies, so a stream that is being captured will do.
#pragma once

#include <cstdint>

#include "../core/advance.h"
#include "../core/table.h"

namespace adamw_ext::cuda {

// What decides how a table is cut into launches and blocks. None of it changes bits.
struct Limits {
  int argument_bytes;                // of one launch
  int multiprocessors;               // to be filled with blocks
  std::int64_t units_per_chunk = 0;  // of a block; 0: chosen from the work
};

// How many scalars the update kernel takes by value. A table with more needs them in device memory.
constexpr int scalars_by_value = 8;

struct UpdateInputs {
  const Scalars* device_scalars;  // what entries count in, or null: the table's own, which travel by value
  const float* found_inf;         // one number on the device, or null; anything but 0 makes the kernel do nothing
  bool writes_grads;              // gradients are unscaled in place
};

// cudaError_t: 0 is success.
using Error = int;

Error query_limits(int device, Limits& limits) noexcept;

// Brings every kernel onto the current device, which the runtime would otherwise do at a kernel's first launch: too
// late if that is captured, or if memory is short by then.
Error load_kernels() noexcept;

// Writes the sum of the squares of all unscaled gradients there, unless found_inf says that the step is skipped: a
// kernel for the sums of pieces, and one that adds them up. sums: memory for one of each piece of the table, whose
// pieces have been laid out. unscale: where the host knows it, else 1.
Error launch_norm(const Table& table, const Scaling& scaling, double unscale, double* sums, double* sum_of_squares,
                  const Limits& limits, void* stream) noexcept;

// A whole step: the scalar kernel, where `steps` has entries (it advances their steps and writes their scalars, unless
// found_inf says otherwise), or the upload of the table's scalars, where they are too many to travel by value or are to
// be clipped; then the update kernel, one launch for up to 500 entries of one dtype combination. Units need not have
// been laid out. device_scalars: memory for the scalars of every entry, and for the table's own.
Error launch_step(const Table& table, const StepTable& steps, Scalars* device_scalars, bool writes_grads,
                  const Limits& limits, void* stream) noexcept;

// Writes one group's hyperparameters into device memory.
Error launch_write(Hyper* mirror, const Hyper& hyper, void* stream) noexcept;

}  // namespace adamw_ext::cuda
