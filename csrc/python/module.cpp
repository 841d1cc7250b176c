// The Python module: hands Python's optimizer to the stepper. Only this folder includes Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>

#include "../torch/stepper.h"
#include "watch.h"

namespace py = pybind11;

namespace adamw_ext::python {
namespace {

struct Keys {
  py::str lr = intern("lr"), betas = intern("betas"), eps = intern("eps"), weight_decay = intern("weight_decay"),
          amsgrad = intern("amsgrad"), maximize = intern("maximize");

  static py::str intern(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }
};

const Keys& keys() {
  static const Keys* const interned = new Keys;  // outlives the interpreter
  return *interned;
}

PyObject* get(PyObject* group, const py::str& key, std::size_t index) {
  PyObject* value = PyDict_GetItem(group, key.ptr());
  if (value == nullptr)
    throw py::key_error("param group " + std::to_string(index) + " has no '" + std::string(key) + "'");
  return value;
}

double to_double(PyObject* value, const py::str& key, std::size_t index) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double number = PyFloat_AsDouble(value);
  if (PyErr_Occurred() == nullptr) return number;
  PyErr_Clear();
  throw py::type_error("param group " + std::to_string(index) + ": " + std::string(key) +
                       " must be a number or a 1-element tensor, but is " + std::string(py::repr(py::handle(value))));
}

bool to_bool(PyObject* value) { return PyObject_IsTrue(value) == 1; }

GroupOptions read_group(PyObject* group, std::size_t index) {
  const Keys& k = keys();
  if (!PyDict_Check(group)) throw py::type_error("param group " + std::to_string(index) + " is not a dict");
  PyObject* betas = get(group, k.betas, index);
  const auto pair = py::reinterpret_steal<py::object>(PySequence_Fast(betas, "betas must be a pair"));
  if (!pair || PySequence_Fast_GET_SIZE(pair.ptr()) != 2) {
    PyErr_Clear();
    throw py::type_error("param group " + std::to_string(index) + ": betas must be a pair");
  }
  GroupOptions options;
  options.hyper.lr = to_double(get(group, k.lr, index), k.lr, index);
  options.hyper.beta1 = to_double(PySequence_Fast_GET_ITEM(pair.ptr(), 0), k.betas, index);
  options.hyper.beta2 = to_double(PySequence_Fast_GET_ITEM(pair.ptr(), 1), k.betas, index);
  options.hyper.eps = to_double(get(group, k.eps, index), k.eps, index);
  options.hyper.weight_decay = to_double(get(group, k.weight_decay, index), k.weight_decay, index);
  options.amsgrad = to_bool(get(group, k.amsgrad, index));
  options.maximize = to_bool(get(group, k.maximize, index));
  return options;
}

at::Tensor to_tensor(py::handle object, const std::string& name) {
  if (object.is_none()) return {};
  if (!is_tensor(object.ptr()))
    throw py::type_error(name + " must be a tensor, but is " + std::string(py::repr(object)));
  return unpack(object.ptr());
}

Member to_member(const py::tuple& fields) {
  Member member;
  member.name = fields[3].cast<std::string>();
  member.param = to_tensor(fields[0], member.name);
  member.group = fields[2].cast<std::int32_t>();
  if (fields[1].is_none()) return member;
  const auto state = fields[1].cast<py::dict>();
  const auto item = [&](const char* key) {
    if (!state.contains(key)) throw py::key_error("the state of " + member.name + " has no '" + key + "'");
    return to_tensor(state[key], std::string("state '") + key + "' of " + member.name);
  };
  member.step = item("step");
  member.exp_avg = item("exp_avg");
  member.exp_avg_sq = item("exp_avg_sq");
  if (state.contains("max_exp_avg_sq")) member.max_exp_avg_sq = item("max_exp_avg_sq");
  return member;
}

std::vector<Member> to_members(const py::list& list) {
  std::vector<Member> members;
  members.reserve(list.size());
  for (const py::handle item : list) members.push_back(to_member(item.cast<py::tuple>()));
  return members;
}

// A stepper over the params and state of one Python optimizer, which lets one thread at a time in.
class PythonStepper {
 public:
  PythonStepper(const py::list& param_groups, const py::dict& state, const py::list& members)
      : PythonStepper(param_groups, state, to_members(members)) {}

  // False: the containers have changed, or a param needs state, so a new stepper must be made.
  bool step(const py::list& param_groups, const py::dict& state, py::handle grad_scale, py::handle found_inf) {
    if (!watch_.matches(param_groups.ptr(), state.ptr())) return false;
    for (const std::size_t i : used_groups_) {
      groups_[i] = read_group(PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i)), i);
      check_hyper(groups_[i].hyper, static_cast<std::int64_t>(i));
    }
    const at::Tensor scale = to_tensor(grad_scale, "grad_scale"), found = to_tensor(found_inf, "found_inf");
    const Stepper::Ready ready = stepper_.prepare({groups_, {}, scale, found});
    if (ready == Stepper::Ready::needs_state) return false;
    if (ready == Stepper::Ready::skip) return true;
    if (stepper_.is_long()) {
      const py::gil_scoped_release unlocked;
      stepper_.run();
    } else {
      stepper_.run();
    }
    stepper_.finish();
    return true;
  }

  const char* isa() const { return cpu::isa_name(stepper_.isa()); }
  std::int64_t units_per_chunk() const { return stepper_.units_per_chunk; }
  void set_units_per_chunk(std::int64_t units) { stepper_.units_per_chunk = units; }

 private:
  PythonStepper(const py::list& param_groups, const py::dict& state, const std::vector<Member>& members)
      : stepper_(members), groups_(param_groups.size()) {
    watch_.remember(param_groups.ptr(), state.ptr());
    std::set<std::size_t> used;
    for (const Member& member : members) used.insert(static_cast<std::size_t>(member.group));
    used_groups_.assign(used.begin(), used.end());
  }

  Stepper stepper_;
  Watch watch_;
  std::vector<GroupOptions> groups_;  // of all param groups; those without a member here are never read
  std::vector<std::size_t> used_groups_;
};

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::supported_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

std::vector<std::pair<std::string, std::string>> combinations() {
  return {
#define ADAMW_EXT_NAMES(index, param, moments) {#param, #moments},
      ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_NAMES)
#undef ADAMW_EXT_NAMES
  };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::class_<PythonStepper>(module, "Stepper")
      .def(py::init<const py::list&, const py::dict&, const py::list&>(), py::arg("param_groups"), py::arg("state"),
           py::arg("members"))
      .def("step", &PythonStepper::step, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale"),
           py::arg("found_inf"))
      .def_property_readonly("isa", &PythonStepper::isa)
      .def_property("units_per_chunk", &PythonStepper::units_per_chunk, &PythonStepper::set_units_per_chunk);
  module.def("isa_levels", &isa_levels);
  module.def("chosen_isa", [] { return cpu::isa_name(cpu::choose_isa()); });
  module.def("combinations", &combinations);
  module.attr("built_with_torch") = ADAMW_EXT_BUILT_WITH_TORCH;
  module.attr("compiler") = ADAMW_EXT_COMPILER;
}

}  // namespace adamw_ext::python
