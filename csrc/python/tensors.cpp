#include "tensors.h"

#include <torch/csrc/autograd/python_variable.h>

#include "../torch/memory.h"
#include "dtensor.h"

namespace py = pybind11;

namespace adamw_ext::python {

const at::Tensor& unpack(PyObject* tensor) { return THPVariable_Unpack(tensor); }
PyObject* wrap(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }

std::string show(py::handle value) {
  if (is_tensor(value.ptr())) return "a tensor with " + describe(*unpack(value.ptr()).unsafeGetTensorImpl());
  return py::module_::import("adamw_ext.messages").attr("show")(value).cast<std::string>();
}

const at::Tensor& to_tensor(py::handle object, const std::string& name) {
  if (is_tensor(object.ptr())) return unpack(object.ptr());
  throw py::type_error(name + " must be a tensor, but is " + show(object));
}

const at::Tensor& to_part(py::handle object, const std::string& name) {
  if (!is_dtensor(object.ptr())) return to_tensor(object, name);
  PyObject* part = local_tensor_of(object.ptr());
  if (part == nullptr || !is_tensor(part)) throw py::type_error(name + " has no part in this process");
  return unpack(part);
}

at::Tensor to_optional_tensor(py::handle object, const char* name) {
  return object.is_none() ? at::Tensor() : to_tensor(object, name);
}

}  // namespace adamw_ext::python
