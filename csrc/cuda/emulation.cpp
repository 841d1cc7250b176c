#include "emulation.h"

#include "arguments.h"
#include "pack.h"

namespace adamw_ext::cuda {
namespace {

struct HostLauncher {
  template <class Param, class Moment, bool amsgrad, class Arguments>
  Error update(const Arguments& arguments, std::int64_t blocks) const {
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (int thread = 0; thread < threads_per_block; ++thread) {
        update_chunk<Param, Moment, amsgrad>(arguments, block, thread, threads_per_block);
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
  return pack_upload(table, destination, limits, HostLauncher{});
}

Error emulate_update(const Table& table, const UpdateInputs& inputs, const Limits& limits) noexcept {
  return pack_update(table, inputs, limits, HostLauncher{});
}

}  // namespace adamw_ext::cuda
