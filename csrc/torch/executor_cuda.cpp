// The CUDA executor: streams, guards and scratch memory are torch's, everything else is below in cuda/.
#ifdef ADAMW_EXT_WITH_CUDA
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "../cuda/launch.h"
#include "executor.h"

namespace adamw_ext {
namespace {

void check(cuda::Error error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

// A stream at some time: what is captured into a graph is another time than all that is not.
struct Capture {
  cudaStream_t stream = nullptr;
  unsigned long long graph = 0;  // 0: not captured

  static Capture current(c10::Device device) {
    const c10::cuda::CUDAGuard guard(device);  // the default stream's handle means another one on every device
    Capture capture;
    capture.stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(capture.stream, &status, &capture.graph));
    TORCH_CHECK(status != cudaStreamCaptureStatusInvalidated, "the capture on the current stream of ", device,
                " has failed before this step");
    if (status == cudaStreamCaptureStatusNone) capture.graph = 0;
    return capture;
  }

  bool operator==(const Capture& other) const { return stream == other.stream && graph == other.graph; }
};

// What each device has aside: a stream that nothing else uses, so that it is never captured (torch's own streams may
// be), and an event after the latest write from another stream.
struct AsideOfDevice {
  cudaStream_t stream = nullptr;
  cudaEvent_t written = nullptr;

  static AsideOfDevice& of(c10::Device device) {
    static std::mutex mutex;
    static std::map<c10::DeviceIndex, AsideOfDevice> all;
    const std::lock_guard<std::mutex> lock(mutex);
    AsideOfDevice& aside = all[device.index()];
    if (aside.stream == nullptr) C10_CUDA_CHECK(cudaStreamCreateWithFlags(&aside.stream, cudaStreamNonBlocking));
    if (aside.written == nullptr) C10_CUDA_CHECK(cudaEventCreateWithFlags(&aside.written, cudaEventDisableTiming));
    return aside;
  }
};

// In this scope the current stream is the one aside, and what a capture in the same thread forbids is allowed.
struct Aside {
  explicit Aside(c10::Device device)
      : relaxed(cudaStreamCaptureModeRelaxed),
        device_guard(device),
        stream(AsideOfDevice::of(device).stream),
        stream_guard(c10::cuda::getStreamFromExternal(stream, device.index())) {}

  c10::cuda::CUDAStreamCaptureModeGuard relaxed;
  c10::cuda::CUDAGuard device_guard;
  cudaStream_t stream;
  c10::cuda::CUDAStreamGuard stream_guard;
};

// A device's limits. When they are first asked for, it gets the kernels, too.
cuda::Limits limits_of(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, cuda::Limits> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = all.find(device.index());
  if (known != all.end()) return known->second;
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);  // also while a graph is captured
  const c10::cuda::CUDAGuard guard(device);
  cuda::Limits limits{};
  check(cuda::query_limits(device.index(), limits));
  check(cuda::load_kernels());
  return all[device.index()] = limits;
}

class CudaExecutor : public Executor {
 public:
  explicit CudaExecutor(c10::Device device) : device_(device), limits_(limits_of(device)) {}

  bool is_capturing() const override { return Capture::current(device_).graph != 0; }

  // Memory between two kernels. It belongs to one stream, so that torch's allocator, which orders reuse by stream, can
  // have it back at any time; and what a graph uses comes from this graph's own memory and lives as long as that.
  void reserve(std::size_t count, std::size_t pieces) override {
    const c10::cuda::CUDAGuard guard(device_);
    const Capture capture = Capture::current(device_);
    sums_at_ = count * sizeof(Scalars);
    const auto bytes = static_cast<std::int64_t>(sums_at_ + pieces * sizeof(double));
    if (scratch_.defined() && scratch_.numel() >= bytes && capture == scratch_of_) return;
    scratch_ = at::empty({bytes}, at::TensorOptions().dtype(c10::kByte).device(device_));
    scratch_of_ = capture;
  }

  void measure(const Work& work, const Tuning& tuning) override {
    const c10::cuda::CUDAGuard guard(device_);
    auto* const sums = reinterpret_cast<double*>(static_cast<char*>(scratch_.mutable_data_ptr()) + sums_at_);
    const StepTable& steps = work.steps;
    check(cuda::launch_norm(work.table, steps.scaling, work.unscale, sums, steps.sum_of_squares, limits(tuning),
                            stream()));
  }

  void run(const Work& work, const Tuning& tuning) override {
    const c10::cuda::CUDAGuard guard(device_);
    auto* const scalars = static_cast<Scalars*>(scratch_.mutable_data_ptr());
    check(cuda::launch_step(work.table, work.steps, scalars, work.writes_grads, limits(tuning), stream()));
  }

 private:
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device_.index()).stream(); }

  const cuda::Limits& limits(const Tuning& tuning) {
    limits_.units_per_chunk = tuning.units_per_chunk;
    return limits_;
  }

  c10::Device device_;
  cuda::Limits limits_;
  at::Tensor scratch_;  // scalars, then the sums of the pieces of the gradients
  std::size_t sums_at_ = 0;
  Capture scratch_of_;
};

}  // namespace

bool has_kernels(c10::DeviceType type) { return type == c10::kCPU || type == c10::kCUDA; }

std::unique_ptr<Executor> make_cuda_executor(c10::Device device) {
  TORCH_CHECK(device.is_cuda(), "adamw_ext has no kernels for ", device, " tensors");
  return std::make_unique<CudaExecutor>(device);
}

at::Tensor make_persistent_on_cuda(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device) {
  const Aside aside(device);
  at::Tensor zeros = at::zeros(sizes, at::TensorOptions().dtype(dtype).device(device));
  C10_CUDA_CHECK(cudaStreamSynchronize(aside.stream));
  return zeros;
}

void write_mirror(const at::Tensor& mirror, const Hyper& hyper, bool now) {
  const c10::Device device = mirror.device();
  auto* const memory = static_cast<Hyper*>(mirror.mutable_data_ptr());
  if (now) {
    const Aside aside(device);
    C10_CUDA_CHECK(cudaStreamWaitEvent(aside.stream, AsideOfDevice::of(device).written));
    check(cuda::launch_write(memory, hyper, aside.stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(aside.stream));
    return;
  }
  const c10::cuda::CUDAGuard guard(device);
  TORCH_CHECK(Capture::current(device).graph == 0,
              "sync_hyperparameters() was called while a graph is captured, which would write the same numbers at "
              "every replay: call it between replays");
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device.index());
  check(cuda::launch_write(memory, hyper, stream.stream()));
  C10_CUDA_CHECK(cudaEventRecord(AsideOfDevice::of(device).written, stream.stream()));
  c10::cuda::CUDACachingAllocator::recordStream(mirror.storage().data_ptr(), stream);
}

}  // namespace adamw_ext
#endif
