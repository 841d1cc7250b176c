#include "watch.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "dtensor.h"

namespace adamw_ext::python {
namespace {

// A tensor's identity is its implementation: torch.utils.swap_tensors exchanges those under one Python object. Whether
// an object is an instance of torch.Tensor takes Python's machinery, except for the classes that come first.
const void* identity(PyObject* object) {
  return THPVariable_CheckExact(object) || is_dtensor(object) || THPVariable_Check(object)
             ? static_cast<const void*>(THPVariable_Unpack(object).unsafeGetTensorImpl())
             : static_cast<const void*>(object);
}

#if PY_VERSION_HEX < 0x030e0000
// A number that no other dict, and no other content of this dict, ever has.
const void* content(PyObject* dict) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<const void*>(reinterpret_cast<PyDictObject*>(dict)->ma_version_tag);
#pragma GCC diagnostic pop
}

template <class Visit>
bool walk_dict(PyObject* dict, const Visit& visit) {
  return visit(content(dict));
}
#else
template <class Visit>
bool walk_dict(PyObject* dict, const Visit& visit) {
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value);) {
    if (!visit(key) || !visit(value) || !visit(identity(value))) return false;
  }
  return true;
}
#endif

// A group's list of params; null if it has none.
PyObject* params_of(PyObject* group) {
  static PyObject* const key = PyUnicode_InternFromString("params");
  PyObject* params = PyDict_Check(group) ? PyDict_GetItem(group, key) : nullptr;
  return params != nullptr && PyList_Check(params) ? params : nullptr;
}

// Calls visit(identity) for each object in a fixed order until one call returns false; returns whether none did.
template <class Visit>
bool walk(PyObject* param_groups, PyObject* state, const Visit& visit) {
  const Py_ssize_t group_count = PyList_GET_SIZE(param_groups);
  for (Py_ssize_t g = 0; g < group_count; ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(param_groups, g));
    if (params == nullptr) return false;
    const Py_ssize_t param_count = PyList_GET_SIZE(params);
    for (Py_ssize_t i = 0; i < param_count; ++i) {
      PyObject* param = PyList_GET_ITEM(params, i);
      if (!visit(param) || !visit(identity(param))) return false;
    }
    if (!visit(params)) return false;  // also marks where the group ends
  }
  PyObject *owner, *items;
  for (Py_ssize_t position = 0; PyDict_Next(state, &position, &owner, &items);) {
    if (!visit(owner) || !visit(items) || (PyDict_Check(items) && !walk_dict(items, visit))) return false;
  }
  return true;
}

const void* part_identity(PyObject* dtensor) {
  PyObject* part = local_tensor_of(dtensor);
  return part == nullptr ? nullptr : identity(part);
}

// Calls visit(dtensor) for each DTensor of a list or among the values of a dict.
template <class Visit>
void for_each_dtensor(PyObject* container, const Visit& visit) {
  if (PyList_Check(container)) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) {
      if (is_dtensor(PyList_GET_ITEM(container, i))) visit(PyList_GET_ITEM(container, i));
    }
  } else if (PyDict_Check(container)) {
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(container, &position, &key, &value);) {
      if (is_dtensor(value)) visit(value);
    }
  }
}

}  // namespace

void Watch::remember(PyObject* param_groups, PyObject* state) {
  seen_.clear();
  walk(param_groups, state, [&](const void* object) {
    seen_.push_back(object);
    return true;
  });
  dtensors_.clear();
  const auto remember_parts = [&](PyObject* dtensor) {
    dtensors_.push_back({dtensor, part_identity(dtensor), spec_of(dtensor)});
  };
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* params = params_of(PyList_GET_ITEM(param_groups, g));
    if (params != nullptr) for_each_dtensor(params, remember_parts);
  }
  PyObject *owner, *items;
  for (Py_ssize_t position = 0; PyDict_Next(state, &position, &owner, &items);) {
    for_each_dtensor(items, remember_parts);
  }
}

bool Watch::matches(PyObject* param_groups, PyObject* state) const {
  auto expected = seen_.begin();
  const auto end = seen_.end();
  const auto is_expected = [&](const void* object) { return expected != end && *expected++ == object; };
  return walk(param_groups, state, is_expected) && expected == end &&
         std::all_of(dtensors_.begin(), dtensors_.end(), [](const Whole& whole) {
           return part_identity(whole.dtensor) == whole.part && spec_of(whole.dtensor) == whole.spec;
         });
}

}  // namespace adamw_ext::python
