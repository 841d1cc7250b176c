#include "executor.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
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

  void reserve(std::size_t count) override { scalars_.resize(std::max(scalars_.size(), count)); }

  void run(const Work& work, const Tuning& tuning) override {
    if (tuning.emulated_arguments > 0) return emulate(work, tuning);
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
        scalars_[entry.scalars] = advance(*entry.step, steps.sources[entry.source], steps.scaling);
      }
      table.scalars = scalars_.data();
      unscale = std::fabs(steps.scaling.unscale());  // as the CUDA kernel has it, whose factor's sign is maximize's
    }
    cpu::launch(table, {tuning.isa, at::get_num_threads(), tuning.units_per_chunk, unscale});
  }

 private:
  void emulate(const Work& work, const Tuning& tuning) {
    constexpr int multiprocessors = 132;
    const cuda::Limits limits{tuning.emulated_arguments, multiprocessors, tuning.units_per_chunk};
    cuda::emulate_step(work.table, work.steps, scalars_.data(), work.writes_grads, limits);
  }

  std::vector<Scalars> scalars_;
};

}  // namespace

at::Tensor make_persistent(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device) {
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
