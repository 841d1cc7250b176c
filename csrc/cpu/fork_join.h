// The one parallel region of a launch.
//
// Promises: calls work() once on each of at most `threads` threads, the calling one among them, and returns when all
// calls have. What the caller has written is seen by all of them, and what they write by the caller.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace adamw_ext::cpu {

#if defined(__SANITIZE_THREAD__)

// ThreadSanitizer does not see how the OpenMP runtime, which is not built with it, wakes its threads and waits for
// them. It is told those two orders, for this region alone: threads of one region still race with each other, and two
// regions at once, too. The compiler's own handing over of `work` comes before the first order, so this function is not
// watched; all that it calls is.
template <class Work>
__attribute__((no_sanitize("thread"), noinline)) void fork_join(int threads, const Work& work) {
  char forked, joined;
  __tsan_release(&forked);
#pragma omp parallel num_threads(threads)
  {
    __tsan_acquire(&forked);
    work();
    __tsan_release(&joined);
  }
  __tsan_acquire(&joined);
}

#else

template <class Work>
void fork_join(int threads, const Work& work) {
#pragma omp parallel num_threads(threads)
  work();
}

#endif

}  // namespace adamw_ext::cpu
