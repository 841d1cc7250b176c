// For tests, and large: every combination's kernel is compiled here, so in a third of the time; with AddressSanitizer's
// checks, sooner still if it is not optimised at all.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#pragma GCC optimize("O1")
#endif

#include "emulation.h"

#include "arguments.h"
#include "pack.h"

namespace adamw_ext::cuda {
namespace {

struct HostLauncher {
  template <class Arguments>
  Error update(const Arguments& arguments, std::int64_t blocks) const {
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (int thread = 0; thread < threads_per_block; ++thread) {
        update_chunk(arguments.header, arguments.entries, block, thread, threads_per_block);
      }
    }
    return 0;
  }

  template <class Arguments>
  Error advance(const Arguments& arguments) const {
    for (int thread = 0; thread < blocks_for(arguments.entry_count) * threads_per_block; ++thread) {
      advance_entry(arguments, thread);
    }
    return 0;
  }

  template <class Arguments>
  Error upload(const Arguments& arguments) const {
    for (int thread = 0; thread < blocks_for(arguments.count) * threads_per_block; ++thread) {
      upload_scalars(arguments, thread);
    }
    return 0;
  }

  template <class Arguments>
  Error norm(const Arguments& arguments) const {
    double accumulators[piece_width];
    for (std::int64_t piece = 0; piece < arguments.piece_count; ++piece) {
      bool any = false;
      for_each_thread(threads_per_piece, [&](int t) { any = square_share_of(arguments, piece, t, accumulators); });
      if (!any) continue;
      fold_all<threads_per_piece>(accumulators, piece_width);
      finish_piece(arguments, piece, accumulators);
    }
    return 0;
  }

  Error total(const TotalArguments& arguments) const {
    double accumulators[total_width];
    bool any = false;
    for_each_thread(total_width, [&](int t) { any = total_share_of(arguments, t, accumulators); });
    if (!any) return 0;
    fold_all<total_width>(accumulators, total_width);
    finish_total(arguments, accumulators);
    return 0;
  }

 private:
  template <class Body>
  static void for_each_thread(int threads, const Body& body) {
    for (int thread = 0; thread < threads; ++thread) body(thread);
  }

  template <int threads>
  static void fold_all(double* accumulators, int width) {
    for (int half = width / 2; half > 0; half /= 2) {
      for_each_thread(threads, [&](int thread) { fold(accumulators, half, thread, threads); });
    }
  }
};

}  // namespace

Error emulate_step(const Table& table, const StepTable& steps, Scalars* device_scalars, bool writes_grads,
                   const Limits& limits) noexcept {
  return pack_step(table, steps, device_scalars, writes_grads, limits, HostLauncher{});
}

Error emulate_advance(const StepTable& table, const Limits& limits) noexcept {
  return pack_advance(table, limits, HostLauncher{});
}

Error emulate_upload(const Table& table, Scalars* destination, const Limits& limits) noexcept {
  return pack_upload(table, nullptr, destination, limits, HostLauncher{});
}

Error emulate_norm(const Table& table, const Scaling& scaling, double unscale, double* sums, double* sum_of_squares,
                   const Limits& limits) noexcept {
  return pack_norm(table, scaling, unscale, sums, sum_of_squares, limits, HostLauncher{});
}

Error emulate_update(const Table& table, const UpdateInputs& inputs, const Limits& limits) noexcept {
  return pack_update(table, inputs, limits, HostLauncher{});
}

}  // namespace adamw_ext::cuda
