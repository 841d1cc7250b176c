#include "dtensor.h"

#include <structmember.h>

namespace py = pybind11;

namespace adamw_ext::python {

DTensorClass dtensor_class;

namespace {

Py_ssize_t offset_of(const py::object& type, const char* name) {
  const py::object descriptor = type.attr(name);
  if (Py_IS_TYPE(descriptor.ptr(), &PyMemberDescr_Type)) {
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member;
    if (member->type == T_OBJECT_EX) return member->offset;
  }
  throw py::type_error(std::string("this torch's DTensor does not have '") + name +
                       "' in its __slots__: adamw_ext has to be adapted to it");
}

}  // namespace

void find_dtensor_class() {
  if (dtensor_class.type != nullptr) return;
  const auto name = py::str("torch.distributed.tensor");
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
  if (!module || !py::hasattr(module, "DTensor")) return PyErr_Clear();
  py::object type = module.attr("DTensor");
  dtensor_class.local_tensor = offset_of(type, "_local_tensor");
  dtensor_class.spec = offset_of(type, "_spec");
  dtensor_class.type = reinterpret_cast<PyTypeObject*>(type.release().ptr());
}

bool same_placement(PyObject* spec, PyObject* other) {
  if (spec == other) return true;
  const py::handle a(spec), b(other);
  return py::object(a.attr("placements")).equal(b.attr("placements")) &&
         py::object(a.attr("mesh")).equal(b.attr("mesh"));
}

}  // namespace adamw_ext::python
