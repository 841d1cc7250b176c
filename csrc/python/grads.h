// The gradients of one step, also of DTensors.
#pragma once

#include <pybind11/pybind11.h>

#include <ATen/core/Tensor.h>

#include <vector>

namespace adamw_ext::python {

// Their Python objects are kept, which keep them: a further C++ owner of a tensor that Python has costs a detour
// through Python.
class Grads {
 public:
  ~Grads() { clear(); }

  // A tensor, of a DTensor the part that is here; None: no gradient.
  void add(const pybind11::object& grad);

  void clear();

  at::TensorList list() const { return list_; }

 private:
  using Borrowing = c10::MaybeOwnedTraits<at::Tensor>;

  std::vector<at::Tensor> list_;
  std::vector<pybind11::object> objects_;
};

// The params of a stepper some of which are DTensors.
class Sharded {
 public:
  explicit Sharded(const pybind11::tuple& members);

  bool any() const { return any_; }

  // Each member's gradient, or the part of it that is here. place(param, grad, name) brings a DTensor that is placed
  // otherwise than its param, or another tensor, into place, or raises. Returns whether it was called.
  bool read_grads(const pybind11::object& place, Grads& grads) const;

  // A write to a part does not count as one to its DTensor. Comes before other threads may run: nothing else holds
  // them.
  void bump_versions(const Grads& grads) const;

 private:
  struct Param {
    c10::TensorImpl* tensor;
    pybind11::object spec;  // of a DTensor
    pybind11::object name;
  };

  std::vector<Param> params_;
  bool any_ = false;
};

}  // namespace adamw_ext::python
