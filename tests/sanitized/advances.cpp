// The scalar kernel: step counts, found_inf, and where hyperparameters are found.
#include <algorithm>
#include <deque>
#include <numeric>

#include "check.h"
#include "core/advance.h"
#include "cuda/arguments.h"
#include "cuda/emulation.h"

namespace adamw_ext::sanitized {
namespace {

// Numbers that every dtype holds exactly.
const std::vector<double> exact_lrs = {0.0, 0.5, 0.0009765625};
const std::vector<double> exact_betas = {0.0, 0.25, 0.5, 0.875};

// A table of steps in memory, and what shall become of it.
class Steps {
 public:
  Steps(Random& random, int source_count, const std::vector<int>& source_of_entry) {
    sources_.reserve(source_count);
    for (int i = 0; i < source_count; ++i) add_source(random);
    std::vector<std::int32_t> places(source_of_entry.size());
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random);
    for (std::size_t i = 0; i < source_of_entry.size(); ++i) {
      const float step = one_of(random, std::vector{0.0f, 1.0f, 2.0f, 999.0f, 16777215.0f, 16777216.0f, -1.0f, -0.5f,
                                                    9007199254740992.0f, INFINITY, -INFINITY, NAN});
      before_.push_back(step);
      entries_.push_back({number(step), source_of_entry[i], places[i]});
    }
    counts_skips_ = below(random, 2) == 0;
    std::memset(static_cast<void*>(unwritten_), 0x5a, sizeof(unwritten_));
    scalars_.assign(entries_.size(), unwritten_[0]);
  }

  // Steps that are clipped by this sum.
  void set_sum_of_squares(double sum) {
    sum_of_squares_ = {sum};
    clips_ = true;
  }

  void set_scaling(const double* grad_scale, const double* found_inf) {
    unscale_ = grad_scale == nullptr ? 1.0 : 1.0 / static_cast<float>(*grad_scale);
    skips_ = found_inf != nullptr && !(*found_inf == 0.0);
    scaling_ = {grad_scale == nullptr ? nullptr : number(*grad_scale),
                found_inf == nullptr ? nullptr : number(*found_inf)};
  }

  void check(const std::string& kind, int argument_bytes) {
    const std::vector<StepEntry> entries(entries_);  // without spare room
    const std::vector<HyperSource> sources(sources_);
    std::vector<std::int64_t> skipped(1, 40);
    const StepTable table{entries.data(),
                          static_cast<std::int64_t>(entries.size()),
                          sources.data(),
                          scaling_,
                          scalars_.data(),
                          counts_skips_ ? skipped.data() : nullptr,
                          clips_ ? sum_of_squares_.data() : nullptr};
    require(cuda::emulate_advance(table, {argument_bytes, 132}) == 0, kind + ": an error");
    require(skipped[0] == 40 + (counts_skips_ && skips_ && !entries_.empty()), kind + ": the count of skipped steps");
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const StepEntry& entry = entries_[i];
      const float step = skips_ ? before_[i] : before_[i] + 1.0f;
      require(same(*entry.step, step), kind + ": the step count of entry " + std::to_string(i));
      require(same(scalars_[entry.scalars], skips_ ? unwritten_[0] : expected(i)),
              kind + ": the scalars of entry " + std::to_string(i));
    }
    count(kind);
  }

 private:
  template <class T>
  static bool same(T a, T b) {
    return std::memcmp(&a, &b, sizeof(T)) == 0 || (a != a && b != b);
  }

  static bool same(const Scalars& a, const Scalars& b) {
    const auto same_all = [](const auto& x, const auto& y) {
      return same(x.grad_factor, y.grad_factor) && same(x.beta1, y.beta1) &&
             same(x.one_minus_beta1, y.one_minus_beta1) && same(x.beta2, y.beta2) &&
             same(x.one_minus_beta2, y.one_minus_beta2) && same(x.step_size, y.step_size) &&
             same(x.denominator_scale, y.denominator_scale) && same(x.eps, y.eps) &&
             same(x.lr_weight_decay, y.lr_weight_decay) && same(x.unscale, y.unscale) &&
             same(x.random.seed, y.random.seed) && same(x.random.step, y.random.step);
    };
    return same_all(a.in_double, b.in_double) && same_all(a.in_float, b.in_float) &&
           same(a.max_grad_norm, b.max_grad_norm);
  }

  // A step that is no count counts as none made, and is not made one.
  Scalars expected(std::size_t i) const {
    const float step = before_[i];
    const bool is_count = step >= 0.0f && step < 9007199254740992.0f;
    const std::int32_t source = entries_[i].source;
    Scalars scalars = compute_scalars(hypers_[source], is_count ? static_cast<std::int64_t>(step) + 1 : 0, unscale_,
                                      sources_[source].maximize);
    if (clips_) clip(scalars, sum_of_squares_[0]);
    return scalars;
  }

  float* number(double value) {
    numbers_.emplace_back(DType::float32, 1, 4 * (numbers_.size() % 4));
    numbers_.back().set(0, value);
    return static_cast<float*>(numbers_.back().data());
  }

  // Numbers in the source itself, in a mirror, or behind a pointer of any dtype; those that do not count are others.
  void add_source(Random& random) {
    Hyper hyper = any_hyper(random);
    HyperSource source{hyper, nullptr, {}, {}, {}, below(random, 3) == 0};
    if (below(random, 3) == 0) {
      mirrors_.emplace_back(DType::float64, sizeof(Hyper) / sizeof(double), 8 * below(random, 2));
      hyper = any_hyper(random);
      std::memcpy(mirrors_.back().data(), &hyper, sizeof(hyper));
      source.mirror = static_cast<const Hyper*>(mirrors_.back().data());
    }
    const auto place = [&](NumberPointer& pointer, double& value, const std::vector<double>& choices) {
      if (below(random, 2) == 0) return;
      const DType dtype = one_of(random, std::vector{DType::float64, DType::float32, DType::bfloat16, DType::float16});
      value = one_of(random, choices);
      pointers_.emplace_back(dtype, 1, size_of(dtype) * below(random, 2));
      pointers_.back().set(0, value);
      pointer = {pointers_.back().data(), dtype};
      count("hyperparameters behind a pointer");
    };
    place(source.lr, hyper.lr, exact_lrs);
    place(source.beta1, hyper.beta1, exact_betas);
    place(source.beta2, hyper.beta2, exact_betas);
    if (source.mirror != nullptr) count("mirrored hyperparameters");
    sources_.push_back(source);
    hypers_.push_back(hyper);
  }

  std::deque<Memory> numbers_, mirrors_, pointers_;
  std::vector<HyperSource> sources_;
  std::vector<Hyper> hypers_;  // what each source shall be read as
  std::vector<StepEntry> entries_;
  std::vector<float> before_;
  std::vector<Scalars> scalars_;
  Scalars unwritten_[1];
  Scaling scaling_{};
  double unscale_ = 1.0;
  std::vector<double> sum_of_squares_;
  bool clips_ = false;
  bool counts_skips_ = false;
  bool skips_ = false;
};

// Entry i has source i / entries_per_source.
std::vector<int> in_order(int source_count, int entries_per_source) {
  std::vector<int> sources(source_count * entries_per_source);
  for (std::size_t i = 0; i < sources.size(); ++i) sources[i] = static_cast<int>(i) / entries_per_source;
  return sources;
}

void check_any_scaling(Random& random) {
  const std::vector<double> scales = {1.0, 1024.0, 1536.7, 3e-39, 0.0, -2.0, INFINITY, NAN};
  const std::vector<double> sums = {0.0, 1e-60, 4.0, 1e60, INFINITY, NAN};
  const std::vector<double> flags = {0.0, -0.0, 1.0, 2.0, -1.0, 1e-45, INFINITY, NAN};
  for (std::size_t scale = 0; scale <= scales.size(); ++scale) {
    for (std::size_t flag = 0; flag <= flags.size(); ++flag) {
      Steps steps(random, 4, in_order(4, 3));
      steps.set_scaling(scale < scales.size() ? &scales[scale] : nullptr, flag < flags.size() ? &flags[flag] : nullptr);
      if (flag % 3 == 0) steps.set_sum_of_squares(one_of(random, sums));
      steps.check("scalings of a step", flag % 2 == 0 ? cuda::small_arguments : cuda::large_arguments);
    }
  }
}

template <int bytes>
void check_limits(Random& random) {
  using Arguments = cuda::AdvanceArguments<bytes>;
  for (const int launches : {1, 2}) {
    for (const int more : {-1, 0, 1}) {
      const int entries = launches * Arguments::entry_capacity + more;
      Steps(random, 1, in_order(1, entries)).check("numbers of steps", bytes);
      const int sources = launches * Arguments::source_capacity + more;
      Steps(random, sources, in_order(sources, 1)).check("numbers of groups", bytes);
      Steps(random, sources, in_order(sources, 3)).check("numbers of groups", bytes);
      std::vector<int> alternating(entries);
      for (int i = 0; i < entries; ++i) alternating[i] = i % 2;
      Steps(random, 2, alternating).check("alternating groups", bytes);
    }
  }
  Steps(random, 1, {}).check("no steps", bytes);
}

}  // namespace

void check_advances() {
  Random random(2);
  check_any_scaling(random);
  check_limits<cuda::small_arguments>(random);
  check_limits<cuda::large_arguments>(random);
}

}  // namespace adamw_ext::sanitized
