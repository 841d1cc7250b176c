// The CUDA executor: streams, guards and scratch memory are torch's, everything else is below in cuda/.
#ifdef ADAMW_EXT_WITH_CUDA
#include <ATen/ops/empty.h>
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
    Capture capture;
    capture.stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(capture.stream, &status, &capture.graph));
    if (status == cudaStreamCaptureStatusNone) capture.graph = 0;
    return capture;
  }

  bool operator==(const Capture& other) const { return stream == other.stream && graph == other.graph; }
};

// One stream for each device that nothing else uses, so that it is never captured. torch's own streams may be.
cudaStream_t aside_stream(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, cudaStream_t> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& stream = streams[device.index()];
  if (stream == nullptr) C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

// In this scope the current stream is the one aside, and what a capture in the same thread forbids is allowed.
struct Aside {
  explicit Aside(c10::Device device)
      : relaxed(cudaStreamCaptureModeRelaxed),
        device_guard(device),
        stream(aside_stream(device)),
        stream_guard(c10::cuda::getStreamFromExternal(stream, device.index())) {}

  c10::cuda::CUDAStreamCaptureModeGuard relaxed;
  c10::cuda::CUDAGuard device_guard;
  cudaStream_t stream;
  c10::cuda::CUDAStreamGuard stream_guard;
};

class CudaExecutor : public Executor {
 public:
  explicit CudaExecutor(c10::Device device) : device_(device) { check(cuda::query_limits(device.index(), limits_)); }

  bool is_capturing() const override { return Capture::current(device_).graph != 0; }

  void run(const Work& work, const Tuning& tuning) override {
    const c10::cuda::CUDAGuard guard(device_);
    const Capture capture = Capture::current(device_);
    limits_.units_per_chunk = tuning.units_per_chunk;
    cuda::UpdateInputs inputs{nullptr, nullptr, work.writes_grads};
    if (work.steps.entry_count > 0) {
      StepTable steps = work.steps;
      steps.scalars = scalars(work.table.entry_count, capture);
      check(cuda::launch_advance(steps, limits_, capture.stream));
      inputs.device_scalars = steps.scalars;
      inputs.found_inf = steps.scaling.found_inf;
    } else if (work.table.scalars_count > cuda::scalars_by_value) {
      Scalars* const uploaded = scalars(work.table.scalars_count, capture);
      check(cuda::launch_upload(work.table, uploaded, limits_, capture.stream));
      inputs.device_scalars = uploaded;
    }
    check(cuda::launch_update(work.table, inputs, limits_, capture.stream));
  }

 private:
  // Memory between two kernels. It belongs to one stream, so that torch's allocator, which orders reuse by stream,
  // can have it back at any time; and what a graph uses comes from this graph's own memory and lives as long as that.
  Scalars* scalars(std::int64_t count, const Capture& capture) {
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(Scalars));
    if (!scratch_.defined() || scratch_.numel() < bytes || !(capture == scratch_of_)) {
      scratch_ = at::empty({bytes}, at::TensorOptions().dtype(c10::kByte).device(device_));
      scratch_of_ = capture;
    }
    return static_cast<Scalars*>(scratch_.mutable_data_ptr());
  }

  c10::Device device_;
  cuda::Limits limits_{};
  at::Tensor scratch_;
  Capture scratch_of_;
};

}  // namespace

bool has_kernels(c10::DeviceType type) { return type == c10::kCPU || type == c10::kCUDA; }

std::unique_ptr<Executor> make_cuda_executor(c10::Device device) {
  TORCH_CHECK(device.is_cuda(), "adamw_ext has no kernels for ", device, " tensors");
  return std::make_unique<CudaExecutor>(device);
}

at::Tensor make_mirror(c10::Device device) {
  const Aside aside(device);
  return at::empty({sizeof(Hyper)}, at::TensorOptions().dtype(c10::kByte).device(device));
}

void write_mirror(const at::Tensor& mirror, const Hyper& hyper, bool now) {
  auto* const memory = static_cast<Hyper*>(mirror.mutable_data_ptr());
  if (now) {
    const Aside aside(mirror.device());
    check(cuda::launch_write(memory, hyper, aside.stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(aside.stream));
    return;
  }
  const c10::cuda::CUDAGuard guard(mirror.device());
  const Capture capture = Capture::current(mirror.device());
  TORCH_CHECK(capture.graph == 0,
              "sync_hyperparameters() was called while a graph is captured, which would write the same numbers at "
              "every replay: call it between replays");
  check(cuda::launch_write(memory, hyper, capture.stream));
}

}  // namespace adamw_ext
#endif
