// The registered operators: the functional form, for torch.ops and everything that calls through the dispatcher.
#include <ATen/core/Tensor.h>
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

// Lr: double or const at::Tensor&.
template <class Lr>
void adamw(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
           at::TensorList max_exp_avg_sqs, at::TensorList state_steps, const std::optional<at::Tensor>& grad_scale,
           const std::optional<at::Tensor>& found_inf, Lr lr, double beta1, double beta2, double weight_decay,
           double eps, bool amsgrad, bool maximize) {
  const std::size_t count = params.size();
  const auto check_length = [&](at::TensorList list, const char* name) {
    TORCH_CHECK(list.size() == count, name, " must have one tensor for each of the ", count, " params, but has ",
                list.size());
    for (std::size_t i = 0; i < count; ++i) TORCH_CHECK(list[i].defined(), name, "[", i, "] is undefined");
  };
  check_length(params, "params");
  check_length(grads, "grads");
  check_length(exp_avgs, "exp_avgs");
  check_length(exp_avg_sqs, "exp_avg_sqs");
  check_length(state_steps, "state_steps");
  if (amsgrad) check_length(max_exp_avg_sqs, "max_exp_avg_sqs");
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
  const StepInputs inputs{
      groups,  grads,  grad_scale ? *grad_scale : undefined, found_inf ? *found_inf : undefined, nullptr,
      nullptr, nullptr};
  if (stepper.prepare(inputs) != Stepper::Ready::run) return;
  stepper.run();
  stepper.finish();
}

std::string schema(const std::string& overload, const std::string& lr) {
  return "adamw_" + overload +
         "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
         "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, Tensor? grad_scale=None, Tensor? found_inf=None, "
         "*, " +
         lr + " lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize) -> ()";
}

constexpr const char* overloads[] = {"adamw_", "adamw_.tensor_lr"};

// The stepper reads lazily conjugated and negated tensors itself; torch's fallbacks refuse them in mutable lists.
void fall_through(torch::Library& library) {
  for (const char* name : overloads) library.impl(name, torch::CppFunction::makeFallthrough());
}

}  // namespace

TORCH_LIBRARY(adamw_ext, library) {
  library.def(schema("", "float").c_str());
  library.def(schema(".tensor_lr", "Tensor").c_str());
}

// For every backend, so that tensors which do not belong here meet the stepper's checks and their messages.
TORCH_LIBRARY_IMPL(adamw_ext, CompositeExplicitAutograd, library) {
  library.impl(overloads[0], &adamw<double>);
  library.impl(overloads[1], &adamw<const at::Tensor&>);
}

TORCH_LIBRARY_IMPL(adamw_ext, Conjugate, library) { fall_through(library); }
TORCH_LIBRARY_IMPL(adamw_ext, Negative, library) { fall_through(library); }
TORCH_LIBRARY_IMPL(adamw_ext, ZeroTensor, library) { fall_through(library); }

}  // namespace adamw_ext
