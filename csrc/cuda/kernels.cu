// The __global__ shells, and the launcher.
#include <cuda_runtime.h>

#include "arguments.h"
#include "launch.h"
#include "pack.h"

namespace adamw_ext::cuda {
namespace {

template <class Param, class Moment, bool amsgrad, class Arguments>
__global__ void __launch_bounds__(threads_per_block, resident_blocks)
    update_kernel(const __grid_constant__ Arguments arguments) {
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

struct WriteArguments {
  Hyper* mirror;
  Hyper hyper;
};

__global__ void __launch_bounds__(threads_per_block) write_kernel(const __grid_constant__ WriteArguments arguments) {
  if (threadIdx.x == 0) *arguments.mirror = arguments.hyper;
}

// A launch's own status: cudaGetLastError would also answer for what others have left behind.
template <class Arguments>
Error launch(void (*kernel)(Arguments), const Arguments& arguments, std::int64_t blocks, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads_per_block);
  config.stream = stream;
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

struct StreamLauncher {
  cudaStream_t stream;

  template <class Param, class Moment, bool amsgrad, class Arguments>
  Error update(const Arguments& arguments, std::int64_t blocks) const {
    return launch(update_kernel<Param, Moment, amsgrad, Arguments>, arguments, blocks, stream);
  }

  template <class Arguments>
  Error advance(const Arguments& arguments) const {
    return launch(advance_kernel<Arguments>, arguments, blocks_for(arguments.entry_count), stream);
  }

  template <class Arguments>
  Error upload(const Arguments& arguments) const {
    return launch(upload_kernel<Arguments>, arguments, blocks_for(arguments.count), stream);
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

Error load_kernels() noexcept {
  const auto load = [](auto* kernel) -> Error {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  };
  const auto load_updates = [&](auto param, auto moment, auto amsgrad) -> Error {
    using Param = decltype(param);
    using Moment = decltype(moment);
    using T = typename compute_type<Param>::type;
    using Small = UpdateArguments<T, small_arguments>;
    using Large = UpdateArguments<T, large_arguments>;
    if (const Error error = load(update_kernel<Param, Moment, decltype(amsgrad)::value, Small>)) return error;
    return load(update_kernel<Param, Moment, decltype(amsgrad)::value, Large>);
  };
#define ADAMW_EXT_LOAD(index, param, moment)                                                                  \
  if (const Error error = load_updates(storage::param{}, storage::moment{}, std::false_type{})) return error; \
  if (const Error error = load_updates(storage::param{}, storage::moment{}, std::true_type{})) return error;
  ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_LOAD)
#undef ADAMW_EXT_LOAD
  if (const Error error = load(advance_kernel<AdvanceArguments<small_arguments>>)) return error;
  if (const Error error = load(advance_kernel<AdvanceArguments<large_arguments>>)) return error;
  if (const Error error = load(upload_kernel<UploadArguments<small_arguments>>)) return error;
  if (const Error error = load(upload_kernel<UploadArguments<large_arguments>>)) return error;
  return load(write_kernel);
}

Error launch_step(const Table& table, const StepTable& steps, Scalars* device_scalars, bool writes_grads,
                  const Limits& limits, void* stream) noexcept {
  const StreamLauncher launcher{static_cast<cudaStream_t>(stream)};
  return pack_step(table, steps, device_scalars, writes_grads, limits, launcher);
}

Error launch_write(Hyper* mirror, const Hyper& hyper, void* stream) noexcept {
  return launch(write_kernel, WriteArguments{mirror, hyper}, 1, static_cast<cudaStream_t>(stream));
}

}  // namespace adamw_ext::cuda
