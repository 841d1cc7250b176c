#include "mirror.h"

#include <limits>

#include "executor.h"

namespace adamw_ext {
namespace {

bool same(const Hyper& a, const Hyper& b) {
  return a.lr == b.lr && a.beta1 == b.beta1 && a.beta2 == b.beta2 && a.eps == b.eps &&
         a.weight_decay == b.weight_decay && a.max_grad_norm == b.max_grad_norm && a.seed == b.seed;
}

}  // namespace

void HyperMirror::update(Cell& cell, const Hyper& hyper, bool now) {
  if (same(cell.written, hyper)) return;
  write_mirror(cell.memory, hyper, now);
  cell.written = hyper;
}

const Hyper* HyperMirror::hold(c10::Device device, std::int32_t group, const Hyper& hyper) {
  const std::pair<c10::DeviceIndex, std::int32_t> place{device.index(), group};
  if (cells_.count(place) == 0) {
    Hyper nothing{};
    nothing.lr = std::numeric_limits<double>::quiet_NaN();  // equals no number
    cells_[place] = {make_persistent({sizeof(Hyper)}, c10::kByte, device), nothing};
  }
  Cell& cell = cells_.at(place);
  update(cell, hyper, /*now=*/true);
  return static_cast<const Hyper*>(cell.memory.const_data_ptr());
}

}  // namespace adamw_ext
