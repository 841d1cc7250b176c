// The params of an optimizer with their state, as the stepper takes them.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "groups.h"

namespace adamw_ext::python {

// list: of what adamw_ext/sharded.py calls Member. flags: of all param groups.
std::vector<Member> to_members(const pybind11::list& list, const std::vector<Flags>& flags);

}  // namespace adamw_ext::python
