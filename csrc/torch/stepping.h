// Whether a step is being made.
#pragma once

namespace adamw_ext {

// Sets a flag during a step: code that a step runs, and threads that run during a long one, may try to step as well.
class Stepping {
 public:
  explicit Stepping(bool& flag) : flag_(flag) { flag_ = true; }
  ~Stepping() { flag_ = false; }
  Stepping(const Stepping&) = delete;
  Stepping& operator=(const Stepping&) = delete;

 private:
  bool& flag_;
};

}  // namespace adamw_ext
