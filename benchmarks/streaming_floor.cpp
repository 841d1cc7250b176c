// The streaming floor of an AdamW step: a loop that moves the same bytes and computes nothing.
//
// Reads p, g, m, v and writes p, m, v, in one pass over all tensors, on as many threads as the step uses. The mask is
// zero at run time, so no value changes, but the compiler cannot know that and keeps every load and store.
#include <cstdint>

struct Segment {
  std::uint8_t *p, *g, *m, *v;  // the same number of bytes at each
  std::int64_t bytes;
};

template <class T>
static void stream(const Segment& segment, std::int64_t begin, std::int64_t end, T mask) {
  T* __restrict p = reinterpret_cast<T*>(segment.p);
  const T* __restrict g = reinterpret_cast<const T*>(segment.g);
  T* __restrict m = reinterpret_cast<T*>(segment.m);
  T* __restrict v = reinterpret_cast<T*>(segment.v);
#pragma GCC ivdep
  for (std::int64_t i = begin; i < end; ++i) {
    p[i] ^= g[i] & mask;
    m[i] ^= mask;
    v[i] ^= mask;
  }
}

// Threads take `per_turn` segments at a time.
extern "C" void streaming_floor(const Segment* segments, std::int64_t count, std::int64_t per_turn, int threads,
                                std::uint64_t mask) {
#pragma omp parallel for schedule(dynamic, per_turn) num_threads(threads)
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t words = segments[i].bytes / 8;
    stream<std::uint64_t>(segments[i], 0, words, mask);
    stream<std::uint8_t>(segments[i], words * 8, segments[i].bytes, static_cast<std::uint8_t>(mask));
  }
}
