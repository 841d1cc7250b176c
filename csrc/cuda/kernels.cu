// The __global__ shells, and the launcher.
#include <cuda_runtime.h>

#include "arguments.h"
#include "launch.h"
#include "pack.h"

namespace adamw_ext::cuda {
namespace {

template <class Arguments>
__global__ void __launch_bounds__(threads_per_block, Arguments::blocks_per_multiprocessor)
    update_kernel(const __grid_constant__ Arguments arguments) {
  update_chunk(arguments.header, arguments.entries, blockIdx.x, threadIdx.x, threads_per_block);
}

template <class Arguments>
__global__ void __launch_bounds__(threads_per_block) advance_kernel(const __grid_constant__ Arguments arguments) {
  advance_entry(arguments, blockIdx.x * threads_per_block + threadIdx.x);
}

template <class Arguments>
__global__ void __launch_bounds__(threads_per_block) upload_kernel(const __grid_constant__ Arguments arguments) {
  upload_scalars(arguments, blockIdx.x * threads_per_block + threadIdx.x);
}

// A warp for each piece.
static_assert(threads_per_piece == 32, "a piece's threads wait for each other as a warp");
constexpr int pieces_per_block = threads_per_block / threads_per_piece;

template <class Arguments>
__global__ void __launch_bounds__(threads_per_block) norm_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ double accumulators_of[pieces_per_block][piece_width];
  const int warp = threadIdx.x / threads_per_piece, thread = threadIdx.x % threads_per_piece;
  double* const accumulators = accumulators_of[warp];
  const std::int64_t piece = static_cast<std::int64_t>(blockIdx.x) * pieces_per_block + warp;
  if (!square_share_of(arguments, piece, thread, accumulators)) return;  // all threads of the warp, or none
  for (int half = piece_width / 2; half > 0; half /= 2) {
    __syncwarp();
    fold(accumulators, half, thread, threads_per_piece);
  }
  if (thread == 0) finish_piece(arguments, piece, accumulators);
}

__global__ void __launch_bounds__(total_width) total_kernel(const __grid_constant__ TotalArguments arguments) {
  __shared__ double accumulators[total_width];
  if (!total_share_of(arguments, threadIdx.x, accumulators)) return;  // all threads, or none
  for (int half = total_width / 2; half > 0; half /= 2) {
    __syncthreads();
    fold(accumulators, half, threadIdx.x, total_width);
  }
  if (threadIdx.x == 0) finish_total(arguments, accumulators);
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
Error launch(void (*kernel)(Arguments), const Arguments& arguments, std::int64_t blocks, cudaStream_t stream,
             int threads = threads_per_block) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

struct StreamLauncher {
  cudaStream_t stream;

  template <class Arguments>
  Error update(const Arguments& arguments, std::int64_t blocks) const {
    return launch(update_kernel<Arguments>, arguments, blocks, stream);
  }

  template <class Arguments>
  Error advance(const Arguments& arguments) const {
    return launch(advance_kernel<Arguments>, arguments, blocks_for(arguments.entry_count), stream);
  }

  template <class Arguments>
  Error upload(const Arguments& arguments) const {
    return launch(upload_kernel<Arguments>, arguments, blocks_for(arguments.count), stream);
  }

  template <class Arguments>
  Error norm(const Arguments& arguments) const {
    const std::int64_t blocks = (arguments.piece_count + pieces_per_block - 1) / pieces_per_block;
    return launch(norm_kernel<Arguments>, arguments, blocks, stream);
  }

  Error total(const TotalArguments& arguments) const { return launch(total_kernel, arguments, 1, stream, total_width); }
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
  const auto load_updates = [&](auto combination, auto amsgrad) -> Error {
    using C = decltype(combination);
    constexpr bool is_amsgrad = decltype(amsgrad)::value;
    if (const Error error = load(update_kernel<UpdateArguments<C, is_amsgrad, small_arguments>>)) return error;
    return load(update_kernel<UpdateArguments<C, is_amsgrad, large_arguments>>);
  };
#define ADAMW_EXT_LOAD(index, ...)                                                                             \
  if (const Error error = load_updates(ADAMW_EXT_COMBINATION(__VA_ARGS__){}, std::false_type{})) return error; \
  if (const Error error = load_updates(ADAMW_EXT_COMBINATION(__VA_ARGS__){}, std::true_type{})) return error;
  ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_LOAD)
#undef ADAMW_EXT_LOAD
  if (const Error error = load(advance_kernel<AdvanceArguments<small_arguments>>)) return error;
  if (const Error error = load(advance_kernel<AdvanceArguments<large_arguments>>)) return error;
  if (const Error error = load(upload_kernel<UploadArguments<small_arguments>>)) return error;
  if (const Error error = load(upload_kernel<UploadArguments<large_arguments>>)) return error;
  if (const Error error = load(norm_kernel<NormArguments<small_arguments>>)) return error;
  if (const Error error = load(norm_kernel<NormArguments<large_arguments>>)) return error;
  if (const Error error = load(total_kernel)) return error;
  return load(write_kernel);
}

Error launch_step(const Table& table, const StepTable& steps, Scalars* device_scalars, bool writes_grads,
                  const Limits& limits, void* stream) noexcept {
  const StreamLauncher launcher{static_cast<cudaStream_t>(stream)};
  return pack_step(table, steps, device_scalars, writes_grads, limits, launcher);
}

Error launch_norm(const Table& table, const Scaling& scaling, double unscale, double* sums, double* sum_of_squares,
                  const Limits& limits, void* stream) noexcept {
  const StreamLauncher launcher{static_cast<cudaStream_t>(stream)};
  return pack_norm(table, scaling, unscale, sums, sum_of_squares, limits, launcher);
}

Error launch_write(Hyper* mirror, const Hyper& hyper, void* stream) noexcept {
  return launch(write_kernel, WriteArguments{mirror, hyper}, 1, static_cast<cudaStream_t>(stream));
}

}  // namespace adamw_ext::cuda
