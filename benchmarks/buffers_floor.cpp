// The streaming floor of any step: a loop that reads some buffers, reads and writes others, and computes nothing.
//
// The streams of a piece go forward side by side, as they do in a step: one after the other they would take a tenth
// longer. The mask is zero at run time, so no value changes, but the compiler cannot know that and keeps every load and
// store.
#include <cstdint>
#include <type_traits>

typedef std::uint64_t Line __attribute__((vector_size(64), aligned(1), may_alias));

// `block` bytes, whole lines, are taken at a time, together with the blocks of the other streams. What is left when one
// of them has no whole block any more, and all of a stream whose block is 0, is taken at the end.
struct Stream {
  std::uint8_t* data;
  std::int64_t bytes;
  std::int64_t block;
  std::int64_t is_written;
};

static volatile std::uint64_t sink;

static inline void read(const std::uint8_t* data, std::int64_t bytes, Line& seen) {
  std::int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) seen ^= *reinterpret_cast<const Line*>(data + i);
  for (; i < bytes; ++i) seen[0] ^= data[i];
}

static inline void write(std::uint8_t* data, std::int64_t bytes, std::uint64_t mask) {
  std::int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) *reinterpret_cast<Line*>(data + i) ^= mask;
  for (; i < bytes; ++i) data[i] ^= static_cast<std::uint8_t>(mask);
}

// With the number of bytes known to the compiler, for those that matter.
template <class Function>
static inline void with_bytes(std::int64_t bytes, Function function) {
  switch (bytes) {
    case 64:
      return function(std::integral_constant<std::int64_t, 64>());
    case 128:
      return function(std::integral_constant<std::int64_t, 128>());
    case 256:
      return function(std::integral_constant<std::int64_t, 256>());
    case 512:
      return function(std::integral_constant<std::int64_t, 512>());
    default:
      return function(bytes);
  }
}

static void take(const Stream* streams, std::int64_t count, std::uint64_t mask) {
  std::int64_t blocks = INT64_MAX;
  for (std::int64_t j = 0; j < count; ++j) {
    if (streams[j].block == 0) continue;
    const std::int64_t whole = streams[j].bytes / streams[j].block;
    blocks = whole < blocks ? whole : blocks;
  }
  Line seen = {};
  for (std::int64_t i = 0; i <= blocks; ++i) {
    for (std::int64_t j = 0; j < count; ++j) {
      const Stream& stream = streams[j];
      const std::int64_t begin = i * stream.block;
      const std::int64_t bytes = i < blocks ? stream.block : stream.bytes - begin;
      if (stream.is_written) {
        with_bytes(bytes, [&](auto known) { write(stream.data + begin, known, mask); });
      } else {
        with_bytes(bytes, [&](auto known) { read(stream.data + begin, known, seen); });
      }
    }
  }
  for (int word = 0; word < 8; ++word) {
    if (seen[word] & mask) sink = 1;
  }
}

// Piece i has the streams [i * streams_per_piece, (i + 1) * streams_per_piece), not all with a block of 0.
extern "C" void buffers_floor(const Stream* streams, std::int64_t pieces, std::int64_t streams_per_piece,
                              std::int64_t per_turn, int threads, std::uint64_t mask) {
#pragma omp parallel for schedule(dynamic, per_turn) num_threads(threads)
  for (std::int64_t i = 0; i < pieces; ++i) take(streams + i * streams_per_piece, streams_per_piece, mask);
}
