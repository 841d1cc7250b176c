// The params of an optimizer with their state, as the stepper takes them.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "groups.h"

namespace adamw_ext::python {

// What adamw_ext/sharded.py calls Member, as often as the list has one. A copy: the list may be changed by code that
// runs while members are read. Throws a TypeError where an item has other fields, or no ints where numbers belong.
pybind11::tuple checked_members(const pybind11::list& list);

// tuples: from checked_members. flags: of all param groups.
std::vector<Member> to_members(const pybind11::tuple& tuples, const std::vector<Flags>& flags);

}  // namespace adamw_ext::python
