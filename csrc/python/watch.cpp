#include "watch.h"

#include <torch/csrc/autograd/python_variable.h>

namespace adamw_ext::python {

const at::Tensor& unpack(PyObject* tensor) { return THPVariable_Unpack(tensor); }

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }

namespace {

// A tensor's identity is its implementation: torch.utils.swap_tensors exchanges those under one Python object.
const void* identity(PyObject* object) {
  return THPVariable_CheckExact(object) || THPVariable_Check(object)
             ? static_cast<const void*>(THPVariable_Unpack(object).unsafeGetTensorImpl())
                                   : static_cast<const void*>(object);
}

// Calls visit(identity) for each object in a fixed order until one call returns false; returns whether none did.
template <class Visit>
bool walk(PyObject* param_groups, PyObject* state, const Visit& visit) {
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  const Py_ssize_t group_count = PyList_GET_SIZE(param_groups);
  for (Py_ssize_t g = 0; g < group_count; ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, g);
    PyObject* params = PyDict_Check(group) ? PyDict_GetItem(group, params_key) : nullptr;
    if (params == nullptr || !PyList_Check(params)) return visit(nullptr);
    const Py_ssize_t param_count = PyList_GET_SIZE(params);
    for (Py_ssize_t i = 0; i < param_count; ++i) {
      if (!visit(identity(PyList_GET_ITEM(params, i)))) return false;
    }
    if (!visit(params)) return false;  // also marks where the group ends
  }
  PyObject *owner, *items, *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(state, &position, &owner, &items);) {
    if (!visit(identity(owner)) || !visit(items)) return false;
    if (!PyDict_Check(items)) continue;
    for (Py_ssize_t inner = 0; PyDict_Next(items, &inner, &key, &value);) {
      if (!visit(key) || !visit(identity(value))) return false;
    }
  }
  return true;
}

}  // namespace

void Watch::remember(PyObject* param_groups, PyObject* state) {
  seen_.clear();
  walk(param_groups, state, [&](const void* object) {
    seen_.push_back(object);
    return true;
  });
}

bool Watch::matches(PyObject* param_groups, PyObject* state) const {
  auto expected = seen_.begin();
  const auto end = seen_.end();
  return walk(param_groups, state, [&](const void* object) { return expected != end && *expected++ == object; }) &&
         expected == end;
}

}  // namespace adamw_ext::python
