// AdamW for C++: programs that link libtorch and libadamw_ext need no Python. TorchScript knows the same class as
// torch.classes.adamw_ext.AdamW, so an optimizer that was scripted and saved in Python is one of these when loaded.
//
// It updates its params to the bits of Python's adamw_ext.AdamW with the same options. Only params that a hand-written
// kernel of this build takes: strided tensors on the CPU or, in a build for CUDA, on CUDA devices. Threads that call
// one object take turns; what a step itself calls (a dispatch mode, say) may read it but not change it.
//
// Every function throws c10::Error (c10::ValueError for an unusable number) before it changes anything, and says what
// was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "export.h"

namespace adamw_ext {

// Of one group of params; what each means: see the docstring of Python's adamw_ext.AdamW.
struct AdamWOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  bool amsgrad = false;
  bool maximize = false;
  bool capturable = false;
  std::string master_weights;  // "", "fp32" or "split"
  std::optional<at::ScalarType> moment_dtype;
  bool stochastic_rounding = false;
  std::int64_t seed = 0;
  std::optional<double> max_grad_norm;
};

class ADAMW_EXT_API AdamW : public torch::CustomClassHolder {
 public:
  // Indices of params count through all groups. A state holds `step`, `exp_avg`, `exp_avg_sq`, with amsgrad
  // `max_exp_avg_sq`, and with master_weights `master_param` or `param_remainder`, as Python's state dicts.
  using State = c10::Dict<std::int64_t, c10::Dict<std::string, at::Tensor>>;

  // With one group of these params; without any, where groups are to be added.
  explicit AdamW(std::vector<at::Tensor> params = {}, const AdamWOptions& defaults = {});
  ~AdamW() override;

  void add_param_group(std::vector<at::Tensor> params, const AdamWOptions& options);
  void add_param_group(std::vector<at::Tensor> params) { add_param_group(std::move(params), defaults()); }
  std::int64_t group_count() const;
  std::vector<at::Tensor> params(std::int64_t group) const;

  // What a group has where it says nothing.
  const AdamWOptions& defaults() const;

  // A group's options, and others in their place: with other numbers, maximize and amsgrad, but the same capturable,
  // master_weights, moment_dtype and stochastic_rounding.
  AdamWOptions options(std::int64_t group) const;
  void set_options(std::int64_t group, const AdamWOptions& options);

  // Of one group, or of all.
  void set_lr(double lr, std::optional<std::int64_t> group = {});
  void set_weight_decay(double weight_decay, std::optional<std::int64_t> group = {});

  // Updates every param that has a gradient, all or none. grads: one for each param of all groups, undefined for none;
  // without it, each param's own .grad. grad_scale, found_inf: 1 element, or undefined, as a gradient scaler has them.
  void step(const std::optional<std::vector<at::Tensor>>& grads = {}, const at::Tensor& grad_scale = {},
            const at::Tensor& found_inf = {});

  void zero_grad(bool set_to_none = true);

  // Creates the state of every param that has none, as needed before a step is captured in a CUDA graph.
  void init_state();

  // Hands the groups' numbers to captured steps, before a replay.
  void sync_hyperparameters();

  // The tensors themselves, not copies.
  State state() const;

  // Copies the values; a tensor that fits keeps its address. Masters must be of the kind that the params' group keeps.
  void load_state(const State& state);

  // The L2 norm of the last step's unscaled gradients: float64, 0-d, on the first param's device. Needs max_grad_norm.
  at::Tensor grad_norm() const;

  // How many steps found_inf has skipped: int64, 0-d, on the first param's device if capturable, else on the CPU.
  at::Tensor skipped_steps() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace adamw_ext
