#include "groups.h"

#include "tensors.h"

namespace py = pybind11;

namespace adamw_ext::python {
namespace {

struct Keys {
  py::str lr = intern("lr"), betas = intern("betas"), eps = intern("eps"), weight_decay = intern("weight_decay"),
          amsgrad = intern("amsgrad"), maximize = intern("maximize"), capturable = intern("capturable"),
          differentiable = intern("differentiable"), fused = intern("fused"), max_grad_norm = intern("max_grad_norm"),
          seed = intern("seed"), master_weights = intern("master_weights"),
          stochastic_rounding = intern("stochastic_rounding");

  static py::str intern(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }
};

const Keys& keys() {
  static const Keys* const interned = new Keys;  // outlives the interpreter
  return *interned;
}

py::type_error refusal(std::size_t index, const std::string& key, const char* expected, py::handle found) {
  PyErr_Clear();
  return py::type_error("param group " + std::to_string(index) + ": " + key + " must be " + expected + ", but is " +
                        show(found));
}

}  // namespace

GroupReader::GroupReader(py::handle group, std::size_t index)
    : group_(py::reinterpret_borrow<py::object>(group)), index_(index) {
  if (!PyDict_Check(group_.ptr())) throw py::type_error("param group " + std::to_string(index) + " is not a dict");
  // Only str itself is sure to be compared without running code when a key is looked up.
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(group_.ptr(), &position, &key, &value);) {
    ran_python_ |= !PyUnicode_CheckExact(key);
  }
}

GroupOptions GroupReader::read() {
  const Keys& k = keys();
  const py::object betas = get(k.betas);
  ran_python_ |= !PyTuple_CheckExact(betas.ptr()) && !PyList_CheckExact(betas.ptr());
  const auto pair = py::reinterpret_steal<py::object>(PySequence_Fast(betas.ptr(), ""));
  if (!pair || PySequence_Fast_GET_SIZE(pair.ptr()) != 2) throw refusal(index_, "betas", "a pair", betas);
  const auto beta = [&](Py_ssize_t i) {
    return py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(pair.ptr(), i));
  };
  const py::object beta1 = beta(0), beta2 = beta(1);
  GroupOptions options;
  options.hyper.lr = to_double(get(k.lr), k.lr, options, options.lr);
  options.hyper.beta1 = to_double(beta1, k.betas, options, options.beta1);
  options.hyper.beta2 = to_double(beta2, k.betas, options, options.beta2);
  options.hyper.eps = to_double(get(k.eps), k.eps);
  options.hyper.weight_decay = to_double(get(k.weight_decay), k.weight_decay);
  options.hyper.max_grad_norm = to_max_grad_norm(find(k.max_grad_norm));
  options.hyper.seed = to_seed(find(k.seed));
  options.amsgrad = to_bool(get(k.amsgrad), k.amsgrad);
  options.maximize = to_bool(get(k.maximize), k.maximize);
  return options;
}

Flags GroupReader::flags() {
  const Keys& k = keys();
  return {to_bool(get(k.capturable), k.capturable),
          to_bool(get(k.differentiable), k.differentiable),
          to_bool(get(k.fused), k.fused),
          to_master(find(k.master_weights)),
          to_bool(find(k.stochastic_rounding), k.stochastic_rounding) ? Rounding::stochastic : Rounding::nearest,
          !find(k.max_grad_norm).is_none()};
}

py::object GroupReader::get(const py::str& key) const {
  PyObject* value = PyDict_GetItem(group_.ptr(), key.ptr());
  if (value != nullptr) return py::reinterpret_borrow<py::object>(value);
  throw py::key_error("param group " + std::to_string(index_) + " has no '" + std::string(key) + "'");
}

py::object GroupReader::find(const py::str& key) const {
  PyObject* value = PyDict_GetItem(group_.ptr(), key.ptr());
  return value != nullptr ? py::reinterpret_borrow<py::object>(value) : py::none();
}

double GroupReader::to_max_grad_norm(const py::object& value) {
  if (value.is_none()) return no_max_grad_norm;
  if (is_tensor(value.ptr())) throw refusal(index_, "max_grad_norm", "a number or None", value);
  const double norm = to_double(value, keys().max_grad_norm);
  TORCH_CHECK_VALUE(norm >= 0.0, "Invalid max_grad_norm value: ", norm, " in param group ", index_);
  return norm;
}

std::uint64_t GroupReader::to_seed(const py::object& value) const {
  if (value.is_none()) return 0;
  const bool is_int = PyLong_CheckExact(value.ptr());
  const std::uint64_t seed = is_int ? PyLong_AsUnsignedLongLong(value.ptr()) : 0;
  if (!is_int || PyErr_Occurred() != nullptr) throw refusal(index_, "seed", "an int in [0, 2**64)", value);
  return seed;
}

Master GroupReader::to_master(const py::object& value) const {
  if (value.is_none()) return Master::none;
  if (PyUnicode_Check(value.ptr())) {
    const auto is = [&](const char* name) { return PyUnicode_CompareWithASCIIString(value.ptr(), name) == 0; };
    if (is("fp32")) return Master::float32;
    if (is("split")) return Master::remainder;
  }
  throw refusal(index_, "master_weights", "None, 'fp32' or 'split'", value);
}

double GroupReader::to_double(const py::object& value, const py::str& key, GroupOptions& options,
                              at::Tensor& on_device) {
  if (PyFloat_CheckExact(value.ptr()) || !is_tensor(value.ptr())) return to_double(value, key);
  const at::Tensor& tensor = unpack(value.ptr());
  if (tensor.is_cuda() && is_plain(*tensor.unsafeGetTensorImpl()) && tensor.is_floating_point() &&
      holds_number(tensor)) {
    on_device = tensor;
    return 0.0;
  }
  options.host_tensor = &on_device == &options.lr ? "lr" : "betas";
  return to_double(value, key);
}

double GroupReader::to_double(const py::object& value, const py::str& key) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  ran_python_ |= !PyLong_CheckExact(value.ptr());
  if (is_tensor(value.ptr()) && !holds_number(unpack(value.ptr()))) throw refuse_number(value, key);
  const double number = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred() != nullptr) throw refuse_number(value, key);
  return number;
}

bool GroupReader::to_bool(const py::object& value, const py::str& key) {
  ran_python_ |= !PyBool_Check(value.ptr());
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw refusal(index_, std::string(key), "a bool", value);
  return truth == 1;
}

py::type_error GroupReader::refuse_number(const py::object& value, const py::str& key) const {
  return refusal(index_, std::string(key), "a number or a 1-element tensor", value);
}

std::vector<Flags> read_flags(const py::list& param_groups) {
  std::vector<Flags> flags;
  flags.reserve(param_groups.size());
  for (std::size_t i = 0; i < param_groups.size(); ++i) flags.push_back(GroupReader(param_groups[i], i).flags());
  return flags;
}

}  // namespace adamw_ext::python
