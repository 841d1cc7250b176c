// Python's param groups as the stepper takes them.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../torch/stepper.h"

namespace adamw_ext::python {

// What decides which params a stepper has, where their steps lie and in what form they are kept: another stepper is
// needed when they change.
struct Flags {
  bool capturable, differentiable, fused;
  Master master;
  Rounding rounding;
  bool clips;  // sums of sharded gradients are kept apart

  bool operator==(const Flags& other) const {
    return capturable == other.capturable && differentiable == other.differentiable && fused == other.fused &&
           master == other.master && rounding == other.rounding && clips == other.clips;
  }
};

// Reads one param group. The values are the user's objects: reading them may run any Python code.
class GroupReader {
 public:
  GroupReader(pybind11::handle group, std::size_t index);

  GroupOptions read();
  Flags flags();
  bool ran_python() const { return ran_python_; }  // a value that was read may have

 private:
  pybind11::object get(const pybind11::str& key) const;

  // None for a key that the group need not have.
  pybind11::object find(const pybind11::str& key) const;
  double to_max_grad_norm(const pybind11::object& value);
  std::uint64_t to_seed(const pybind11::object& value) const;
  Master to_master(const pybind11::object& value) const;

  // A number that a captured graph can read anew: a CUDA tensor is not read here but goes into `on_device`.
  double to_double(const pybind11::object& value, const pybind11::str& key, GroupOptions& options,
                   at::Tensor& on_device);
  double to_double(const pybind11::object& value, const pybind11::str& key);
  bool to_bool(const pybind11::object& value, const pybind11::str& key);
  pybind11::type_error refuse_number(const pybind11::object& value, const pybind11::str& key) const;

  pybind11::object group_;
  std::size_t index_;
  bool ran_python_ = false;
};

std::vector<Flags> read_flags(const pybind11::list& param_groups);

}  // namespace adamw_ext::python
