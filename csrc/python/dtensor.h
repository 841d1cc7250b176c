// torch's DTensor: a tensor of which this process holds a part, `_local_tensor`, that `_spec` describes.
//
// Its class is Python's. Nothing here imports it: an optimizer can only have DTensors when somebody else has.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <ATen/core/Tensor.h>

namespace adamw_ext::python {

// Looks the class up, if its module has been imported. Comes before the two below.
void find_dtensor_class();

bool is_dtensor(PyObject* object);

// The tensor itself, unless it is a DTensor. Requires a tensor; a new reference.
pybind11::object part_of(PyObject* tensor);

pybind11::object spec_of(PyObject* dtensor);

// Whether two DTensors with these specs are cut alike and lie on the same processes.
bool same_placement(const pybind11::object& spec, const pybind11::object& other);

}  // namespace adamw_ext::python
