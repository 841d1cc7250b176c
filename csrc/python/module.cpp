// The Python module: hands Python's optimizer to the stepper. Only this folder includes Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <set>

#include "../torch/masters.h"
#include "../torch/stepper.h"
#include "dtensor.h"
#include "watch.h"

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

// How messages show a value. A tensor's numbers are not read: they may be the trouble.
std::string show(py::handle value) {
  return is_tensor(value.ptr()) ? "a tensor with " + describe(*unpack(value.ptr()).unsafeGetTensorImpl())
                                : std::string(py::repr(value));
}

py::type_error refusal(std::size_t index, const std::string& key, const char* expected, py::handle found) {
  PyErr_Clear();
  return py::type_error("param group " + std::to_string(index) + ": " + key + " must be " + expected + ", but is " +
                        show(found));
}

// What decides which params a stepper has, where their steps lie and in what form they are kept: another stepper is
// needed when they change.
struct Flags {
  bool capturable, differentiable, fused;
  Master master;
  Rounding rounding;
  bool clips;  // sums of sharded gradients are kept apart

  bool operator==(const Flags& other) const {
    return capturable == other.capturable && differentiable == other.differentiable && fused == other.fused &&
           master == other.master && rounding == other.rounding && clips == other.clips;
  }
};

// Reads one param group. The values are the user's objects: reading them may run any Python code.
class GroupReader {
 public:
  GroupReader(py::handle group, std::size_t index) : group_(py::reinterpret_borrow<py::object>(group)), index_(index) {
    if (!PyDict_Check(group_.ptr())) throw py::type_error("param group " + std::to_string(index) + " is not a dict");
  }

  GroupOptions read() {
    const Keys& k = keys();
    const py::object betas = get(k.betas);
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

  Flags flags() {
    const Keys& k = keys();
    return {to_bool(get(k.capturable), k.capturable),
            to_bool(get(k.differentiable), k.differentiable),
            to_bool(get(k.fused), k.fused),
            to_master(find(k.master_weights)),
            to_bool(find(k.stochastic_rounding), k.stochastic_rounding) ? Rounding::stochastic : Rounding::nearest,
            !find(k.max_grad_norm).is_none()};
  }

  bool ran_python() const { return ran_python_; }

 private:
  py::object get(const py::str& key) const {
    PyObject* value = PyDict_GetItem(group_.ptr(), key.ptr());
    if (value != nullptr) return py::reinterpret_borrow<py::object>(value);
    throw py::key_error("param group " + std::to_string(index_) + " has no '" + std::string(key) + "'");
  }

  // None for a key that the group need not have.
  py::object find(const py::str& key) const {
    PyObject* value = PyDict_GetItem(group_.ptr(), key.ptr());
    return value != nullptr ? py::reinterpret_borrow<py::object>(value) : py::none();
  }

  double to_max_grad_norm(const py::object& value) {
    if (value.is_none()) return no_max_grad_norm;
    if (is_tensor(value.ptr())) throw refusal(index_, "max_grad_norm", "a number or None", value);
    const double norm = to_double(value, keys().max_grad_norm);
    TORCH_CHECK_VALUE(norm >= 0.0, "Invalid max_grad_norm value: ", norm, " in param group ", index_);
    return norm;
  }

  std::uint64_t to_seed(const py::object& value) const {
    if (value.is_none()) return 0;
    const bool is_int = PyLong_CheckExact(value.ptr());
    const std::uint64_t seed = is_int ? PyLong_AsUnsignedLongLong(value.ptr()) : 0;
    if (!is_int || PyErr_Occurred() != nullptr) throw refusal(index_, "seed", "an int in [0, 2**64)", value);
    return seed;
  }

  Master to_master(const py::object& value) const {
    if (value.is_none()) return Master::none;
    if (PyUnicode_Check(value.ptr())) {
      const auto name = value.cast<std::string>();
      if (name == "fp32") return Master::float32;
      if (name == "split") return Master::remainder;
    }
    throw refusal(index_, "master_weights", "None, 'fp32' or 'split'", value);
  }

  // A number that a captured graph can read anew: a CUDA tensor is not read here but goes into `on_device`.
  double to_double(const py::object& value, const py::str& key, GroupOptions& options, at::Tensor& on_device) {
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

  double to_double(const py::object& value, const py::str& key) {
    if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
    ran_python_ |= !PyLong_CheckExact(value.ptr());
    if (is_tensor(value.ptr()) && !holds_number(unpack(value.ptr()))) throw refuse_number(value, key);
    const double number = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred() != nullptr) throw refuse_number(value, key);
    return number;
  }

  bool to_bool(const py::object& value, const py::str& key) {
    ran_python_ |= !PyBool_Check(value.ptr());
    const int truth = PyObject_IsTrue(value.ptr());
    if (truth < 0) throw refusal(index_, std::string(key), "a bool", value);
    return truth == 1;
  }

  py::type_error refuse_number(const py::object& value, const py::str& key) const {
    return refusal(index_, std::string(key), "a number or a 1-element tensor", value);
  }

  py::object group_;
  std::size_t index_;
  bool ran_python_ = false;
};

const at::Tensor& to_tensor(py::handle object, const std::string& name) {
  if (is_tensor(object.ptr())) return unpack(object.ptr());
  throw py::type_error(name + " must be a tensor, but is " + std::string(py::repr(object)));
}

// The tensor, or of a DTensor the part that is here.
const at::Tensor& to_part(py::handle object, const std::string& name) {
  if (!is_dtensor(object.ptr())) return to_tensor(object, name);
  PyObject* part = local_tensor_of(object.ptr());
  if (part == nullptr || !is_tensor(part)) throw py::type_error(name + " has no part in this process");
  return unpack(part);
}

at::Tensor to_optional_tensor(py::handle object, const char* name) {
  return object.is_none() ? at::Tensor() : to_tensor(object, name);
}

// fields: those of Member in adamw_ext/sharded.py.
Member to_member(const py::tuple& fields, const std::vector<Flags>& flags) {
  Member member;
  member.name = fields[3].cast<std::string>();
  member.param = to_part(fields[0], member.name);
  member.group = fields[2].cast<std::int32_t>();
  if (member.group < 0 || static_cast<std::size_t>(member.group) >= flags.size()) {
    throw py::index_error("a member's group does not exist");
  }
  member.deferred = flags[member.group].capturable || (flags[member.group].fused && member.param.is_cuda());
  member.group_master = flags[member.group].master;
  member.rounding = flags[member.group].rounding;
  member.element_number = element_number(fields[4].cast<std::uint64_t>(), fields[5].cast<std::uint64_t>());
  if (!fields[6].is_none()) {
    const auto places = fields[6].cast<std::array<std::uint64_t, 4>>();
    constexpr std::uint64_t most = std::numeric_limits<std::uint32_t>::max();
    if (places[0] < 1 || places[0] > most || places[1] < 1 || places[1] > most) {
      throw py::value_error("a member's places must be of at least 1 and less than 2**32 elements and rows");
    }
    member.places =
        Places{static_cast<std::uint32_t>(places[0]), static_cast<std::uint32_t>(places[1]), places[2], places[3]};
  }
  member.sum = fields[7].cast<std::int32_t>();
  if (member.sum < 0) throw py::value_error("a member's sum must not be negative");
  if (fields[1].is_none()) return member;
  const auto state = fields[1].cast<py::dict>();
  const auto item = [&](const char* key) {
    if (!state.contains(key)) throw py::key_error("the state of " + member.name + " has no '" + key + "'");
    return to_part(state[key], std::string("state '") + key + "' of " + member.name);
  };
  member.step = item("step");
  member.exp_avg = item("exp_avg");
  member.exp_avg_sq = item("exp_avg_sq");
  if (state.contains("max_exp_avg_sq")) member.max_exp_avg_sq = item("max_exp_avg_sq");
  if (member.group_master != Master::none && needs_master(member.param.scalar_type())) {
    member.master = item(member.group_master == Master::float32 ? "master_param" : "param_remainder");
  }
  return member;
}

std::vector<Member> to_members(const py::list& list, const std::vector<Flags>& flags) {
  find_dtensor_class();
  std::vector<Member> members;
  members.reserve(list.size());
  for (const py::handle item : list) members.push_back(to_member(item.cast<py::tuple>(), flags));
  return members;
}

std::vector<Flags> read_flags(const py::list& param_groups) {
  std::vector<Flags> flags;
  flags.reserve(param_groups.size());
  for (std::size_t i = 0; i < param_groups.size(); ++i) flags.push_back(GroupReader(param_groups[i], i).flags());
  return flags;
}

// The gradients of one step. Their Python objects are kept, which keep them: a further C++ owner of a tensor that
// Python has costs a detour through Python.
class Grads {
 public:
  ~Grads() { clear(); }

  // A tensor, of a DTensor the part that is here; None: no gradient.
  void add(const py::object& grad) {
    if (grad.is_none()) {
      list_.emplace_back();
      return;
    }
    const bool is_sharded = is_dtensor(grad.ptr());
    auto object = is_sharded ? py::reinterpret_borrow<py::object>(local_tensor_of(grad.ptr())) : grad;
    if (!object) throw py::type_error("a gradient has no part in this process");
    list_.push_back(Borrowing::createBorrow(to_tensor(object, "a gradient")));
    objects_.push_back(std::move(object));
  }

  void clear() {
    for (at::Tensor& grad : list_) Borrowing::destroyBorrow(grad);
    list_.clear();
    objects_.clear();
  }

  at::TensorList list() const { return list_; }

 private:
  using Borrowing = c10::MaybeOwnedTraits<at::Tensor>;

  std::vector<at::Tensor> list_;
  std::vector<py::object> objects_;
};

// The params of a stepper some of which are DTensors.
class Sharded {
 public:
  explicit Sharded(const py::list& members) {
    for (const py::handle item : members) {
      const auto fields = item.cast<py::tuple>();
      const py::object param = fields[0];
      const bool is_sharded = is_dtensor(param.ptr());
      any_ |= is_sharded;
      py::object spec;
      if (is_sharded) {
        spec = py::reinterpret_borrow<py::object>(spec_of(param.ptr()));
        if (!spec) throw py::type_error(fields[3].cast<std::string>() + " is a DTensor without a placement");
      }
      params_.push_back({unpack(param.ptr()).unsafeGetTensorImpl(), std::move(spec), fields[3]});
    }
  }

  bool any() const { return any_; }

  // Each member's gradient, or the part of it that is here. place(param, grad, name) brings a DTensor that is placed
  // otherwise than its param, or another tensor, into place, or raises. Returns whether it was called.
  bool read_grads(const py::object& place, Grads& grads) const {
    bool placed = false;
    for (const Param& param : params_) {
      const at::Tensor& grad = param.tensor->grad();
      auto object = grad.defined() ? py::reinterpret_steal<py::object>(wrap(grad)) : py::none();
      if (param.spec && grad.defined()) {
        PyObject* spec = is_dtensor(object.ptr()) ? spec_of(object.ptr()) : nullptr;
        if (spec == nullptr || !same_placement(param.spec.ptr(), spec)) {
          placed = true;
          object = place(wrapped(param.tensor), object, param.name);
        }
      }
      grads.add(object);
    }
    return placed;
  }

  // A write to a part does not count as one to its DTensor. Comes before other threads may run: nothing else holds
  // them.
  void bump_versions(const Grads& grads) const {
    for (std::size_t i = 0; i < params_.size(); ++i) {
      if (params_[i].spec && grads.list()[i].defined()) params_[i].tensor->bump_version();
    }
  }

 private:
  struct Param {
    c10::TensorImpl* tensor;
    py::object spec;  // of a DTensor
    py::object name;
  };

  static py::object wrapped(c10::TensorImpl* tensor) {
    using TensorPtr = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
    return py::reinterpret_steal<py::object>(wrap(at::Tensor(TensorPtr::reclaim_copy(tensor))));
  }

  std::vector<Param> params_;
  bool any_ = false;
};

// A stepper over the params and state of one Python optimizer, which lets one thread at a time in.
class PythonStepper {
 public:
  PythonStepper(const py::list& param_groups, const py::dict& state, const py::list& members,
                std::shared_ptr<HyperMirror> mirror, std::shared_ptr<DeviceNumbers> skips,
                std::shared_ptr<DeviceNumbers> norms, py::object place_grad, py::object complete_sum)
      : flags_(read_flags(param_groups)),
        stepper_(to_members(members, flags_)),
        mirror_(std::move(mirror)),
        skips_(std::move(skips)),
        norms_(std::move(norms)),
        sharded_(members),
        place_grad_(std::move(place_grad)),
        complete_sum_(std::move(complete_sum)),
        groups_(param_groups.size()),
        member_count_(members.size()) {
    watch_.remember(param_groups.ptr(), state.ptr());
    std::set<std::size_t> used;
    for (const py::handle member : members) used.insert(member.cast<py::tuple>()[2].cast<std::size_t>());
    used_groups_.assign(used.begin(), used.end());
  }

  // False: the containers have changed, or a param needs state, so a new stepper must be made. grads: one tensor or
  // None per member; None: each param's own .grad.
  bool step(const py::list& param_groups, const py::dict& state, py::handle grad_scale, py::handle found_inf,
            const std::optional<py::list>& grads) {
    started_ = false;
    if (!watch_.matches(param_groups.ptr(), state.ptr())) return false;
    bool ran_python = false;
    for (const std::size_t i : used_groups_) {
      if (i >= param_groups.size()) return false;
      GroupReader reader(param_groups[i], i);
      groups_[i] = reader.read();
      groups_[i].capturable = flags_[i].capturable;
      check_hyper(groups_[i].hyper, static_cast<std::int64_t>(i));
      if (!(reader.flags() == flags_[i])) return false;
      ran_python |= reader.ran_python();
    }
    if (ran_python && !watch_.matches(param_groups.ptr(), state.ptr())) return false;
    const at::Tensor scale = to_optional_tensor(grad_scale, "grad_scale");
    const at::Tensor found = to_optional_tensor(found_inf, "found_inf");
    const Releasing at_the_end{grads_};
    if (grads) {
      read_grads(*grads);
    } else if (sharded_.any()) {
      const bool ran_more = sharded_.read_grads(place_grad_, grads_);
      if (ran_more && !watch_.matches(param_groups.ptr(), state.ptr())) return false;
    }
    const Stepper::Ready ready =
        stepper_.prepare({groups_, grads_.list(), scale, found, mirror_.get(), skips_.get(), norms_.get()});
    if (ready == Stepper::Ready::needs_state) return false;
    if (ready == Stepper::Ready::skip) return true;
    started_ = true;
    if (sharded_.any()) sharded_.bump_versions(grads_);
    if (stepper_.is_long()) {
      const py::gil_scoped_release unlocked;
      run();
    } else {
      run();
    }
    stepper_.finish();
    return true;
  }

  Tuning& tuning() { return stepper_.tuning; }

  // Whether the latest step() got as far as changing something. An error after that must not lead to another try.
  bool started() const { return started_; }

 private:
  // Gradients are held no longer than a step, also where that raises.
  struct Releasing {
    Grads& grads;
    ~Releasing() { grads.clear(); }
  };

  void run() {
    stepper_.measure([&](std::int32_t sum, const at::Tensor& part) {
      const py::gil_scoped_acquire locked;
      return to_tensor(complete_sum_(sum, py::reinterpret_steal<py::object>(wrap(part))), "a sum of squares");
    });
    stepper_.run();
  }

  void read_grads(const py::list& list) {
    if (list.size() != member_count_) {
      throw py::value_error("grads must have one entry for each of the " + std::to_string(member_count_) +
                            " members, but has " + std::to_string(list.size()));
    }
    for (const py::handle grad : list) grads_.add(py::reinterpret_borrow<py::object>(grad));
  }

  std::vector<Flags> flags_;  // of all param groups, as when the stepper was made
  Stepper stepper_;
  std::shared_ptr<HyperMirror> mirror_;
  std::shared_ptr<DeviceNumbers> skips_;
  std::shared_ptr<DeviceNumbers> norms_;
  Sharded sharded_;
  py::object place_grad_;    // see Sharded::read_grads
  py::object complete_sum_;  // CompleteSum
  Grads grads_;
  Watch watch_;
  std::vector<GroupOptions> groups_;  // of all param groups; those without a member here are never read
  std::vector<std::size_t> used_groups_;
  std::size_t member_count_;
  bool started_ = false;
};

void sync_mirror(HyperMirror& mirror, const py::list& param_groups) {
  mirror.sync([&](std::int32_t group) {
    const auto index = static_cast<std::size_t>(group);
    if (index >= param_groups.size()) throw py::index_error("a captured step has more param groups than there are");
    const GroupOptions options = GroupReader(param_groups[index], index).read();
    const Hyper hyper = read_on_host(options);
    check_hyper(hyper, group);
    return hyper;
  });
}

py::object number_on(DeviceNumbers& numbers, const std::string& device) {
  return py::reinterpret_steal<py::object>(wrap(numbers.on(c10::Device(device))));
}

std::shared_ptr<DeviceNumbers> make_numbers(const std::string& dtype) {
  if (dtype != "int64" && dtype != "float64") throw py::value_error("dtype must be int64 or float64, but is " + dtype);
  return std::make_shared<DeviceNumbers>(dtype == "int64" ? c10::kLong : c10::kDouble);
}

py::tuple split_of(py::handle master) {
  const auto [param, remainder] = split_master(to_tensor(master, "master"));
  return py::make_tuple(py::reinterpret_steal<py::object>(wrap(param)),
                        py::reinterpret_steal<py::object>(wrap(remainder)));
}

py::object joined(py::handle param, py::handle remainder) {
  return py::reinterpret_steal<py::object>(
      wrap(join_master(to_tensor(param, "param"), to_tensor(remainder, "remainder"))));
}

// Whether each tensor of one list is its counterpart in the other, or a view of the very same elements.
bool same_memory(const py::list& tensors, const py::list& others) {
  const auto same = [](const at::Tensor& a, const at::Tensor& b) {
    return a.is_same(b) || (a.has_storage() && b.has_storage() && a.dtype() == b.dtype() && a.device() == b.device() &&
                            a.sizes() == b.sizes() && a.strides() == b.strides() && a.is_conj() == b.is_conj() &&
                            a.is_neg() == b.is_neg() && a.const_data_ptr() == b.const_data_ptr());
  };
  if (tensors.size() != others.size()) return false;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const py::handle tensor = tensors[i], other = others[i];
    if (!is_tensor(tensor.ptr()) || !is_tensor(other.ptr())) throw py::type_error("the lists must hold tensors");
    if (!same(unpack(tensor.ptr()), unpack(other.ptr()))) return false;
  }
  return true;
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::supported_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

// (param, moments, master, rounding) of every combination.
std::vector<std::tuple<std::string, std::string, std::string, std::string>> combinations() {
  return {
#define ADAMW_EXT_NAMES(index, param, moments, master, rounding) {#param, #moments, #master, #rounding},
      ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_NAMES)
#undef ADAMW_EXT_NAMES
  };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::class_<PythonStepper>(module, "Stepper")
      .def(py::init<const py::list&, const py::dict&, const py::list&, std::shared_ptr<HyperMirror>,
                    std::shared_ptr<DeviceNumbers>, std::shared_ptr<DeviceNumbers>, py::object, py::object>(),
           py::arg("param_groups"), py::arg("state"), py::arg("members"), py::arg("mirror"), py::arg("skips"),
           py::arg("norms"), py::arg("place_grad"), py::arg("complete_sum"))
      .def("step", &PythonStepper::step, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("grads") = py::none())
      .def_property_readonly("isa", [](PythonStepper& self) { return cpu::isa_name(self.tuning().isa); })
      .def_property_readonly("started", &PythonStepper::started)
      .def_property(
          "units_per_chunk", [](PythonStepper& self) { return self.tuning().units_per_chunk; },
          [](PythonStepper& self, std::int64_t units) { self.tuning().units_per_chunk = units; })
      .def_property(
          "emulated_arguments", [](PythonStepper& self) { return self.tuning().emulated_arguments; },
          [](PythonStepper& self, int bytes) { self.tuning().emulated_arguments = bytes; });
  py::class_<DeviceNumbers, std::shared_ptr<DeviceNumbers>>(module, "DeviceNumbers")
      .def(py::init(&make_numbers), py::arg("dtype"))
      .def("on", &number_on, py::arg("device"));
  py::class_<HyperMirror, std::shared_ptr<HyperMirror>>(module, "HyperMirror")
      .def(py::init<>())
      .def("sync", &sync_mirror, py::arg("param_groups"));
  module.def("split_master", &split_of, py::arg("master"));
  module.def("join_master", &joined, py::arg("param"), py::arg("remainder"));
  module.def("same_memory", &same_memory, py::arg("tensors"), py::arg("others"));
  module.def("isa_levels", &isa_levels);
  module.def("chosen_isa", [] { return cpu::isa_name(cpu::choose_isa()); });
  module.def("combinations", &combinations);
  module.attr("cuda_kernels") = has_kernels(c10::kCUDA);
  module.attr("cuda_architectures") = ADAMW_EXT_CUDA_ARCHITECTURES;
  module.attr("built_with_torch") = ADAMW_EXT_BUILT_WITH_TORCH;
  module.attr("compiler") = ADAMW_EXT_COMPILER;
}

}  // namespace adamw_ext::python
