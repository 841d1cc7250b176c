// The stepper: owns the tensor table of one optimizer and turns "step now" into one kernel launch.
//
// A step is three calls. `prepare` reads what can have changed (gradients, addresses, step counts), checks all of it
// and fills the table; it changes nothing and throws if anything is wrong. `run` is the kernel alone. `finish`
// advances the step counts and version counters. In a steady state none of them allocates.
//
// The stepper does not keep its tensors alive, so that an optimizer reachable from a hook of its own parameters can
// still be collected. Its caller holds them during the three calls, and sees to it that they are the tensors which the
// stepper was made with.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../core/hyper.h"
#include "../core/table.h"
#include "../cpu/isa.h"
#include "memory.h"

namespace adamw_ext {

// One parameter with its state. The state tensors are undefined while the parameter has none yet.
struct Member {
  at::Tensor param;
  at::Tensor step;            // 0-d float32 on the CPU: how many updates were made
  at::Tensor exp_avg;         // as param, or float32
  at::Tensor exp_avg_sq;      // as exp_avg
  at::Tensor max_exp_avg_sq;  // as exp_avg; undefined unless amsgrad
  std::int32_t group = 0;
  std::string name;  // how messages call it
};

struct GroupOptions {
  Hyper hyper;
  bool amsgrad = false;
  bool maximize = false;
};

struct StepInputs {
  const std::vector<GroupOptions>& groups;
  at::TensorList grads;          // one per member; empty: each param's own .grad
  const at::Tensor& grad_scale;  // 1 element, or undefined: gradients are divided by it, and written back
  const at::Tensor& found_inf;   // 1 element, or undefined: anything but 0 skips the step
};

class Stepper {
 public:
  explicit Stepper(const std::vector<Member>& members);

  enum class Ready { run, skip, needs_state };

  // `skip`: found_inf says so. `needs_state`: a parameter without state has a gradient; make a new stepper.
  Ready prepare(const StepInputs& inputs);
  void run() noexcept;
  void finish();

  // Whether run() takes long enough to let other threads have the interpreter meanwhile. Then prepare() has pinned
  // all memory of the step until finish(), whatever those threads do to its tensors.
  bool is_long() const;

  cpu::Isa isa() const { return isa_; }

  std::int64_t units_per_chunk = 0;  // 0: chosen from the work; any other value gives the same bits

 private:
  using TensorPtr = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  // A tensor as it was when last checked. Looking again reads only what can have changed, a few cache lines: in a
  // model of many small tensors that is what a step costs.
  struct Checked {
    c10::TensorImpl* tensor = nullptr;
    c10::StorageImpl* storage = nullptr;  // null: not checked yet
    void* base = nullptr;
    std::size_t bytes = 0;
    std::int64_t offset = 0;
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;

    void look();
    bool unchanged(const Layout& layout) const;
    explicit operator bool() const { return tensor != nullptr; }
  };

  struct Slot {
    Checked param, step, exp_avg, exp_avg_sq, max_exp_avg_sq;
    Layout param_layout;
    Layout layout;           // the state's: the param's where that is dense, else exp_avg's
    bool direct = true;      // the kernel works on the param's own memory
    std::int64_t numel = 0;  // real numbers
    std::int32_t group = 0;
    float* steps_done = nullptr;

    template <class Visit>
    void for_each(const Visit& visit) {
      for (Checked* checked : {&param, &step, &exp_avg, &exp_avg_sq, &max_exp_avg_sq}) {
        if (*checked) visit(*checked);
      }
    }
  };

  // A contiguous stand-in for a tensor whose memory the kernel cannot walk.
  struct Staged {
    at::Tensor original;
    at::Tensor copy;
    bool write_back;
  };

  // (group, step) pairs of the current step: scalars_[i] belongs to keys_[i].
  struct ScalarsKey {
    double steps_done;  // before this step
    std::int32_t next;  // the group's next key, or -1
  };

  void check(std::size_t index);
  void check_state(std::size_t index, const Checked& state, const char* key) const;
  void check_overlap();
  static bool unchanged(const Slot& slot);
  void* prepare_grad(std::size_t index, const at::Tensor& grad, bool write_back);
  std::int32_t scalars_for(std::size_t index, const GroupOptions& options, double grad_factor);
  void* stage(const Layout& layout, const at::Tensor& original, bool write_back);
  void pin(at::TensorList grads);
  const at::Tensor& grad_of(std::size_t index, at::TensorList grads) const;

  cpu::Isa isa_;
  std::vector<Slot> slots_;
  std::vector<std::string> names_;
  std::vector<WeakTensor> guards_;  // keep the addresses of the state's tensors from being taken by others
  std::vector<TensorEntry> entries_;
  std::vector<Scalars> scalars_;
  std::vector<ScalarsKey> keys_;
  std::vector<std::int32_t> first_key_;  // by group, -1: none yet
  std::vector<Staged> staged_;
  std::vector<c10::Storage> pinned_storages_;
  std::vector<TensorPtr> pinned_tensors_;
  std::int64_t unit_count_ = 0;
  double unscale_ = 1.0;
};

// Throws torch's ValueErrors unless every hyperparameter is usable. group: for the message, -1 for none.
void check_hyper(const Hyper& hyper, std::int64_t group);

}  // namespace adamw_ext
