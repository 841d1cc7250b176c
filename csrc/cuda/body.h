// What one thread of the update kernel does: its share of a run of elements of one tensor.
//
// Plain C++ for host and device: kernels.cu runs it on a GPU, emulation.cpp walks it over all threads on the host.
//
// Elements go in packets of at least 16 bytes of every type, each pointer with 16-byte accesses where it allows them
// and element by element where it does not. What is left at both ends goes in packets of one element.
#pragma once

#include <cstdint>

#include "../core/dtypes.h"
#include "../core/rounding.h"
#include "../core/table.h"
#include "../core/update.h"
#include "entry.h"

namespace adamw_ext::cuda {

// What a thread moves at once: 16 bytes, or 8 where a packet of a short type has no more.
constexpr int vector_bytes = 16;

template <int bytes>
struct __attribute__((aligned(bytes), may_alias)) Vector {
  std::uint16_t halves[bytes / 2];
};
template <>
struct __attribute__((aligned(8), may_alias)) Vector<8> {
  std::uint32_t words[2];
};
template <>
struct __attribute__((aligned(16), may_alias)) Vector<16> {
  std::uint32_t words[4];
};

// An access of so many bytes. On the host it promises nothing about the address: GCC 12 at -O3 executes an aligned load
// before the test of its alignment (if-conversion after SLP vectorisation). So the host looks itself.
template <int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE Vector<bytes> load_vector(const void* from, int index) {
#if defined(__CUDA_ARCH__)
  return static_cast<const Vector<bytes>*>(from)[index];
#else
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0) __builtin_trap();
  Vector<bytes> vector;
  std::memcpy(&vector, static_cast<const char*>(from) + index * bytes, bytes);
  return vector;
#endif
}

template <int bytes>
ADAMW_EXT_HD ADAMW_EXT_INLINE void store_vector(void* to, int index, const Vector<bytes>& vector) {
#if defined(__CUDA_ARCH__)
  // In PTX, because the compiler would otherwise cut some stores into smaller ones, which other branches have, too.
  void* const address = static_cast<Vector<bytes>*>(to) + index;
  if constexpr (bytes == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
                 "r"(vector.words[0]), "r"(vector.words[1]), "r"(vector.words[2]), "r"(vector.words[3])
                 : "memory");
  } else if constexpr (bytes == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(vector.words[0]),
                 "r"(vector.words[1])
                 : "memory");
  } else {
    *static_cast<Vector<bytes>*>(address) = vector;
  }
#else
  if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0) __builtin_trap();
  std::memcpy(static_cast<char*>(to) + index * bytes, &vector, bytes);
#endif
}

// How a packet of `count` elements is cut into vectors.
template <class Storage, int count>
struct Cut {
  static constexpr int bytes = count * static_cast<int>(sizeof(Storage));
  static constexpr int vector = bytes < vector_bytes ? bytes : vector_bytes;
  static constexpr int per_vector = vector / static_cast<int>(sizeof(Storage));
  static constexpr int vectors = bytes / vector;

  struct Elements {
    Storage values[per_vector];
  };
};

// Calls visit(k, element) for each element of a packet.
template <int count, class Storage, class Visit>
ADAMW_EXT_HD ADAMW_EXT_INLINE void load_packet(const Storage* from, bool aligned, const Visit& visit) {
  using C = Cut<Storage, count>;
  if (count > 1 && aligned) {
    ADAMW_EXT_UNROLL
    for (int i = 0; i < C::vectors; ++i) {
      const auto elements = bit_cast<typename C::Elements>(load_vector<C::vector>(from, i));
      ADAMW_EXT_UNROLL
      for (int k = 0; k < C::per_vector; ++k) visit(i * C::per_vector + k, elements.values[k]);
    }
  } else {
    ADAMW_EXT_UNROLL
    for (int i = 0; i < count; ++i) visit(i, from[i]);
  }
}

// Stores make(k) as element k of a packet.
template <int count, class Storage, class Make>
ADAMW_EXT_HD ADAMW_EXT_INLINE void store_packet(Storage* to, bool aligned, const Make& make) {
  using C = Cut<Storage, count>;
  if (count > 1 && aligned) {
    ADAMW_EXT_UNROLL
    for (int i = 0; i < C::vectors; ++i) {
      typename C::Elements elements;
      ADAMW_EXT_UNROLL
      for (int k = 0; k < C::per_vector; ++k) elements.values[k] = make(i * C::per_vector + k);
      store_vector<C::vector>(to, i, bit_cast<Vector<C::vector>>(elements));
    }
  } else {
    ADAMW_EXT_UNROLL
    for (int i = 0; i < count; ++i) to[i] = make(i);
  }
}

template <int count, class Storage, class T>
ADAMW_EXT_HD ADAMW_EXT_INLINE void load_values(const Storage* from, bool aligned, T (&to)[count]) {
  load_packet<count>(from, aligned, [&](int k, Storage element) { to[k] = load(element); });
}

// random: random(k) is what element k is rounded with, where at_random.
template <bool at_random, int count, class Storage, class T, class Random>
ADAMW_EXT_HD ADAMW_EXT_INLINE void store_values(Storage* to, bool aligned, const T (&from)[count],
                                                const Random& random) {
  store_packet<count>(to, aligned, [&](int k) {
    Storage element;
    if constexpr (at_random) {
      element.bits = static_cast<std::uint16_t>(round_at_random(from[k], random(k)));
    } else {
      store(element, from[k]);
    }
    return element;
  });
}

// Which pointers of an entry allow 16-byte accesses at some element.
struct Alignment {
  bool param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master;

  ADAMW_EXT_HD int count() const { return param + grad + exp_avg + exp_avg_sq + max_exp_avg_sq + master; }
};

template <class C, bool amsgrad>
ADAMW_EXT_HD ADAMW_EXT_INLINE Alignment alignment_at(const UpdateEntry<C, amsgrad>& entry, std::int64_t element) {
  const auto aligned = [&](const void* pointer, std::size_t size) {
    return (reinterpret_cast<std::uintptr_t>(pointer) + element * size) % vector_bytes == 0;
  };
  constexpr std::size_t moment_size = sizeof(typename C::Moment);
  return {aligned(entry.param, sizeof(typename C::Param)),
          aligned(entry.grad, size_of(entry.grad_type())),
          aligned(entry.exp_avg, moment_size),
          aligned(entry.exp_avg_sq, moment_size),
          amsgrad && aligned(entry.max_exp_avg_sq(), moment_size),
          C::has_master && aligned(entry.master(), sizeof(typename C::MasterStorage))};
}

// How many elements to leave before the first packet, so that most pointers allow 16-byte accesses from there on.
template <int lanes, class C, bool amsgrad>
ADAMW_EXT_HD ADAMW_EXT_INLINE int choose_head(const UpdateEntry<C, amsgrad>& entry) {
  constexpr int pointers = 4 + amsgrad + C::has_master;
  int best = 0;
  int most = 0;
  for (int head = 0; head < lanes && most < pointers; ++head) {
    const int count = alignment_at(entry, head).count();
    if (count > most) {
      most = count;
      best = head;
    }
  }
  return best;
}

// Calls visit with the gradient's pointer at element `index`, as a pointer to what it points to. T: what the arithmetic
// runs in.
template <class T, class Visit>
ADAMW_EXT_HD ADAMW_EXT_INLINE void visit_grad(void* grad, DType dtype, std::int64_t index, const Visit& visit) {
  if constexpr (sizeof(T) == sizeof(double)) {
    visit(static_cast<double*>(grad) + index);
  } else if (dtype == DType::float32) {
    visit(static_cast<float*>(grad) + index);
  } else if (dtype == DType::bfloat16) {
    visit(static_cast<bfloat16*>(grad) + index);
  } else {
    visit(static_cast<float16*>(grad) + index);
  }
}

template <class T>
struct UpdateOptions {
  const StepScalars<T>& scalars;
  bool forgetful;     // what forgets_fast says of the scalars
  bool writes_grads;  // gradients are unscaled in place
  Places places;      // of the entry's elements; run 0: they follow each other
};

// The random words of the elements of a packet. Each is taken apart only where it is used, to hold few registers.
template <int lanes>
struct PacketWords {
  std::uint32_t first[lanes], second[lanes];

  // The packet's first element is `index` of those whose first one has this number.
  ADAMW_EXT_HD ADAMW_EXT_INLINE void fill(const RandomKey& key, std::uint64_t element_number, std::uint64_t index,
                                          const Places& places) {
    RandomBlock block{};
    std::uint64_t last = 0;
    ADAMW_EXT_UNROLL
    for (int lane = 0; lane < lanes; ++lane) {
      const std::uint64_t place = places.run == 0 ? index + lane : places.of(index + lane);
      const std::uint64_t number = element_number + place;
      const bool is_odd = number % elements_per_block != 0;
      if (lane == 0 || !is_odd || number != last + 1) block = random_block(key, number / elements_per_block);
      last = number;
      first[lane] = is_odd ? block.words[2] : block.words[0];
      second[lane] = is_odd ? block.words[3] : block.words[1];
    }
  }

  ADAMW_EXT_HD ADAMW_EXT_INLINE RandomBits bits(int lane) const { return random_bits(first[lane], second[lane]); }
};

template <int lanes, class C, bool amsgrad>
ADAMW_EXT_HD ADAMW_EXT_INLINE void update_packet(const UpdateEntry<C, amsgrad>& entry, std::int64_t index,
                                                 Alignment aligned, const UpdateOptions<typename C::T>& options) {
  using T = typename C::T;
  using Param = typename C::Param;
  using Moment = typename C::Moment;
  using MasterStorage = typename C::MasterStorage;
  Param* const param = static_cast<Param*>(entry.param) + index;
  MasterStorage* const master = C::has_master ? static_cast<MasterStorage*>(entry.master()) + index : nullptr;
  Moment* const exp_avg = static_cast<Moment*>(entry.exp_avg) + index;
  Moment* const exp_avg_sq = static_cast<Moment*>(entry.exp_avg_sq) + index;
  Moment* const max_exp_avg_sq = amsgrad ? static_cast<Moment*>(entry.max_exp_avg_sq()) + index : nullptr;

  T p[lanes], g[lanes], m[lanes], v[lanes], v_max[lanes] = {};
  visit_grad<T>(entry.grad, entry.grad_type(), index, [&](const auto* grad) { load_values(grad, aligned.grad, g); });
  if constexpr (C::has_master) {
    std::uint32_t shown[lanes];
    load_packet<lanes>(param, aligned.param, [&](int k, Param element) { shown[k] = element.bits; });
    load_packet<lanes>(master, aligned.master,
                       [&](int k, MasterStorage element) { p[k] = recall<C>({shown[k], element}); });
  } else {
    load_values(param, aligned.param, p);
  }
  load_values(exp_avg, aligned.exp_avg, m);
  load_values(exp_avg_sq, aligned.exp_avg_sq, v);
  if constexpr (amsgrad) load_values(max_exp_avg_sq, aligned.max_exp_avg_sq, v_max);
  const StepScalars<T>& s = options.scalars;
  ADAMW_EXT_UNROLL
  for (int lane = 0; lane < lanes; ++lane) {
    Element<T> e{p[lane], m[lane], v[lane], v_max[lane]};
    update<amsgrad>(e, g[lane] * s.grad_factor, s, options.forgetful);
    p[lane] = e.param;
    m[lane] = e.exp_avg;
    v[lane] = e.exp_avg_sq;
    v_max[lane] = e.max_exp_avg_sq;
  }
  constexpr bool at_random = C::rounds_moments_at_random;
  PacketWords<lanes> words;
  if constexpr (C::is_stochastic) words.fill(s.random, entry.element_number(), index, options.places);
  if constexpr (C::has_master) {
    store_packet<lanes>(param, aligned.param,
                        [&](int k) { return Param{static_cast<std::uint16_t>(keep<C>(p[k]).shown)}; });
    store_packet<lanes>(master, aligned.master, [&](int k) { return keep<C>(p[k]).stored; });
  } else {
    store_values<C::rounds_param_at_random>(param, aligned.param, p, [&](int k) { return words.bits(k).param; });
  }
  store_values<at_random>(exp_avg, aligned.exp_avg, m, [&](int k) { return words.bits(k).exp_avg; });
  store_values<at_random>(exp_avg_sq, aligned.exp_avg_sq, v, [&](int k) { return words.bits(k).exp_avg_sq; });
  if constexpr (amsgrad)
    store_values<at_random>(max_exp_avg_sq, aligned.max_exp_avg_sq, v_max,
                            [&](int k) { return words.bits(k).max_exp_avg_sq; });
  if (options.writes_grads) {
    ADAMW_EXT_UNROLL
    for (int lane = 0; lane < lanes; ++lane) g[lane] *= s.unscale;
    visit_grad<T>(entry.grad, entry.grad_type(), index, [&](auto* grad) {
      store_values<false>(grad, aligned.grad, g, [&](int k) { return words.bits(k).param; });
    });
  }
}

// Updates the share of thread `thread` of `threads` in elements [begin, end) of one entry. begin: a multiple of 64.
template <class C, bool amsgrad>
ADAMW_EXT_HD ADAMW_EXT_INLINE void update_segment(const UpdateEntry<C, amsgrad>& entry, std::int64_t begin,
                                                  std::int64_t end, int thread, int threads,
                                                  const UpdateOptions<typename C::T>& options) {
  constexpr std::size_t param_size = sizeof(typename C::Param), moment_size = sizeof(typename C::Moment);
  constexpr int lanes = vector_bytes / (param_size < moment_size ? param_size : moment_size);
  const int head = choose_head<lanes>(entry);
  const Alignment aligned = alignment_at(entry, head);
  const std::int64_t first = begin + head < end ? begin + head : end;
  const std::int64_t packets = (end - first) / lanes;
  const std::int64_t rest = first + packets * lanes;
  for (std::int64_t i = thread; i < packets; i += threads) {
    update_packet<lanes>(entry, first + i * lanes, aligned, options);
  }
  // Both ends together: elements [begin, first) and [rest, end).
  const std::int64_t before = first - begin;
  ADAMW_EXT_NO_UNROLL
  for (std::int64_t i = thread; i < before + (end - rest); i += threads) {
    const std::int64_t index = i < before ? begin + i : rest + (i - before);
    update_packet<1>(entry, index, Alignment{}, options);
  }
}

}  // namespace adamw_ext::cuda
