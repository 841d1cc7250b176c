// How many steps found_inf has skipped: one count for each device that has counted, in memory which outlives steppers
// and belongs to no graph, so that captured steps go on counting.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <utility>

#include "executor.h"
#include "memory.h"

namespace adamw_ext {

class SkipCounts {
 public:
  // The device's count, a 0-d int64 tensor: at one address as long as this lives. Python has it too: one that was
  // resized or converted there is made anew.
  const at::Tensor& on(c10::Device device) {
    at::Tensor& count = counts_[{device.type(), device.index()}];
    const bool usable =
        count.defined() && count.scalar_type() == c10::kLong && count.device() == device && holds_number(count);
    if (!usable) count = make_persistent({}, c10::kLong, device);
    return count;
  }

 private:
  std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, at::Tensor> counts_;
};

}  // namespace adamw_ext
