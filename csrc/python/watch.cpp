#include "watch.h"

#include <torch/csrc/autograd/python_variable.h>

#include "dtensor.h"

namespace adamw_ext::python {

const at::Tensor& unpack(PyObject* tensor) { return THPVariable_Unpack(tensor); }
PyObject* wrap(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }

namespace {

// A tensor's identity is its implementation: torch.utils.swap_tensors exchanges those under one Python object.
const void* identity(PyObject* object) {
  return THPVariable_CheckExact(object) || THPVariable_Check(object)
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
    if (!visit(key) || !visit(identity(value))) return false;
  }
  return true;
}
#endif

// A DTensor's part and spec can be replaced under it.
template <class Visit>
bool walk_dtensor(PyObject* object, const Visit& visit) {
  return !is_dtensor(object) || (visit(identity(part_of(object).ptr())) && visit(spec_of(object).ptr()));
}

template <class Visit>
bool walk_dtensors(PyObject* dict, const Visit& visit) {
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value);) {
    if (!walk_dtensor(value, visit)) return false;
  }
  return true;
}

// Calls visit(identity) for each object in a fixed order until one call returns false; returns whether none did.
template <class Visit>
bool walk(PyObject* param_groups, PyObject* state, bool has_dtensors, const Visit& visit) {
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  const Py_ssize_t group_count = PyList_GET_SIZE(param_groups);
  for (Py_ssize_t g = 0; g < group_count; ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, g);
    PyObject* params = PyDict_Check(group) ? PyDict_GetItem(group, params_key) : nullptr;
    if (params == nullptr || !PyList_Check(params)) return visit(nullptr);
    const Py_ssize_t param_count = PyList_GET_SIZE(params);
    for (Py_ssize_t i = 0; i < param_count; ++i) {
      PyObject* param = PyList_GET_ITEM(params, i);
      if (!visit(identity(param)) || (has_dtensors && !walk_dtensor(param, visit))) return false;
    }
    if (!visit(params)) return false;  // also marks where the group ends
  }
  PyObject *owner, *items;
  for (Py_ssize_t position = 0; PyDict_Next(state, &position, &owner, &items);) {
    if (!visit(owner) || !visit(items)) return false;
    if (!PyDict_Check(items)) continue;
    if (!walk_dict(items, visit) || (has_dtensors && !walk_dtensors(items, visit))) return false;
  }
  return true;
}

}  // namespace

void Watch::remember(PyObject* param_groups, PyObject* state, bool has_dtensors) {
  has_dtensors_ = has_dtensors;
  seen_.clear();
  walk(param_groups, state, has_dtensors_, [&](const void* object) {
    seen_.push_back(object);
    return true;
  });
}

bool Watch::matches(PyObject* param_groups, PyObject* state) const {
  auto expected = seen_.begin();
  const auto end = seen_.end();
  const auto is_expected = [&](const void* object) { return expected != end && *expected++ == object; };
  return walk(param_groups, state, has_dtensors_, is_expected) && expected == end;
}

}  // namespace adamw_ext::python
