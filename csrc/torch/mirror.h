// Float hyperparameters in device memory, where captured graphs read them: a number passed by value would be baked into
// the graph. One cell for each (device, group), made when a step is captured, at one address as long as the mirror
// lives. An optimizer keeps one mirror for all steppers it makes, so that no graph outlives its cells' owner's params.
#pragma once

#include <ATen/core/Tensor.h>
#include <adamw_ext/export.h>

#include <cstdint>
#include <map>
#include <utility>

#include "../core/hyper.h"

namespace adamw_ext {

class ADAMW_EXT_API HyperMirror {
 public:
  // The address of a cell that holds these numbers now: for a step that is being captured.
  const Hyper* hold(c10::Device device, std::int32_t group, const Hyper& hyper);

  // Calls read(group) for each cell and writes what it returns, where that differs, on the current streams.
  template <class Read>
  void sync(const Read& read) {
    for (auto& [place, cell] : cells_) update(cell, read(place.second), /*now=*/false);
  }

 private:
  struct Cell {
    at::Tensor memory;
    Hyper written;
  };

  static void update(Cell& cell, const Hyper& hyper, bool now);

  std::map<std::pair<c10::DeviceIndex, std::int32_t>, Cell> cells_;
};

}  // namespace adamw_ext
