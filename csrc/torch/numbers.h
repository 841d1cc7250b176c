// Single numbers that kernels count or measure: one for each device, in memory which outlives steppers and belongs to
// no graph, so that captured steps go on with it.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <tuple>

#include "executor.h"
#include "memory.h"

namespace adamw_ext {

class DeviceNumbers {
 public:
  explicit DeviceNumbers(at::ScalarType dtype) : dtype_(dtype) {}

  // The device's number, a 0-d tensor: at one address as long as this lives. Python has it too: one that was resized or
  // converted there is made anew. place: tells several of one device apart.
  const at::Tensor& on(c10::Device device, int place = 0) {
    at::Tensor& number = numbers_[{device.type(), device.index(), place}];
    const bool usable =
        number.defined() && number.scalar_type() == dtype_ && number.device() == device && holds_number(number);
    if (usable && is_plain(*number.unsafeGetTensorImpl())) return number;
    const at::Tensor made = make_persistent({}, dtype_, device);
    check_has_memory(made, "numbers of an optimizer");
    return number = made;
  }

 private:
  at::ScalarType dtype_;
  std::map<std::tuple<c10::DeviceType, c10::DeviceIndex, int>, at::Tensor> numbers_;
};

}  // namespace adamw_ext
