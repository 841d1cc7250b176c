// The stepper: owns the tensor tables of one optimizer and turns "step now" into one pass of kernels for each device.
//
// A step is four calls. `prepare` reads what can have changed (gradients, addresses, step counts), checks all of it
// and fills the tables; it changes nothing and throws if anything is wrong. `measure` and `run` are the kernels alone.
// `finish` advances the step counts and version counters. In a steady state none of them allocates.
//
// Of a deferred param (capturable, or with its `step` on a CUDA device) the host reads no number: step counts,
// found_inf and tensor hyperparameters are read by the kernels, so that the same kernels can be captured and replayed.
//
// The stepper does not keep its tensors alive, so that an optimizer reachable from a hook of its own parameters can
// still be collected. Its caller holds them during the calls, and sees to it that they are the tensors which the
// stepper was made with.
#pragma once

#include <ATen/core/Tensor.h>
#include <adamw_ext/export.h>

#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../core/advance.h"
#include "../core/hyper.h"
#include "../core/table.h"
#include "executor.h"
#include "memory.h"
#include "mirror.h"
#include "numbers.h"

namespace adamw_ext {

// One parameter with its state. The state tensors are undefined while the parameter has none yet.
struct Member {
  at::Tensor param;
  at::Tensor step;            // 0-d float32: how many updates were made; on the CPU, or where the param is
  at::Tensor exp_avg;         // as param, or float32
  at::Tensor exp_avg_sq;      // as exp_avg
  at::Tensor max_exp_avg_sq;  // as exp_avg; undefined unless amsgrad
  at::Tensor master;          // float32 or int16, laid out as param; undefined unless the master is kept beside param
  Master group_master = Master::none;  // what its group asks for
  Rounding rounding = Rounding::nearest;
  std::uint64_t element_number = 0;  // of the first element, for random bits
  std::optional<Places> places;      // of the others, where they do not follow the first one
  std::int32_t group = 0;
  std::int32_t sum = 0;   // of squares that its gradient belongs to; all but sum 0 have parts in other processes
  bool deferred = false;  // the kernels count its steps
  std::string name;       // how messages call it
};

struct GroupOptions {
  // 0 where one of the tensors holds the number.
  Hyper hyper{0.0, 0.0, 0.0, 0.0, 0.0, no_max_grad_norm, 0};
  at::Tensor lr, beta1, beta2;        // 1 floating point number on a CUDA device, or undefined
  const char* host_tensor = nullptr;  // the hyperparameter, if any, that came from a CPU tensor
  bool amsgrad = false;
  bool maximize = false;
  bool capturable = false;
};

struct StepInputs {
  const std::vector<GroupOptions>& groups;
  at::TensorList grads;          // one per member; empty: each param's own .grad
  const at::Tensor& grad_scale;  // 1 element, or undefined: gradients are divided by it, and written back
  const at::Tensor& found_inf;   // 1 element, or undefined: anything but 0 skips the step
  HyperMirror* mirror;           // null: a captured step keeps the numbers of its groups
  DeviceNumbers* skips;          // null: skipped steps are not counted
  DeviceNumbers* norms;          // null: nothing is clipped
  bool is_shared = false;        // other threads may replace tensors while the step runs, however short it is
};

// The whole of the sum of squares with this number, of which this process has a part.
using CompleteSum = std::function<at::Tensor(std::int32_t sum, const at::Tensor& part)>;

class ADAMW_EXT_API Stepper {
 public:
  explicit Stepper(const std::vector<Member>& members);

  enum class Ready { run, skip, needs_state };

  // `skip`: found_inf says so. `needs_state`: a parameter without state has a gradient; make a new stepper.
  Ready prepare(const StepInputs& inputs);
  // The norm of the gradients, if any group clips them. Calls complete(sum, part) for each sum other than 0 that
  // members have, rising, whatever has a gradient.
  void measure(const CompleteSum& complete = {});
  void run();
  void finish();

  // Whether run() takes long enough to let other threads have the interpreter meanwhile. Then prepare() has pinned
  // all memory of the step until finish(), whatever those threads do to its tensors.
  bool is_long() const;

  Tuning tuning;

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

  // The params of one device whose steps are counted in one way, and whose gradients' squares belong to one sum.
  struct Bucket {
    c10::Device device;
    bool deferred;  // the kernels count, the host does not
    std::int32_t sum;
    std::unique_ptr<Executor> executor;
    std::vector<std::int32_t> groups;  // that have params here
    std::vector<TensorEntry> entries;
    std::vector<StepEntry> step_entries;  // of this step's entries, if deferred
    std::vector<HyperSource> sources;     // by group, if deferred
    Scaling scaling{};
    std::int64_t* skipped = nullptr;
    std::int64_t unit_count = 0;
    std::int64_t piece_count = 0;
    at::Tensor sum_of_squares;      // of all gradients of the step, on this device; undefined: nothing is clipped
    at::Tensor own_sum_of_squares;  // of the gradients in this bucket
    bool capturing = false;
    bool writes_grads = false;
    bool resized = false;  // since units were laid out, also by a step that was skipped or refused
    bool active = false;   // some of its params are part of this step
  };

  struct Slot {
    Checked param, step, exp_avg, exp_avg_sq, max_exp_avg_sq, master;
    Master group_master = Master::none;
    Rounding rounding = Rounding::nearest;
    Layout param_layout;
    Layout layout;           // the state's: the param's where that is dense, else exp_avg's
    bool direct = true;      // the kernel works on the param's own memory
    std::int64_t numel = 0;  // real numbers
    std::int32_t group = 0;
    std::int32_t position = 0;  // in the bucket
    Bucket* bucket = nullptr;
    caffe2::TypeMeta grad_dtype;  // of the gradient that was last checked
    float* steps_done = nullptr;

    TensorEntry& entry() const { return bucket->entries[position]; }
    Master master_kind() const { return master ? group_master : Master::none; }

    template <class Visit>
    void for_each(const Visit& visit) {
      for (Checked* checked : {&param, &step, &exp_avg, &exp_avg_sq, &max_exp_avg_sq, &master}) {
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

  Bucket& bucket_of(const Member& member);
  void check(std::size_t index);
  void check_state(std::size_t index, const Checked& state, const char* key) const;
  void check_master(std::size_t index) const;
  void check_laid_out(std::size_t index, const Checked& state, const std::string& name) const;
  void check_overlap();
  static bool unchanged(const Slot& slot);
  bool begin_capture(const StepInputs& inputs);
  bool begin_on_host(const StepInputs& inputs);
  void begin_on_device(Bucket& bucket, const StepInputs& inputs);
  HyperSource source_of(std::int32_t group, const Bucket& bucket, const StepInputs& inputs) const;
  const float* scaling_number(const at::Tensor& tensor, const char* name, const Bucket& bucket, bool is_flag);
  void check_grad_dtype(std::size_t index, const c10::TensorImpl& grad);
  void begin_norm(const StepInputs& inputs);
  Work work_of(const Bucket& bucket) const;
  void* prepare_grad(std::size_t index, const at::Tensor& grad, bool write_back);
  std::int32_t scalars_for(std::size_t index, const GroupOptions& options);
  void check_step(std::size_t index) const;
  void* stage(const Layout& layout, const at::Tensor& original, bool write_back);
  void pin(at::TensorList grads);
  const at::Tensor& grad_of(std::size_t index, at::TensorList grads) const;

  std::vector<Slot> slots_;
  std::deque<Bucket> buckets_;
  std::deque<Places> places_;
  std::vector<std::string> names_;
  std::vector<WeakTensor> guards_;  // keep the addresses of the state's tensors from being taken by others
  std::vector<Scalars> scalars_;
  std::vector<ScalarsKey> keys_;
  std::vector<std::int32_t> first_key_;  // by group, -1: none yet
  std::vector<Hyper> hypers_;            // by group, where the host reads them
  std::vector<Staged> staged_;
  std::vector<at::Tensor> held_;  // copies of a scaler's numbers on other devices
  std::vector<c10::Storage> pinned_storages_;
  std::vector<TensorPtr> pinned_tensors_;
  double unscale_ = 1.0;
  bool clips_ = false;
  std::int32_t last_sum_ = 0;
  bool moved_ = false;  // tensors have been checked anew, and not yet for overlap
};

// The group's numbers, also those that lie on a device: waits for it.
ADAMW_EXT_API Hyper read_on_host(const GroupOptions& options);

// Whether a param of this dtype has a master beside it, where its group asks for one: a wider one is its own.
inline bool needs_master(c10::ScalarType dtype) { return dtype == c10::kBFloat16 || dtype == c10::kHalf; }

// Whether a state's `step` may be this: a whole number of updates, small enough to count on from.
inline bool is_step_count(double done) { return done >= 0.0 && done == std::floor(done) && done < 9007199254740992.0; }

// Throws torch's ValueErrors unless every hyperparameter is usable. group: for the message, -1 for none.
ADAMW_EXT_API void check_hyper(const Hyper& hyper, std::int64_t group);

}  // namespace adamw_ext
