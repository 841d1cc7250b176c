// torch.classes.adamw_ext.AdamW: the C++ optimizer for TorchScript and Python, with groups and state in the form of
// Python's state dicts.
#include <adamw_ext/adamw.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <random>

#include "memory.h"

namespace adamw_ext {
namespace {

using Group = c10::Dict<std::string, c10::IValue>;
using Self = c10::intrusive_ptr<AdamW>;

Group new_group() {
  return c10::impl::toTypedDict<std::string, c10::IValue>(
      c10::impl::GenericDict(c10::StringType::get(), c10::AnyType::get()));
}

// Reads the entries of a param group that are options.
class GroupReader {
 public:
  GroupReader(const Group& group, const AdamWOptions& defaults) : group_(group), options_(defaults) {
    read("lr", [&](const c10::IValue& value) { options_.lr = number("lr", value); });
    read("betas", [&](const c10::IValue& value) { read_betas(value); });
    read("eps", [&](const c10::IValue& value) { options_.eps = number("eps", value); });
    read("weight_decay", [&](const c10::IValue& value) { options_.weight_decay = number("weight_decay", value); });
    read("amsgrad", [&](const c10::IValue& value) { options_.amsgrad = flag("amsgrad", value); });
    read("maximize", [&](const c10::IValue& value) { options_.maximize = flag("maximize", value); });
    read("max_grad_norm", [&](const c10::IValue& value) {
      options_.max_grad_norm =
          value.isNone() ? std::optional<double>() : std::optional<double>(number("max_grad_norm", value));
    });
    read("seed", [&](const c10::IValue& value) {
      check(value.isInt(), "seed", "an int", value);
      options_.seed = value.toInt();
    });
  }

  // Also what a loaded group must not change.
  AdamWOptions with_storage() {
    read("capturable", [&](const c10::IValue& value) { options_.capturable = flag("capturable", value); });
    read("stochastic_rounding",
         [&](const c10::IValue& value) { options_.stochastic_rounding = flag("stochastic_rounding", value); });
    read("master_weights", [&](const c10::IValue& value) {
      check(value.isNone() || value.isString(), "master_weights", "a str or None", value);
      options_.master_weights = value.isNone() ? "" : value.toStringRef();
    });
    read("moment_dtype", [&](const c10::IValue& value) {
      check(value.isNone() || value.isInt(), "moment_dtype", "a dtype or None", value);
      constexpr auto count = static_cast<std::int64_t>(at::ScalarType::NumOptions);
      check(value.isNone() || (value.toInt() >= 0 && value.toInt() < count), "moment_dtype", "a dtype or None", value);
      options_.moment_dtype = value.isNone() ? std::optional<at::ScalarType>() : value.toScalarType();
    });
    return options_;
  }

  const AdamWOptions& options() const { return options_; }

 private:
  template <class Read>
  void read(const char* key, const Read& read_value) {
    if (group_.contains(key)) read_value(group_.at(key));
  }

  static void check(bool usable, const char* key, const char* expected, const c10::IValue& value) {
    TORCH_CHECK_TYPE(usable, key, " must be ", expected, ", but is a ", value.tagKind());
  }

  static double number(const char* key, const c10::IValue& value) {
    if (value.isTensor() && holds_number(value.toTensor())) return value.toTensor().item().toDouble();
    check(value.isDouble() || value.isInt(), key, "a number or a 1-element tensor", value);
    return value.toScalar().toDouble();
  }

  static bool flag(const char* key, const c10::IValue& value) {
    check(value.isBool(), key, "a bool", value);
    return value.toBool();
  }

  void read_betas(const c10::IValue& value) {
    std::vector<c10::IValue> pair;
    if (value.isTuple()) pair = value.toTupleRef().elements().vec();
    if (value.isList()) pair = value.toListRef().vec();
    check(pair.size() == 2, "betas", "a pair", value);
    options_.beta1 = number("betas", pair[0]);
    options_.beta2 = number("betas", pair[1]);
  }

  const Group& group_;
  AdamWOptions options_;
};

std::vector<at::Tensor> params_of(const Group& group) {
  TORCH_CHECK_VALUE(group.contains("params"), "a param group must have 'params'");
  const c10::IValue params = group.at("params");
  if (params.isTensor()) return {params.toTensor()};
  if (params.isTuple()) {
    std::vector<at::Tensor> list;
    for (const c10::IValue& param : params.toTupleRef().elements()) {
      TORCH_CHECK_TYPE(param.isTensor(), "'params' of a group must hold tensors, but holds a ", param.tagKind());
      list.push_back(param.toTensor());
    }
    return list;
  }
  TORCH_CHECK_TYPE(params.isTensorList(), "'params' of a group must be a tensor or a list of tensors, but is a ",
                   params.tagKind());
  return params.toTensorVector();
}

void add_group(const Self& self, const Group& group) {
  const bool is_differentiable =
      group.contains("differentiable") && group.at("differentiable").isBool() && group.at("differentiable").toBool();
  TORCH_CHECK_VALUE(!is_differentiable, "differentiable=True is offered by Python's adamw_ext.AdamW alone");
  self->add_param_group(params_of(group), GroupReader(group, self->defaults()).with_storage());
}

AdamWOptions make_options(double lr, std::tuple<double, double> betas, double eps, double weight_decay, bool amsgrad,
                          bool maximize, bool capturable, const std::optional<std::string>& master_weights,
                          std::optional<at::ScalarType> moment_dtype, bool stochastic_rounding, std::int64_t seed,
                          std::optional<double> max_grad_norm) {
  return {lr,           std::get<0>(betas), std::get<1>(betas),          eps,          weight_decay,        amsgrad,
          maximize,     capturable,         master_weights.value_or(""), moment_dtype, stochastic_rounding, seed,
          max_grad_norm};
}

Group shown(const AdamWOptions& options) {
  Group group = new_group();
  group.insert("lr", options.lr);
  group.insert("betas", std::make_tuple(options.beta1, options.beta2));
  group.insert("eps", options.eps);
  group.insert("weight_decay", options.weight_decay);
  group.insert("amsgrad", options.amsgrad);
  group.insert("maximize", options.maximize);
  group.insert("foreach", c10::IValue());
  group.insert("capturable", options.capturable);
  group.insert("differentiable", false);
  group.insert("fused", c10::IValue());
  group.insert("decoupled_weight_decay", true);
  if (!options.master_weights.empty()) group.insert("master_weights", options.master_weights);
  if (options.moment_dtype) group.insert("moment_dtype", static_cast<std::int64_t>(*options.moment_dtype));
  if (options.stochastic_rounding) group.insert("stochastic_rounding", true);
  if (options.seed != 0) group.insert("seed", options.seed);
  if (options.max_grad_norm) group.insert("max_grad_norm", *options.max_grad_norm);
  return group;
}

c10::List<Group> param_groups(const Self& self) {
  c10::List<Group> groups;
  std::int64_t place = 0;
  for (std::int64_t i = 0; i < self->group_count(); ++i) {
    Group group = shown(self->options(i));
    c10::List<std::int64_t> places;
    const std::size_t count = self->params(i).size();
    while (places.size() < count) places.push_back(place++);
    group.insert("params", places);
    groups.push_back(group);
  }
  return groups;
}

Group state_dict(const Self& self) {
  Group dict = new_group();
  dict.insert("state", self->state());
  dict.insert("param_groups", param_groups(self));
  return dict;
}

void load_state_dict(const Self& self, const AdamW::State& state, const c10::List<Group>& groups) {
  TORCH_CHECK_VALUE(static_cast<std::int64_t>(groups.size()) == self->group_count(),
                    "loaded state dict has a different number of parameter groups: ", groups.size(), ", not ",
                    self->group_count());
  std::vector<AdamWOptions> options;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const Group group = groups.get(i);
    const std::size_t wanted = self->params(i).size();
    const bool has_params = group.contains("params") && group.at("params").isList();
    const std::size_t count = has_params ? group.at("params").toListRef().size() : 0;
    TORCH_CHECK_VALUE(count == wanted, "loaded state dict contains a parameter group that doesn't match the size of ",
                      "optimizer's group ", i, ": ", count, " params, not ", wanted);
    options.push_back(GroupReader(group, self->options(i)).options());
  }
  std::vector<AdamWOptions> before;
  try {
    for (std::size_t i = 0; i < options.size(); ++i) {
      before.push_back(self->options(i));
      self->set_options(i, options[i]);
    }
    self->load_state(state);
  } catch (...) {
    for (std::size_t i = 0; i < before.size(); ++i) self->set_options(i, before[i]);
    throw;
  }
  self->sync_hyperparameters();
}

std::vector<at::Tensor> all_params(const Self& self) {
  std::vector<at::Tensor> params;
  for (std::int64_t i = 0; i < self->group_count(); ++i) {
    const std::vector<at::Tensor> of_group = self->params(i);
    params.insert(params.end(), of_group.begin(), of_group.end());
  }
  return params;
}

// grads: a List[Tensor] or List[Optional[Tensor]] of TorchScript, which takes neither for the other, or None.
void step(const Self& self, const c10::IValue& grads, const std::optional<at::Tensor>& grad_scale,
          const std::optional<at::Tensor>& found_inf) {
  std::optional<std::vector<at::Tensor>> list;
  if (!grads.isNone()) {
    TORCH_CHECK_TYPE(grads.isList(), "grads must be a list of tensors or None, but is a ", grads.tagKind());
    list.emplace();
    for (const c10::IValue& grad : grads.toListRef()) {
      TORCH_CHECK_TYPE(grad.isTensor() || grad.isNone(), "grads[", list->size(),
                       "] must be a tensor or None, but is a ", grad.tagKind());
      list->push_back(grad.isNone() ? at::Tensor() : grad.toTensor());
    }
  }
  self->step(list, grad_scale.value_or(at::Tensor()), found_inf.value_or(at::Tensor()));
}

// Optimizers of this process that have been saved, by a number that no other process gives.
class SavedOptimizers {
 public:
  static SavedOptimizers& get() {
    static SavedOptimizers instance;
    return instance;
  }

  std::vector<std::int64_t> number_of(const Self& self) {
    const std::lock_guard<std::mutex> turn(mutex_);
    for (auto entry = optimizers_.begin(); entry != optimizers_.end();) {
      if (entry->second.lock() == self) return {process_, entry->first};
      entry = entry->second.expired() ? optimizers_.erase(entry) : std::next(entry);
    }
    optimizers_.emplace(++last_, self);
    return {process_, last_};
  }

  // Null unless it still lives, in this process.
  Self find(const std::vector<std::int64_t>& number) {
    const std::lock_guard<std::mutex> turn(mutex_);
    const auto entry = number.at(0) == process_ ? optimizers_.find(number.at(1)) : optimizers_.end();
    return entry == optimizers_.end() ? Self() : entry->second.lock();
  }

 private:
  std::mutex mutex_;
  std::int64_t process_ = static_cast<std::int64_t>(std::random_device()()) << 32 | std::random_device()();
  std::int64_t last_ = 0;
  std::map<std::int64_t, c10::weak_intrusive_ptr<AdamW>> optimizers_;
};

// What is saved: the params, which a saved module saves once with its own, the state dict, and the defaults beside the
// number under which the optimizer was saved.
using Saved = std::tuple<c10::List<c10::List<at::Tensor>>, AdamW::State, c10::List<Group>, Group>;
constexpr const char* number_key = "saved_as";

Saved save(const Self& self) {
  c10::List<c10::List<at::Tensor>> params;
  for (std::int64_t i = 0; i < self->group_count(); ++i) {
    params.push_back(c10::List<at::Tensor>(self->params(i)));
  }
  Group defaults = shown(self->defaults());
  defaults.insert(number_key, SavedOptimizers::get().number_of(self));
  return {params, self->state(), param_groups(self), defaults};
}

Self restore(const Saved& saved) {
  const auto& [params, state, groups, defaults] = saved;
  const Self original = SavedOptimizers::get().find(defaults.at(number_key).toIntVector());
  const std::vector<at::Tensor> originals = original ? all_params(original) : std::vector<at::Tensor>();
  auto self = c10::make_intrusive<AdamW>(std::vector<at::Tensor>(), GroupReader(defaults, {}).with_storage());
  for (std::size_t i = 0; i < params.size(); ++i) {
    const std::vector<at::Tensor> list = params.get(i).vec();
    for (const at::Tensor& param : list) {
      const bool shared =
          std::any_of(originals.begin(), originals.end(), [&](const auto& p) { return p.is_same(param); });
      TORCH_CHECK(!shared, "an optimizer, or a module that holds one, cannot be copied: TorchScript would let the ",
                  "copy step the original's params. Save it with torch.jit.save and load it instead");
    }
    const Group group = groups.get(i);
    self->add_param_group(list, GroupReader(group, {}).with_storage());
  }
  self->load_state(state);
  return self;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(adamw_ext, library) {
  library.class_<AdamW>("AdamW")
      .def(torch::init([](std::vector<at::Tensor> params, double lr, std::tuple<double, double> betas, double eps,
                          double weight_decay, bool amsgrad, bool maximize, bool capturable,
                          const std::optional<std::string>& master_weights, std::optional<at::ScalarType> moment_dtype,
                          bool stochastic_rounding, std::int64_t seed, std::optional<double> max_grad_norm) {
             TORCH_CHECK_VALUE(!params.empty(), "optimizer got an empty parameter list");
             return c10::make_intrusive<AdamW>(
                 std::move(params),
                 make_options(lr, betas, eps, weight_decay, amsgrad, maximize, capturable, master_weights, moment_dtype,
                              stochastic_rounding, seed, max_grad_norm));
           }),
           "",
           {torch::arg("params"), torch::arg("lr") = 1e-3, torch::arg("betas") = std::make_tuple(0.9, 0.999),
            torch::arg("eps") = 1e-8, torch::arg("weight_decay") = 1e-2, torch::arg("amsgrad") = false,
            torch::arg("maximize") = false, torch::arg("capturable") = false,
            torch::arg("master_weights") = torch::arg::none(), torch::arg("moment_dtype") = torch::arg::none(),
            torch::arg("stochastic_rounding") = false, torch::arg("seed") = std::int64_t(0),
            torch::arg("max_grad_norm") = torch::arg::none()})
      .def_static("from_groups",
                  [](const c10::List<Group>& groups) {
                    TORCH_CHECK_VALUE(!groups.empty(), "optimizer got an empty parameter list");
                    auto self = c10::make_intrusive<AdamW>();
                    for (std::size_t i = 0; i < groups.size(); ++i) add_group(self, groups.get(i));
                    return self;
                  })
      .def("add_param_group", [](const Self& self, const Group& group) { add_group(self, group); })
      .def("step", &step, "",
           {torch::arg("grads") = torch::arg::none(), torch::arg("grad_scale") = torch::arg::none(),
            torch::arg("found_inf") = torch::arg::none()})
      .def("zero_grad", [](const Self& self, bool set_to_none) { self->zero_grad(set_to_none); }, "",
           {torch::arg("set_to_none") = true})
      .def("init_state", [](const Self& self) { self->init_state(); })
      .def("sync_hyperparameters", [](const Self& self) { self->sync_hyperparameters(); })
      .def("params", &all_params)
      .def("get_lr", [](const Self& self, std::int64_t group) { return self->options(group).lr; }, "",
           {torch::arg("group") = std::int64_t(0)})
      .def("set_lr", [](const Self& self, double lr, std::optional<std::int64_t> group) { self->set_lr(lr, group); },
           "", {torch::arg("lr"), torch::arg("group") = torch::arg::none()})
      .def("get_weight_decay", [](const Self& self, std::int64_t group) { return self->options(group).weight_decay; },
           "", {torch::arg("group") = std::int64_t(0)})
      .def("set_weight_decay",
           [](const Self& self, double value, std::optional<std::int64_t> group) {
             self->set_weight_decay(value, group);
           },
           "", {torch::arg("weight_decay"), torch::arg("group") = torch::arg::none()})
      .def("grad_norm", [](const Self& self) { return self->grad_norm(); })
      .def("skipped_steps", [](const Self& self) { return self->skipped_steps(); })
      .def("state", [](const Self& self) { return self->state(); })
      .def("param_groups", &param_groups)
      .def("state_dict", &state_dict)
      .def("load_state_dict", &load_state_dict, "", {torch::arg("state"), torch::arg("param_groups")})
      .def_pickle([](const Self& self) { return save(self); }, [](const Saved& saved) { return restore(saved); });
}

}  // namespace adamw_ext
