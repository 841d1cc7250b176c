// Tensors as Python has them, and as C++ has them.
#pragma once

#include <pybind11/pybind11.h>

#include <ATen/core/Tensor.h>

#include <string>

namespace adamw_ext::python {

// Requires a tensor; the caller has checked.
const at::Tensor& unpack(PyObject* tensor);
bool is_tensor(PyObject* object);
PyObject* wrap(const at::Tensor& tensor);  // a new reference

// How messages show a value. A tensor's numbers are not read, wherever it is: they may be the trouble.
std::string show(pybind11::handle value);

// These throw a TypeError that begins with `name` where the object is no tensor.
const at::Tensor& to_tensor(pybind11::handle object, const std::string& name);
at::Tensor to_optional_tensor(pybind11::handle object, const char* name);  // None: undefined

// The tensor, or of a DTensor the part that is here.
const at::Tensor& to_part(pybind11::handle object, const std::string& name);

}  // namespace adamw_ext::python
