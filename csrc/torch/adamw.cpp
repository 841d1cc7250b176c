#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>
#include <adamw_ext/adamw.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <new>
#include <set>

#include "../cpu/forks.h"
#include "param_state.h"
#include "stepper.h"
#include "stepping.h"

namespace adamw_ext {
namespace {

Hyper hyper_of(const AdamWOptions& options) {
  return {options.lr,
          options.beta1,
          options.beta2,
          options.eps,
          options.weight_decay,
          options.max_grad_norm.value_or(no_max_grad_norm),
          static_cast<std::uint64_t>(options.seed)};
}

void check_options(const AdamWOptions& options, std::int64_t group) {
  check_hyper(hyper_of(options), group);
  master_of(options);
  const std::string where = group < 0 ? "" : " in param group " + std::to_string(group);
  TORCH_CHECK_VALUE(!options.max_grad_norm || *options.max_grad_norm >= 0.0,
                    "Invalid max_grad_norm value: ", options.max_grad_norm.value_or(0.0), where);
  TORCH_CHECK_VALUE(
      !options.moment_dtype || *options.moment_dtype == at::kFloat || *options.moment_dtype == at::kBFloat16,
      "moment_dtype must be torch.float32, torch.bfloat16 or None, but is ",
      options.moment_dtype ? dtype_name(*options.moment_dtype) : "None", where);
  TORCH_CHECK_VALUE(options.seed >= 0, "seed must be an int in [0, 2**63), but is ", options.seed, where);
}

bool same_storage(const AdamWOptions& a, const AdamWOptions& b) {
  return a.capturable == b.capturable && a.master_weights == b.master_weights && a.moment_dtype == b.moment_dtype &&
         a.stochastic_rounding == b.stochastic_rounding;
}

}  // namespace

struct AdamW::Impl {
  struct Group {
    AdamWOptions options;
    std::vector<at::Tensor> params;
  };

  // A param among those of all groups.
  struct Place {
    std::size_t group;
    std::string name;
    ParamState state;
  };

  AdamWOptions defaults;
  mutable std::recursive_mutex mutex;
  mutable std::atomic<std::uint64_t> forks_seen{cpu::forks.load()};
  mutable bool stepping = false;
  mutable bool torn = false;  // forked in the middle of a step
  bool started = false;       // the latest step has changed something
  std::vector<Group> groups;
  std::vector<at::Tensor> params;  // of all groups
  std::vector<Place> places;       // of all params
  std::vector<GroupOptions> step_options;
  std::unique_ptr<Stepper> stepper;
  HyperMirror mirror;
  mutable DeviceNumbers skips{at::kLong}, norms{at::kDouble};

  // One thread's turn.
  class Turn {
   public:
    enum class To { read, change };

    Turn(const Impl& impl, To to) : lock_(impl.mutex_of_this_process()) {
      TORCH_CHECK(
          to == To::read || !impl.torn,
          "this process was forked while another thread was in a step of this optimizer, whose params and state "
          "may be half updated: make a new one");
      TORCH_CHECK(to == To::read || !impl.stepping, "an optimizer cannot be changed from within its own step");
    }

   private:
    std::lock_guard<std::recursive_mutex> lock_;
  };

  template <class Set>
  void set_of(std::optional<std::int64_t> index, const Set& set);

  // A thread that held the mutex when this process was forked does not exist here, and will never give it back.
  std::recursive_mutex& mutex_of_this_process() const {
    const std::uint64_t now = cpu::forks.load();
    if (forks_seen.exchange(now) != now) {
      new (&mutex) std::recursive_mutex;
      torn |= stepping;
      stepping = false;
    }
    return mutex;
  }

  Turn read() const { return Turn(*this, Turn::To::read); }
  Turn change() { return Turn(*this, Turn::To::change); }

  Group& group(std::int64_t index) {
    TORCH_CHECK_INDEX(index >= 0 && index < static_cast<std::int64_t>(groups.size()), "there is no param group ", index,
                      ": there are ", groups.size());
    return groups[index];
  }

  void add(std::vector<at::Tensor> added, const AdamWOptions& options) {
    check_options(options, static_cast<std::int64_t>(groups.size()));
    std::set<const void*> known;
    for (const at::Tensor& param : params) known.insert(param.unsafeGetTensorImpl());
    for (std::size_t i = 0; i < added.size(); ++i) {
      const std::string name = name_of(groups.size(), i);
      TORCH_CHECK(added[i].defined(), name, " is undefined");
      TORCH_CHECK(storage_dtype(added[i].scalar_type()) && has_sizes(*added[i].unsafeGetTensorImpl()), name,
                  " must have a floating point or complex dtype, but has ", describe(*added[i].unsafeGetTensorImpl()));
      TORCH_CHECK_VALUE(added[i].is_leaf() || added[i].retains_grad(), "can't optimize a non-leaf Tensor: ", name);
      TORCH_CHECK_VALUE(known.insert(added[i].unsafeGetTensorImpl()).second,
                        "some parameters appear in more than one parameter group, or twice in one: ", name);
    }
    for (std::size_t i = 0; i < added.size(); ++i) {
      places.push_back({groups.size(), name_of(groups.size(), i), {}});
      params.push_back(added[i]);
    }
    groups.push_back({options, std::move(added)});
    stepper.reset();
  }

  static std::string name_of(std::size_t group, std::size_t index) {
    return "param (group " + std::to_string(group) + ", index " + std::to_string(index) + ")";
  }

  const at::Tensor& grad_of(std::size_t index, at::TensorList grads) const {
    return grads.empty() ? params[index].grad() : grads[index];
  }

  // Whether what is done to the param now becomes part of a graph, and is done again by every replay.
  bool is_captured(std::size_t index) const {
    const at::Device device = params[index].device();
    return has_kernels(device.type()) && make_executor(device)->is_capturing();
  }

  // Creates missing state; `wanted(i)` says of which params. Returns whose.
  template <class Wanted>
  std::vector<std::size_t> create_states(const Wanted& wanted) {
    std::vector<std::size_t> created;
    try {
      for (std::size_t i = 0; i < places.size(); ++i) {
        if (places[i].state.exists() || !wanted(i)) continue;
        const AdamWOptions& options = groups[places[i].group].options;
        TORCH_CHECK(!is_captured(i), places[i].name,
                    " has no state yet: call init_state() before the step is captured");
        places[i].state = new_state(params[i], options, places[i].name);
        created.push_back(i);
      }
    } catch (...) {
      take_back(created);
      throw;
    }
    return created;
  }

  void take_back(const std::vector<std::size_t>& created) {
    stepper.reset();
    for (const std::size_t i : created) places[i].state = {};
  }

  std::unique_ptr<Stepper> make_stepper() const {
    std::vector<Member> members;
    members.reserve(params.size());
    for (std::size_t i = 0; i < params.size(); ++i) {
      const auto& [group, name, state] = places[i];
      const AdamWOptions& options = groups[group].options;
      Member member{params[i], state.step, state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq};
      if (needs_master(params[i].scalar_type())) member.master = state.master;
      member.group_master = master_of(options);
      member.rounding = options.stochastic_rounding ? Rounding::stochastic : Rounding::nearest;
      member.element_number = element_number(i, 0);
      member.group = static_cast<std::int32_t>(group);
      member.deferred = options.capturable;
      member.name = name;
      members.push_back(std::move(member));
    }
    return std::make_unique<Stepper>(members);
  }

  void read_groups() {
    step_options.resize(groups.size());
    for (std::size_t i = 0; i < groups.size(); ++i) {
      const AdamWOptions& options = groups[i].options;
      step_options[i].hyper = hyper_of(options);
      step_options[i].amsgrad = options.amsgrad;
      step_options[i].maximize = options.maximize;
      step_options[i].capturable = options.capturable;
    }
  }

  // False: a param without state has a gradient.
  bool try_step(at::TensorList grads, const at::Tensor& grad_scale, const at::Tensor& found_inf) {
    started = false;
    switch (stepper->prepare({step_options, grads, grad_scale, found_inf, &mirror, &skips, &norms, !grads.empty()})) {
      case Stepper::Ready::needs_state:
        return false;
      case Stepper::Ready::skip:
        return true;
      case Stepper::Ready::run:
        break;
    }
    started = true;
    stepper->measure();
    stepper->run();
    stepper->finish();
    return true;
  }

  // With the stepper at hand; false if it no longer fits, for whatever reason: a new one takes the change (a module
  // that was moved to another dtype), or says the same.
  bool try_again(at::TensorList grads, const at::Tensor& grad_scale, const at::Tensor& found_inf) {
    if (stepper == nullptr) return false;
    try {
      return try_step(grads, grad_scale, found_inf);
    } catch (const c10::Error&) {
      if (started) throw;
      return false;
    }
  }

  void step(at::TensorList grads, const at::Tensor& grad_scale, const at::Tensor& found_inf) {
    read_groups();
    if (try_again(grads, grad_scale, found_inf)) return;
    stepper.reset();
    for (std::size_t i = 0; i < places.size(); ++i) {
      Place& place = places[i];
      if (!place.state.exists() || is_captured(i)) continue;
      conform(params[i], groups[place.group].options, place.name, place.state);
    }
    const std::vector<std::size_t> created = create_states([&](std::size_t i) { return grad_of(i, grads).defined(); });
    try {
      stepper = make_stepper();
      TORCH_INTERNAL_ASSERT(try_step(grads, grad_scale, found_inf));
    } catch (...) {
      take_back(created);
      throw;
    }
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (!needs_master(params[i].scalar_type())) places[i].state.master.reset();  // stale from now on
    }
  }
};

AdamW::AdamW(std::vector<at::Tensor> params, const AdamWOptions& defaults) : impl_(std::make_unique<Impl>()) {
  check_options(defaults, -1);
  impl_->defaults = defaults;
  if (!params.empty()) add_param_group(std::move(params));
}

AdamW::~AdamW() = default;

void AdamW::add_param_group(std::vector<at::Tensor> params, const AdamWOptions& options) {
  const auto turn = impl_->change();
  impl_->add(std::move(params), options);
}

std::int64_t AdamW::group_count() const {
  const auto turn = impl_->read();
  return static_cast<std::int64_t>(impl_->groups.size());
}

std::vector<at::Tensor> AdamW::params(std::int64_t group) const {
  const auto turn = impl_->read();
  return impl_->group(group).params;
}

const AdamWOptions& AdamW::defaults() const { return impl_->defaults; }

AdamWOptions AdamW::options(std::int64_t group) const {
  const auto turn = impl_->read();
  return impl_->group(group).options;
}

void AdamW::set_options(std::int64_t group, const AdamWOptions& options) {
  const auto turn = impl_->change();
  AdamWOptions& present = impl_->group(group).options;
  check_options(options, group);
  TORCH_CHECK_VALUE(same_storage(present, options),
                    "capturable, master_weights, moment_dtype and stochastic_rounding of param group ", group,
                    " were decided when it was added");
  present = options;
}

template <class Set>
void AdamW::Impl::set_of(std::optional<std::int64_t> index, const Set& set) {
  if (index) group(*index);  // exists
  const std::int64_t first = index.value_or(0);
  const std::int64_t end = index ? first + 1 : static_cast<std::int64_t>(groups.size());
  for (std::int64_t i = first; i < end; ++i) {
    AdamWOptions options = groups[i].options;
    set(options);
    check_options(options, i);
  }
  for (std::int64_t i = first; i < end; ++i) set(groups[i].options);
}

void AdamW::set_lr(double lr, std::optional<std::int64_t> group) {
  const auto turn = impl_->change();
  impl_->set_of(group, [&](AdamWOptions& options) { options.lr = lr; });
}

void AdamW::set_weight_decay(double weight_decay, std::optional<std::int64_t> group) {
  const auto turn = impl_->change();
  impl_->set_of(group, [&](AdamWOptions& options) { options.weight_decay = weight_decay; });
}

void AdamW::step(const std::optional<std::vector<at::Tensor>>& grads, const at::Tensor& grad_scale,
                 const at::Tensor& found_inf) {
  const auto turn = impl_->change();
  const Stepping stepping(impl_->stepping);
  const at::NoGradGuard no_grad;
  const std::size_t count = impl_->params.size();
  TORCH_CHECK_VALUE(!grads || grads->size() == count, "grads must have one tensor or None for each of the ", count,
                    " params, but has ", grads ? grads->size() : 0);
  impl_->step(grads ? at::TensorList(*grads) : at::TensorList(), grad_scale, found_inf);
}

void AdamW::zero_grad(bool set_to_none) {
  std::vector<at::Tensor> dropped;  // freed without the mutex: that may run code which comes back here
  const auto turn = impl_->change();
  for (const at::Tensor& param : impl_->params) {
    at::Tensor& grad = param.mutable_grad();
    if (!grad.defined()) continue;
    if (set_to_none) {
      dropped.push_back(std::move(grad));
      grad.reset();
    } else {
      if (grad.grad_fn() != nullptr) {
        grad.detach_();
      } else {
        grad.requires_grad_(false);
      }
      const at::NoGradGuard no_grad;
      grad.zero_();
    }
  }
}

void AdamW::init_state() {
  const auto turn = impl_->change();
  impl_->create_states([](std::size_t) { return true; });
  impl_->stepper.reset();
}

void AdamW::sync_hyperparameters() {
  const auto turn = impl_->change();
  impl_->mirror.sync([&](std::int32_t group) { return hyper_of(impl_->group(group).options); });
}

AdamW::State AdamW::state() const {
  const auto turn = impl_->read();
  State state;
  for (std::size_t i = 0; i < impl_->places.size(); ++i) {
    const ParamState& items = impl_->places[i].state;
    if (items.exists()) state.insert(static_cast<std::int64_t>(i), shown(items));
  }
  return state;
}

void AdamW::load_state(const State& state) {
  std::vector<ParamState> loaded;  // and then what it replaces, freed after the turn
  const auto turn = impl_->change();
  const at::NoGradGuard no_grad;
  const std::size_t count = impl_->params.size();
  for (const auto& item : state) {
    TORCH_CHECK_VALUE(item.key() >= 0 && item.key() < static_cast<std::int64_t>(count), "loaded state has a param ",
                      item.key(), ", but there are ", count, " params");
  }
  loaded.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    const auto key = static_cast<std::int64_t>(i);
    const Impl::Place& place = impl_->places[i];
    const AdamWOptions& options = impl_->groups[place.group].options;
    if (state.contains(key)) loaded[i] = loaded_state(impl_->params[i], options, place.name, state.at(key));
  }
  impl_->stepper.reset();
  for (std::size_t i = 0; i < count; ++i) {
    if (loaded[i].exists()) load(impl_->params[i], impl_->places[i].state, loaded[i]);
  }
}

at::Tensor AdamW::grad_norm() const {
  const auto turn = impl_->read();
  const bool clips = std::any_of(impl_->groups.begin(), impl_->groups.end(),
                                 [](const Impl::Group& group) { return group.options.max_grad_norm.has_value(); });
  TORCH_CHECK(clips, "grad_norm is measured only where max_grad_norm is set, but it is None in every group");
  const at::Tensor& sum = impl_->norms.on(impl_->params.empty() ? at::Device(at::kCPU) : impl_->params[0].device());
  if (sum.is_cuda()) return sum.sqrt();
  return at::scalar_tensor(std::sqrt(sum.item<double>()), at::kDouble);  // torch's is off by a bit at times
}

at::Tensor AdamW::skipped_steps() const {
  const auto turn = impl_->read();
  const bool on_device = !impl_->params.empty() && impl_->groups[impl_->places[0].group].options.capturable;
  return impl_->skips.on(on_device ? impl_->params[0].device() : at::Device(at::kCPU));
}

}  // namespace adamw_ext
