// The Python module: hands Python's optimizer to the stepper. Only this folder includes Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <set>

#include "../torch/masters.h"
#include "../torch/stepper.h"
#include "../torch/stepping.h"
#include "grads.h"
#include "groups.h"
#include "members.h"
#include "tensors.h"
#include "unlocked.h"
#include "watch.h"

namespace py = pybind11;

namespace adamw_ext::python {
namespace {

// The functions of this module take any object and read it with this. Where no overload takes the arguments, pybind11
// would print them, and of a tensor whose memory was freed the process would die.
template <class T>
T read_as(py::handle argument, const char* name) {
  py::detail::make_caster<T> caster;
  if (!caster.load(argument, /*convert=*/true)) {
    throw py::type_error(std::string(name) + " cannot be " + show(argument));
  }
  return py::detail::cast_op<T>(std::move(caster));
}

// A stepper over the params and state of one Python optimizer, which lets one thread at a time in.
class PythonStepper {
 public:
  PythonStepper(const py::list& param_groups, const py::dict& state, const py::tuple& members,
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
  bool step(py::handle groups_object, py::handle state_object, py::handle grad_scale, py::handle found_inf,
            py::handle grads) {
    const auto param_groups = read_as<py::list>(groups_object, "param_groups");
    const auto state = read_as<py::dict>(state_object, "state");
    if (stepping_) throw std::runtime_error("step() was called while a step of the same stepper is being made");
    const Stepping until_the_end(stepping_);
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
    if (!grads.is_none()) {
      read_grads(read_as<py::list>(grads, "grads"));
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
      without_interpreter_lock([&] { run(); });
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
  bool stepping_ = false;
};

std::unique_ptr<PythonStepper> make_stepper(py::handle param_groups, py::handle state, py::handle members,
                                            py::handle mirror, py::handle skips, py::handle norms,
                                            py::object place_grad, py::object complete_sum) {
  return std::make_unique<PythonStepper>(
      read_as<py::list>(param_groups, "param_groups"), read_as<py::dict>(state, "state"),
      checked_members(read_as<py::list>(members, "members")), read_as<std::shared_ptr<HyperMirror>>(mirror, "mirror"),
      read_as<std::shared_ptr<DeviceNumbers>>(skips, "skips"), read_as<std::shared_ptr<DeviceNumbers>>(norms, "norms"),
      std::move(place_grad), std::move(complete_sum));
}

void sync_mirror(HyperMirror& mirror, py::handle groups_object) {
  const auto param_groups = read_as<py::list>(groups_object, "param_groups");
  mirror.sync([&](std::int32_t group) {
    const auto index = static_cast<std::size_t>(group);
    if (index >= param_groups.size()) throw py::index_error("a captured step has more param groups than there are");
    const GroupOptions options = GroupReader(param_groups[index], index).read();
    const Hyper hyper = read_on_host(options);
    check_hyper(hyper, group);
    return hyper;
  });
}

py::object number_on(DeviceNumbers& numbers, py::handle device) {
  return py::reinterpret_steal<py::object>(wrap(numbers.on(c10::Device(read_as<std::string>(device, "device")))));
}

std::shared_ptr<DeviceNumbers> make_numbers(py::handle name) {
  const auto dtype = read_as<std::string>(name, "dtype");
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
bool same_memory(py::handle first, py::handle second) {
  const auto tensors = read_as<py::list>(first, "tensors"), others = read_as<py::list>(second, "others");
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
      .def(py::init(&make_stepper), py::arg("param_groups"), py::arg("state"), py::arg("members"), py::arg("mirror"),
           py::arg("skips"), py::arg("norms"), py::arg("place_grad"), py::arg("complete_sum"))
      .def("step", &PythonStepper::step, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("grads") = py::none())
      .def_property_readonly("isa", [](PythonStepper& self) { return cpu::isa_name(self.tuning().isa); })
      .def_property_readonly("started", &PythonStepper::started)
      .def_property(
          "units_per_chunk", [](PythonStepper& self) { return self.tuning().units_per_chunk; },
          [](PythonStepper& self, py::handle units) {
            self.tuning().units_per_chunk = read_as<std::int64_t>(units, "units_per_chunk");
          })
      .def_property(
          "emulated_arguments", [](PythonStepper& self) { return self.tuning().emulated_arguments; },
          [](PythonStepper& self, py::handle bytes) {
            self.tuning().emulated_arguments = read_as<int>(bytes, "emulated_arguments");
          });
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
