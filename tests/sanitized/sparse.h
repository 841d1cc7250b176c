// A tensor of bfloat16 in memory that is there only where it is touched.
#pragma once

#include <sys/mman.h>

#include "check.h"

namespace adamw_ext::sanitized {

class Sparse {
 public:
  explicit Sparse(std::int64_t numel) : bytes_(numel * sizeof(bfloat16)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory_ != MAP_FAILED, "address space for a huge tensor");
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  ~Sparse() { munmap(memory_, bytes_); }

  bfloat16* data() const { return static_cast<bfloat16*>(memory_); }

 private:
  std::size_t bytes_;
  void* memory_;
};

}  // namespace adamw_ext::sanitized
