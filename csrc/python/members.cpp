#include "members.h"

#include <pybind11/stl.h>

#include <array>
#include <limits>

#include "dtensor.h"
#include "tensors.h"

namespace py = pybind11;

namespace adamw_ext::python {
namespace {

// fields: those of Member in adamw_ext/sharded.py.
Member to_member(const py::tuple& fields, const std::vector<Flags>& flags) {
  Member member;
  member.name = fields[3].cast<std::string>();
  member.param = to_part(fields[0], member.name);
  member.group = fields[2].cast<std::int32_t>();
  if (member.group < 0 || static_cast<std::size_t>(member.group) >= flags.size()) {
    throw py::index_error("a member's group does not exist");
  }
  member.deferred = flags[member.group].capturable || (flags[member.group].fused && member.param.is_cuda());
  member.group_master = flags[member.group].master;
  member.rounding = flags[member.group].rounding;
  member.element_number = element_number(fields[4].cast<std::uint64_t>(), fields[5].cast<std::uint64_t>());
  if (!fields[6].is_none()) {
    const auto places = fields[6].cast<std::array<std::uint64_t, 4>>();
    constexpr std::uint64_t most = std::numeric_limits<std::uint32_t>::max();
    if (places[0] < 1 || places[0] > most || places[1] < 1 || places[1] > most) {
      throw py::value_error("a member's places must be of at least 1 and less than 2**32 elements and rows");
    }
    member.places =
        Places{static_cast<std::uint32_t>(places[0]), static_cast<std::uint32_t>(places[1]), places[2], places[3]};
  }
  member.sum = fields[7].cast<std::int32_t>();
  if (member.sum < 0) throw py::value_error("a member's sum must not be negative");
  if (fields[1].is_none()) return member;
  const auto state = fields[1].cast<py::dict>();
  const auto item = [&](const char* key) {
    if (!state.contains(key)) throw py::key_error("the state of " + member.name + " has no '" + key + "'");
    return to_part(state[key], std::string("state '") + key + "' of " + member.name);
  };
  member.step = item("step");
  member.exp_avg = item("exp_avg");
  member.exp_avg_sq = item("exp_avg_sq");
  if (state.contains("max_exp_avg_sq")) member.max_exp_avg_sq = item("max_exp_avg_sq");
  if (member.group_master != Master::none && needs_master(member.param.scalar_type())) {
    member.master = item(member.group_master == Master::float32 ? "master_param" : "param_remainder");
  }
  return member;
}

}  // namespace

py::tuple checked_members(const py::list& list) {
  const auto members = py::reinterpret_steal<py::tuple>(PyList_AsTuple(list.ptr()));
  if (!members) throw py::error_already_set();
  for (const py::handle item : members) {
    bool usable = PyTuple_Check(item.ptr()) && PyTuple_GET_SIZE(item.ptr()) == 8;
    for (const Py_ssize_t number : {2, 4, 5, 7}) {
      usable = usable && PyLong_Check(PyTuple_GET_ITEM(item.ptr(), number));
    }
    if (!usable) throw py::type_error("members must be tuples as of Member in adamw_ext/sharded.py");
  }
  return members;
}

std::vector<Member> to_members(const py::tuple& tuples, const std::vector<Flags>& flags) {
  find_dtensor_class();
  std::vector<Member> members;
  members.reserve(tuples.size());
  for (const py::handle item : tuples) {
    members.push_back(to_member(item.cast<py::tuple>(), flags));
    if (static_cast<std::size_t>(members.back().sum) > tuples.size()) {
      throw py::value_error("a member's sum must be one of as many as there are members");
    }
  }
  return members;
}

}  // namespace adamw_ext::python
