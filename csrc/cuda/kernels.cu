// The __global__ shells, and the launcher.
#include <cuda_runtime.h>

#include "arguments.h"
#include "launch.h"
#include "pack.h"

namespace adamw_ext::cuda {
namespace {

template <class Param, class Moment, bool amsgrad, class Arguments>
__global__ void __launch_bounds__(threads_per_block) update_kernel(const __grid_constant__ Arguments arguments) {
  update_chunk<Param, Moment, amsgrad>(arguments, blockIdx.x, threadIdx.x, threads_per_block);
}

template <class Arguments>
__global__ void __launch_bounds__(threads_per_block) advance_kernel(const __grid_constant__ Arguments arguments) {
  advance_entry(arguments, blockIdx.x * threads_per_block + threadIdx.x);
}

template <class Arguments>
__global__ void __launch_bounds__(threads_per_block) upload_kernel(const __grid_constant__ Arguments arguments) {
  upload_scalars(arguments, blockIdx.x * threads_per_block + threadIdx.x);
}

__global__ void write_kernel(Hyper* mirror, const __grid_constant__ Hyper hyper) { *mirror = hyper; }

struct StreamLauncher {
  cudaStream_t stream;

  template <class Param, class Moment, bool amsgrad, class Arguments>
  Error update(const Arguments& arguments, std::int64_t blocks) const {
    update_kernel<Param, Moment, amsgrad><<<static_cast<unsigned>(blocks), threads_per_block, 0, stream>>>(arguments);
    return cudaGetLastError();
  }

  template <class Arguments>
  Error advance(const Arguments& arguments) const {
    advance_kernel<<<blocks_for(arguments.entry_count), threads_per_block, 0, stream>>>(arguments);
    return cudaGetLastError();
  }

  template <class Arguments>
  Error upload(const Arguments& arguments) const {
    upload_kernel<<<blocks_for(arguments.count), threads_per_block, 0, stream>>>(arguments);
    return cudaGetLastError();
  }
};

}  // namespace

Error query_limits(int device, Limits& limits) noexcept {
  int major = 0, driver = 0;
  if (const Error error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (const Error error = cudaDriverGetVersion(&driver)) return error;
  limits.argument_bytes = driver >= 12010 && major >= 7 ? large_arguments : small_arguments;
  return cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

Error launch_advance(const StepTable& table, const Limits& limits, void* stream) noexcept {
  return pack_advance(table, limits, StreamLauncher{static_cast<cudaStream_t>(stream)});
}

Error launch_upload(const Table& table, Scalars* device_scalars, const Limits& limits, void* stream) noexcept {
  return pack_upload(table, device_scalars, limits, StreamLauncher{static_cast<cudaStream_t>(stream)});
}

Error launch_update(const Table& table, const UpdateInputs& inputs, const Limits& limits, void* stream) noexcept {
  return pack_update(table, inputs, limits, StreamLauncher{static_cast<cudaStream_t>(stream)});
}

Error launch_write(Hyper* mirror, const Hyper& hyper, void* stream) noexcept {
  write_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(mirror, hyper);
  return cudaGetLastError();
}

}  // namespace adamw_ext::cuda
