// The registered operators: the functional form, for torch.ops, TorchScript and everything that calls through the
// dispatcher.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "stepper.h"

namespace adamw_ext {
namespace {

at::Tensor element(at::TensorList list, std::size_t index) { return list.empty() ? at::Tensor() : list[index]; }

void set_lr(GroupOptions& group, double lr) { group.hyper.lr = lr; }

// The host does not read a tensor that kernels can.
void set_lr(GroupOptions& group, const at::Tensor& lr) {
  TORCH_CHECK(holds_number(lr), "lr must hold 1 element, but has ", describe(*lr.unsafeGetTensorImpl()));
  if (lr.is_cuda()) {
    group.lr = lr;
  } else {
    group.hyper.lr = lr.item().toDouble();
    group.host_tensor = "lr";
  }
}

void check_lists(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                 at::TensorList max_exp_avg_sqs, at::TensorList state_steps, bool amsgrad) {
  const auto check = [&](at::TensorList list, const char* name) {
    TORCH_CHECK(list.size() == params.size(), name, " must have one tensor for each of the ", params.size(),
                " params, but has ", list.size());
    for (std::size_t i = 0; i < list.size(); ++i) TORCH_CHECK(list[i].defined(), name, "[", i, "] is undefined");
  };
  check(params, "params");
  check(grads, "grads");
  check(exp_avgs, "exp_avgs");
  check(exp_avg_sqs, "exp_avg_sqs");
  check(state_steps, "state_steps");
  if (amsgrad) check(max_exp_avg_sqs, "max_exp_avg_sqs");
}

// Lr: double or const at::Tensor&.
template <class Lr>
void adamw(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
           at::TensorList max_exp_avg_sqs, at::TensorList state_steps, const std::optional<at::Tensor>& grad_scale,
           const std::optional<at::Tensor>& found_inf, Lr lr, double beta1, double beta2, double weight_decay,
           double eps, bool amsgrad, bool maximize) {
  check_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, amsgrad);
  const std::size_t count = params.size();
  if (count == 0) return;

  std::vector<GroupOptions> groups(1);
  groups[0].hyper = {0.0, beta1, beta2, eps, weight_decay, no_max_grad_norm, 0};
  set_lr(groups[0], lr);
  groups[0].amsgrad = amsgrad;
  groups[0].maximize = maximize;
  groups[0].capturable = true;
  check_hyper(groups[0].hyper, -1);
  std::vector<Member> members;
  members.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    members.push_back({params[i], state_steps[i], exp_avgs[i], exp_avg_sqs[i],
                       element(amsgrad ? max_exp_avg_sqs : at::TensorList(), i)});
    Member& member = members.back();
    member.deferred = params[i].is_cuda() && state_steps[i].device() == params[i].device();
    member.name = "params[" + std::to_string(i) + "]";
    groups[0].capturable = groups[0].capturable && member.deferred;
  }
  Stepper stepper(members);
  const at::Tensor undefined;
  const StepInputs inputs{groups,
                          grads,
                          grad_scale ? *grad_scale : undefined,
                          found_inf ? *found_inf : undefined,
                          nullptr,
                          nullptr,
                          nullptr,
                          /*is_shared=*/true};
  if (stepper.prepare(inputs) != Stepper::Ready::run) return;
  stepper.run();
  stepper.finish();
}

// What tensors without memory show of a call: whether its lists fit.
template <class Lr>
void adamw_meta(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                at::TensorList max_exp_avg_sqs, at::TensorList state_steps, const std::optional<at::Tensor>&,
                const std::optional<at::Tensor>&, Lr, double, double, double, double, bool amsgrad, bool) {
  check_lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, amsgrad);
  const auto check = [&](const char* name, at::TensorList list, bool as_param) {
    for (std::size_t i = 0; i < params.size(); ++i) {
      TORCH_CHECK(list[i].device() == params[i].device(), name, "[", i, "] must be on ", params[i].device(),
                  " as params[", i, "], but is on ", list[i].device());
      TORCH_CHECK(!as_param || list[i].sym_sizes() == params[i].sym_sizes(), name, "[", i, "] must have the sizes ",
                  params[i].sym_sizes(), " of params[", i, "], but has ", list[i].sym_sizes());
    }
  };
  check("grads", grads, true);
  check("exp_avgs", exp_avgs, true);
  check("exp_avg_sqs", exp_avg_sqs, true);
  if (amsgrad) check("max_exp_avg_sqs", max_exp_avg_sqs, true);
  check("state_steps", state_steps, false);
  for (std::size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(params[i].is_meta(), "a tensor of this call is on meta, but params[", i, "] is on ",
                params[i].device());
  }
}

// Nothing here is differentiable: autograd must not come to rely on values that are overwritten.
void refuse_recording(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  for (std::size_t i = 0; at::GradMode::is_enabled() && i < arguments.size(); ++i) {
    const c10::Argument& argument = op.schema().arguments()[i];
    if (!arguments[i].isTensorList()) continue;
    const auto list = arguments[i].toTensorVector();
    for (std::size_t place = 0; place < list.size() && argument.name() != "grads"; ++place) {
      TORCH_CHECK(!list[place].defined() || !list[place].requires_grad(), op.schema().name(), " writes to ",
                  argument.name(), "[", place, "], which requires grad: call it under torch.no_grad()");
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

// Two operators of one meaning under one name. TorchScript and calls by that name take the first: without marks of what
// is written, but analysed as writing to whatever may be reached, because from marks on a list TorchScript concludes
// neither that the call must stay nor that the tensors in the list change. Compilers need the marks and are sent to the
// second, `.default` and `.tensor_lr`.
enum class Marks { none, writes };

std::string schema(const std::string& overload, const std::string& lr, Marks marks) {
  std::string lists;
  char set = 'a';
  for (const char* name : {"params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"}) {
    const std::string mark = marks == Marks::writes ? std::string("(") + set++ + "!)" : "";
    lists += "Tensor" + mark + "[] " + name + ", ";
  }
  return overload + "(" + lists + "Tensor? grad_scale=None, Tensor? found_inf=None, *, " + lr +
         " lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize) -> ()";
}

constexpr const char* unmarked[] = {"adamw_.unmarked", "adamw_.unmarked_tensor_lr"};
constexpr const char* overloads[] = {"adamw_", "adamw_.tensor_lr"};

// Without marks a compiler would take the call for unused.
void refuse_tracing(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(), " has a tensor on meta, or is compiled: call torch.ops.adamw_ext.adamw_",
              op.schema().overload_name() == "unmarked" ? ".default" : ".tensor_lr");
}

// The stepper reads lazily conjugated and negated tensors itself; torch's fallbacks refuse them in mutable lists.
void fall_through(torch::Library& library) {
  for (const auto& names : {unmarked, overloads}) {
    for (int i = 0; i < 2; ++i) library.impl(names[i], torch::CppFunction::makeFallthrough());
  }
}

}  // namespace

TORCH_LIBRARY(adamw_ext, library) {
  const char* const lr[] = {"float", "Tensor"};
  for (int i = 0; i < 2; ++i) {
    library.def(torch::schema(schema(unmarked[i], lr[i], Marks::none).c_str(), c10::AliasAnalysisKind::CONSERVATIVE));
  }
  for (int i = 0; i < 2; ++i) library.def(schema(overloads[i], lr[i], Marks::writes).c_str());
}

// For every backend, so that tensors which do not belong here meet the stepper's checks and their messages.
TORCH_LIBRARY_IMPL(adamw_ext, CompositeExplicitAutograd, library) {
  for (const auto& names : {unmarked, overloads}) {
    library.impl(names[0], &adamw<double>);
    library.impl(names[1], &adamw<const at::Tensor&>);
  }
}

TORCH_LIBRARY_IMPL(adamw_ext, Meta, library) {
  library.impl(overloads[0], &adamw_meta<double>);
  library.impl(overloads[1], &adamw_meta<const at::Tensor&>);
  for (const char* name : unmarked) library.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_tracing>());
}

TORCH_LIBRARY_IMPL(adamw_ext, Autograd, library) {
  for (const auto& names : {unmarked, overloads}) {
    for (int i = 0; i < 2; ++i) {
      library.impl(names[i], torch::CppFunction::makeFromBoxedFunction<&refuse_recording>());
    }
  }
}

TORCH_LIBRARY_IMPL(adamw_ext, Conjugate, library) { fall_through(library); }
TORCH_LIBRARY_IMPL(adamw_ext, Negative, library) { fall_through(library); }
TORCH_LIBRARY_IMPL(adamw_ext, ZeroTensor, library) { fall_through(library); }

}  // namespace adamw_ext
