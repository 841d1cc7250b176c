#include "dtensor.h"

namespace py = pybind11;

namespace adamw_ext::python {
namespace {

PyTypeObject* dtensor_class = nullptr;

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

}  // namespace

void find_dtensor_class() {
  if (dtensor_class != nullptr) return;
  const auto name = py::str("torch.distributed.tensor");
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
  if (!module || !py::hasattr(module, "DTensor")) return PyErr_Clear();
  dtensor_class = reinterpret_cast<PyTypeObject*>(py::object(module.attr("DTensor")).release().ptr());
}

bool is_dtensor(PyObject* object) { return dtensor_class != nullptr && PyObject_TypeCheck(object, dtensor_class); }

py::object part_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return is_dtensor(tensor) ? attribute(tensor, name) : py::reinterpret_borrow<py::object>(tensor);
}

py::object spec_of(PyObject* dtensor) {
  static PyObject* const name = PyUnicode_InternFromString("_spec");
  return attribute(dtensor, name);
}

bool same_placement(const py::object& spec, const py::object& other) {
  static PyObject* const placements = PyUnicode_InternFromString("placements");
  static PyObject* const mesh = PyUnicode_InternFromString("mesh");
  if (spec.is(other)) return true;
  return attribute(spec.ptr(), placements).equal(attribute(other.ptr(), placements)) &&
         attribute(spec.ptr(), mesh).equal(attribute(other.ptr(), mesh));
}

}  // namespace adamw_ext::python
