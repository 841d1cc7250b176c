// Whether an optimizer's Python containers still hold the objects that its stepper was built from.
//
// Users and libraries edit `param_groups` and `state` between steps: they swap params, replace or delete state, add
// groups. A watch compares identities, a few nanoseconds an object and no hashing, so that every step can look.
#pragma once

#include <Python.h>

#include <vector>

namespace adamw_ext::python {

class Watch {
 public:
  // Remembers every param of every group, and every item of the state. Borrows: the stepper's weak references see to
  // it that no other tensor can come to stand at a remembered address.
  void remember(PyObject* param_groups, PyObject* state);
  bool matches(PyObject* param_groups, PyObject* state) const;

 private:
  // A DTensor's part and spec can be replaced under it.
  struct Whole {
    PyObject* dtensor;  // as long as what was seen is there
    const void* part;
    PyObject* spec;
  };

  std::vector<const void*> seen_;
  std::vector<Whole> dtensors_;
};

}  // namespace adamw_ext::python
