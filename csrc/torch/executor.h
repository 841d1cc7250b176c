// Runs a step's table on one device: the seam between the stepper, which checks tensors, and the kernels, which take
// plain pointers.
#pragma once

#include <ATen/core/Tensor.h>
#include <adamw_ext/export.h>

#include <cstdint>
#include <memory>

#include "../core/advance.h"
#include "../core/table.h"
#include "../cpu/isa.h"

namespace adamw_ext {

// How a step is run. None of it changes bits.
struct Tuning {
  cpu::Isa isa;
  std::int64_t units_per_chunk = 0;  // 0: chosen from the work
  int emulated_arguments = 0;        // CPU tensors take the emulated CUDA path, with this many bytes a launch; 0: no
};

struct Work {
  // Its scalars count only where steps is empty.
  Table table;

  // The entries whose steps lie in memory, to be advanced first; empty where the host has counted. Entry i of the table
  // has scalars i, wherever the executor keeps them.
  StepTable steps;

  double unscale;     // where the host has counted: gradients are multiplied by it in place, unless it is 1
  bool writes_grads;  // a gradient scaler was given
};

class Executor {
 public:
  virtual ~Executor() = default;

  // Whether the calls to run() are recorded into a graph at present.
  virtual bool is_capturing() const = 0;

  // Sees to it that the calls below need not allocate, for a table of at most as many entries and scalars, and pieces
  // if its norm is measured.
  virtual void reserve(std::size_t count, std::size_t pieces) = 0;

  // These wait for nothing on a GPU: the work goes to the device's current stream.

  // Writes the sum of the squares of all unscaled gradients into work.steps.sum_of_squares.
  virtual void measure(const Work& work, const Tuning& tuning) = 0;

  // Clips where there is a sum of squares.
  virtual void run(const Work& work, const Tuning& tuning) = 0;
};

// Throws for a device without kernels.
std::unique_ptr<Executor> make_executor(c10::Device device);

// Whether make_executor knows devices of this type.
ADAMW_EXT_API bool has_kernels(c10::DeviceType type);

// Zeros for numbers that captured graphs read or write. On a CUDA device the memory is no graph's own, also while one
// is captured: what a graph's memory holds is overwritten by every replay.
ADAMW_EXT_API at::Tensor make_persistent(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device);

// Writes one group's hyperparameters there. `now`: aside from all streams and finished on return, also while a graph is
// captured; else on the current stream.
void write_mirror(const at::Tensor& mirror, const Hyper& hyper, bool now);

}  // namespace adamw_ext
