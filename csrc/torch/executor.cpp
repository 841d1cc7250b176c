#include "executor.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "../cpu/launch.h"
#include "../cuda/emulation.h"

namespace adamw_ext {

std::unique_ptr<Executor> make_cuda_executor(c10::Device device);
at::Tensor make_persistent_on_cuda(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device);

namespace {

class CpuExecutor : public Executor {
 public:
  bool is_capturing() const override { return false; }

  void reserve(std::size_t count, std::size_t pieces) override {
    scalars_.resize(std::max(scalars_.size(), count));
    sums_.resize(std::max(sums_.size(), pieces));
  }

  void measure(const Work& work, const Tuning& tuning) override {
    const StepTable& steps = work.steps;
    if (tuning.emulated_arguments > 0) {
      cuda::emulate_norm(work.table, steps.scaling, work.unscale, sums_.data(), steps.sum_of_squares, limits(tuning));
    } else if (!steps.scaling.skips()) {
      const double sum = cpu::sum_squares(work.table, options(tuning), sums_.data());
      *steps.sum_of_squares = unscale_squares(sum, work.unscale * steps.scaling.unscale());
    }
  }

  void run(const Work& work, const Tuning& tuning) override {
    if (tuning.emulated_arguments > 0) {
      cuda::emulate_step(work.table, work.steps, scalars_.data(), work.writes_grads, limits(tuning));
      return;
    }
    Table table = work.table;
    const StepTable& steps = work.steps;
    double unscale = work.unscale;
    if (steps.entry_count > 0) {
      if (steps.scaling.skips()) {
        if (steps.skipped != nullptr) ++*steps.skipped;
        return;
      }
      for (std::int64_t i = 0; i < steps.entry_count; ++i) {
        const StepEntry& entry = steps.entries[i];
        scalars_[entry.scalars] =
            advance(*entry.step, steps.sources[entry.source], steps.scaling, steps.sum_of_squares);
      }
      table.scalars = scalars_.data();
      unscale = steps.scaling.unscale();
    } else if (steps.sum_of_squares != nullptr) {
      std::copy_n(table.scalars, table.scalars_count, scalars_.begin());
      for (std::int64_t i = 0; i < table.scalars_count; ++i) clip(scalars_[i], *steps.sum_of_squares);
      table.scalars = scalars_.data();
    }
    cpu::LaunchOptions launch_options = options(tuning);
    launch_options.unscale = unscale;
    cpu::launch(table, launch_options);
  }

 private:
  static cpu::LaunchOptions options(const Tuning& tuning) {
    return {tuning.isa, at::get_num_threads(), tuning.units_per_chunk, 1.0};
  }

  static cuda::Limits limits(const Tuning& tuning) {
    constexpr int multiprocessors = 132;
    return {tuning.emulated_arguments, multiprocessors, tuning.units_per_chunk};
  }

  std::vector<Scalars> scalars_;
  std::vector<double> sums_;  // of the pieces of the gradients
};

}  // namespace

at::Tensor make_persistent(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device) {
  const c10::InferenceMode off(false);  // later steps may run outside of it
  return device.is_cuda() ? make_persistent_on_cuda(sizes, dtype, device)
                          : at::zeros(sizes, at::TensorOptions().dtype(dtype).device(device));
}

std::unique_ptr<Executor> make_executor(c10::Device device) {
  if (device.is_cpu()) return std::make_unique<CpuExecutor>();
  return make_cuda_executor(device);
}

#ifndef ADAMW_EXT_WITH_CUDA
bool has_kernels(c10::DeviceType type) { return type == c10::kCPU; }

std::unique_ptr<Executor> make_cuda_executor(c10::Device device) {
  TORCH_CHECK(false, "adamw_ext has no kernels for ", device, " tensors in this build");
}

at::Tensor make_persistent_on_cuda(at::IntArrayRef, at::ScalarType, c10::Device device) {
  TORCH_CHECK(false, "adamw_ext has no kernels for ", device, " tensors in this build");
}

void write_mirror(const at::Tensor&, const Hyper&, bool) {}
#endif

}  // namespace adamw_ext
