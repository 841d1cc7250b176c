// torch's DTensor: a tensor of which this process holds a part, `_local_tensor`, that `_spec` describes.
//
// Its class is Python's. Nothing here imports it: an optimizer can only have DTensors when somebody else has. Every
// step looks at several attributes of every DTensor, so they are read from their place in the object: they are in
// __slots__.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

namespace adamw_ext::python {

struct DTensorClass {
  PyTypeObject* type = nullptr;
  Py_ssize_t local_tensor = 0;  // where an object has it
  Py_ssize_t spec = 0;
};
extern DTensorClass dtensor_class;

// Looks the class up, if its module has been imported. Comes before all below.
void find_dtensor_class();

inline bool is_dtensor(PyObject* object) {
  return dtensor_class.type != nullptr && PyObject_TypeCheck(object, dtensor_class.type);
}

// Borrowed; null where it was deleted.
inline PyObject* slot_of(PyObject* dtensor, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(dtensor) + offset);
}
inline PyObject* local_tensor_of(PyObject* dtensor) { return slot_of(dtensor, dtensor_class.local_tensor); }
inline PyObject* spec_of(PyObject* dtensor) { return slot_of(dtensor, dtensor_class.spec); }

// Whether two DTensors with these specs are cut alike and lie on the same processes.
bool same_placement(PyObject* spec, PyObject* other);

}  // namespace adamw_ext::python
