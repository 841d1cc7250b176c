// The update kernel against the CPU kernel.
#include "cpu/launch.h"
#include "cuda/arguments.h"
#include "cuda/emulation.h"
#include "cuda/pack.h"
#include "sparse.h"
#include "tensors.h"

namespace adamw_ext::sanitized {
namespace {

// Combinations: of the two types of arithmetic, and one whose entries are the longest.
using Float64 = Combination<double, double, Master::none, Rounding::nearest>;
using Float32 = Combination<float, float, Master::none, Rounding::nearest>;
using Longest = Combination<bfloat16, bfloat16, Master::remainder, Rounding::stochastic>;

template <class C>
int index_of() {
  const DType param = sizeof(typename C::Param) == 8   ? DType::float64
                      : sizeof(typename C::Param) == 4 ? DType::float32
                                                       : DType::bfloat16;
  return find_combination(param, param, C::master, C::is_stochastic ? Rounding::stochastic : Rounding::nearest);
}

const int float64 = index_of<Float64>();
const int float32 = index_of<Float32>();

// How a table is updated.
struct Way {
  int argument_bytes = cuda::large_arguments;
  std::int64_t units_per_chunk = 0;
  bool device_scalars = false;
  double unscale = 1.0;
  const float* found_inf = nullptr;
};

void update_on_cpu(std::vector<TensorEntry> entries, const std::vector<Scalars>& scalars, const Way& way) {
  if (way.found_inf != nullptr && *way.found_inf != 0.0f) return;
  for (TensorEntry& entry : entries) {
    if (entry.scalars < 0) entry.numel = 0;
  }
  const auto entry_count = static_cast<std::int64_t>(entries.size());
  const Extent extent = lay_out(entries.data(), entry_count);
  cpu::launch({entries.data(), entry_count, scalars.data(), static_cast<std::int64_t>(scalars.size()), extent.units,
               extent.pieces},
              {cpu::Isa::baseline, 1, 0, way.unscale});
}

void update_emulated(std::vector<TensorEntry> entries, const std::vector<Scalars>& scalars, const Way& way) {
  for (TensorEntry& entry : entries) {
    if (fault == Fault::short_memory) ++entry.numel;
    if (fault == Fault::misaligned_memory) entry.grad = static_cast<char*>(entry.grad) + 1;
  }
  Table table{entries.data(),    static_cast<std::int64_t>(entries.size()),
              scalars.data(),    static_cast<std::int64_t>(scalars.size()),
              /*unit_count=*/-1, /*piece_count=*/-1};
  const cuda::Limits limits{way.argument_bytes, 132, way.units_per_chunk};
  cuda::UpdateInputs inputs{nullptr, way.found_inf, way.unscale != 1.0};
  std::vector<Scalars> device_scalars;
  if (way.device_scalars || scalars.size() > cuda::scalars_by_value) {
    device_scalars.resize(scalars.size());
    require(cuda::emulate_upload(table, device_scalars.data(), limits) == 0, "an error");
    inputs.device_scalars = device_scalars.data();
    table.scalars = nullptr;
  }
  require(cuda::emulate_update(table, inputs, limits) == 0, "an error");
  if (fault == Fault::another_bit && !entries.empty()) static_cast<unsigned char*>(entries[0].exp_avg)[0] ^= 1;
}

// Updates equal tensors both ways.
void compare(const std::string& kind, const std::vector<Shape>& shapes, const std::vector<Scalars>& scalars,
             const Way& way, Random& random) {
  const Tensors expected(shapes, random);
  const Tensors actual = expected;
  update_on_cpu(expected.entries(), scalars, way);
  update_emulated(actual.entries(), scalars, way);
  actual.require_same(expected, kind);
  count(kind);
}

std::vector<Scalars> any_scalars(std::size_t number, double unscale, Random& random) {
  std::vector<Scalars> scalars(number);
  for (Scalars& each : scalars) {
    each = compute_scalars(any_hyper(random), 1 + below(random, 5), unscale, /*maximize=*/below(random, 4) == 0);
  }
  return scalars;
}

Way any_way(Random& random) {
  return {one_of(random, std::vector{cuda::small_arguments, cuda::large_arguments}),
          one_of(random, std::vector{0, 1, 2, 3, 7, 64, 1000}), below(random, 2) == 0,
          one_of(random, std::vector{1.0, 1.0, 0.37}), nullptr};
}

void compare_any_way(const std::string& kind, const std::vector<Shape>& shapes, Random& random) {
  const Way way = any_way(random);
  compare(kind, shapes, any_scalars(1, way.unscale, random), way, random);
}

// Even and odd, and such that a tensor has blocks on either side of 2**32.
std::uint64_t any_element_number(Random& random) {
  const std::uint64_t around = one_of(random, std::vector<std::uint64_t>{1000, std::uint64_t(1) << 33});
  return element_number(below(random, 1000), around - below(random, 100));
}

// For one entry in `share`. One more than a launch can have.
const Places* any_places(Random& random, std::int64_t share) {
  static constexpr Places some[] = {{1, 5, 2, 64},      {3, 4, 10, 57},   {64, 1000, 200, 0},
                                    {7, 2, 9, 1 << 20}, {130, 3, 131, 1}, {2, 9, 6, std::uint64_t(1) << 32}};
  static_assert(std::size(some) ==
                cuda::places_capacity<Combination<float, bfloat16, Master::none, Rounding::stochastic>> + 1);
  return below(random, share) == 0 ? &some[below(random, std::size(some))] : nullptr;
}

Shape any_shape(Random& random, std::int32_t scalars_count) {
  const std::int64_t around_units = 64 * (1 + below(random, 9)) + below(random, 7) - 3;
  const std::int64_t numel =
      one_of(random, std::vector{std::int64_t(0), below(random, 20), below(random, 130), around_units});
  Shape shape{static_cast<int>(below(random, combination_count)), below(random, 2) == 0, numel};
  shape.scalars = below(random, 10) == 0 ? -1 : static_cast<std::int32_t>(below(random, scalars_count));
  shape.other_grad = static_cast<int>(below(random, 3));
  for (int& offset : shape.offsets) offset = below(random, 3) == 0 ? 0 : static_cast<int>(below(random, 16));
  shape.element_number = any_element_number(random);
  shape.places = any_places(random, 3);
  return shape;
}

void check_random_tables(Random& random) {
  for (int round = 0; round < 150; ++round) {
    const auto scalars_count = static_cast<std::int32_t>(1 + below(random, 25));
    std::vector<Shape> shapes;
    for (std::int64_t i = below(random, 40); i > 0; --i) shapes.push_back(any_shape(random, scalars_count));
    const Way way = any_way(random);
    compare("random tables", shapes, any_scalars(scalars_count, way.unscale, random), way, random);
  }
}

// More places in a launch than it can have.
void check_places(Random& random) {
  const int shortest = index_of<Combination<bfloat16, bfloat16, Master::none, Rounding::stochastic>>();
  for (int round = 0; round < 5; ++round) {
    std::vector<Shape> shapes;
    for (int i = 0; i < 80; ++i) {
      shapes.push_back(any_shape(random, 1));
      shapes.back().combination = i % 2 == 0 ? shortest : index_of<Longest>();
      shapes.back().amsgrad = i % 4 < 2;
      shapes.back().places = any_places(random, 1);
    }
    compare_any_way("parts of tensors", shapes, random);
  }
}

void check_found_inf(Random& random) {
  for (const float value : {0.0f, -0.0f, 1.0f, 2.0f, -1.0f, 1e-45f, INFINITY, -INFINITY, NAN}) {
    Memory flag(DType::float32, 1, 4);
    flag.set(0, value);
    Way way = any_way(random);
    way.found_inf = static_cast<const float*>(flag.data());
    way.unscale = 0.125;
    std::vector<Shape> shapes;
    for (int i = 0; i < 10; ++i) shapes.push_back(any_shape(random, 1));
    compare("values of found_inf", shapes, any_scalars(1, way.unscale, random), way, random);
  }
}

// Between lengths: torch's combinations have all, the others, which share their loops, every third.
int step_of(int combination) {
  const Kind& kind = kinds[combination];
  return kind.master == Master::none && kind.rounding == Rounding::nearest ? 1 : 3;
}

// Every length up to three packets, with each pointer misaligned alone, all others, and all together, by every number
// of elements; for float32, each pointer independently of the others.
void check_alignments(Random& random) {
  for (int combination = 0; combination < combination_count; ++combination) {
    const int lanes = 16 / std::min(size_of(kinds[combination].param), size_of(kinds[combination].moments));
    for (int length = 1; length < 3 * lanes; length += step_of(combination)) {
      std::vector<Shape> shapes;
      for (int offset = 0; offset < lanes; ++offset) {
        const Shape together{combination, true, length, 0, all_at(offset), 0, any_element_number(random)};
        shapes.push_back(together);
        for (int pointer = 0; pointer < pointer_count; ++pointer) {
          if (!together.has(pointer)) continue;
          Shape alone{combination, pointer == 4, length};
          alone.offsets[pointer] = offset;
          shapes.push_back(alone);
          Shape others = together;
          others.offsets[pointer] = 0;
          shapes.push_back(others);
        }
      }
      compare_any_way("lengths at every alignment", shapes, random);
    }
  }
  for (const bool amsgrad : {false, true}) {
    std::vector<Shape> shapes;
    for (int i = 0; i < (amsgrad ? 1024 : 256); ++i) {
      const int length = 1 + (i * 7 + i / 16) % 17;
      shapes.push_back({float32, amsgrad, length, 0, {i % 4, i / 4 % 4, i / 16 % 4, i / 64 % 4, i / 256, 0}});
    }
    compare_any_way("combinations of alignments", shapes, random);
  }
}

void check_tails(Random& random) {
  for (int combination = 0; combination < combination_count; ++combination) {
    for (const int offset : {0, 1}) {
      std::vector<Shape> shapes;
      for (int length = 0; length < 200; length += step_of(combination)) {
        shapes.push_back({combination, length % 2 == 0, length, 0, all_at(offset), 0, any_element_number(random)});
      }
      compare_any_way("tails of every length", shapes, random);
    }
  }
}

// On either side of every limit of a launch, and with an empty tensor in the slots there.
template <class C, bool amsgrad, int bytes>
void check_boundaries(Random& random) {
  constexpr int entries = cuda::UpdateArguments<C, amsgrad, bytes>::entry_capacity;
  const int combination = index_of<C>();
  Way way = any_way(random);
  way.argument_bytes = bytes;
  for (const int tensors : {entries - 1, entries, entries + 1, 2 * entries + 1}) {
    const std::vector<Shape> shapes(tensors, {combination, amsgrad, 1});
    compare("numbers of tensors", shapes, any_scalars(1, way.unscale, random), way, random);
  }
  for (const int slot : {0, entries - 1}) {
    std::vector<Shape> shapes(entries + 2, {combination, amsgrad, 1});
    shapes[slot].numel = shapes[entries + 1 - slot].numel = 0;
    compare("slots of empty tensors", shapes, any_scalars(1, way.unscale, random), way, random);
  }
}

void check_no_tensors(Random& random) {
  compare_any_way("no tensors", {}, random);
  compare_any_way("no tensors", std::vector<Shape>(70, {float32, false, 0}), random);
  compare_any_way("no tensors", std::vector<Shape>(70, {float32, false, 5, -1}), random);
}

// As many different scalars as travel by value, or in one upload, or in two, and one more or less.
template <int bytes>
void check_scalars(Random& random) {
  constexpr int uploaded = cuda::UploadArguments<bytes>::scalars_capacity;
  for (const int limit : {cuda::scalars_by_value, uploaded, 2 * uploaded}) {
    for (const int scalars_count : {limit - 1, limit, limit + 1}) {
      std::vector<Shape> shapes;
      for (int i = 0; i < std::max(scalars_count, 100); ++i) {
        shapes.push_back({i % 2 == 0 ? float64 : float32, false, 1 + i % 3, i % scalars_count});
      }
      const Way way{bytes};
      compare("numbers of scalars", shapes, any_scalars(scalars_count, way.unscale, random), way, random);
    }
  }
}

// The chunks around element 2**31 and the last one of a tensor of 2**32 + 1 elements: 64-bit counts throughout. Each is
// what the CPU kernel makes of the same elements as a tensor of their own.
template <class C>
void check_huge(Random& random) {
  constexpr std::int64_t numel = (std::int64_t(1) << 32) + 1;
  constexpr std::int64_t units_per_chunk = 64;
  constexpr std::int64_t chunk_numel = units_per_chunk * elements_per_unit;
  const Sparse memory[4] = {Sparse(numel), Sparse(numel), Sparse(numel), Sparse(numel)};
  const std::vector<Scalars> scalars = any_scalars(1, 1.0, random);
  const auto entry_of = [](bfloat16* const(&pointers)[4], std::int64_t count, std::uint64_t element_number) {
    return TensorEntry{
        pointers[0],       pointers[1],    pointers[2],        pointers[3], nullptr,
        nullptr,           count,          /*first_unit=*/0,
        /*first_piece=*/0, element_number, /*places=*/nullptr, 0,           static_cast<std::uint8_t>(index_of<C>()),
        DType::bfloat16,   false};
  };
  constexpr std::uint64_t first = element_number(3, 7);
  const TensorEntry whole =
      entry_of({memory[0].data(), memory[1].data(), memory[2].data(), memory[3].data()}, numel, first);

  cuda::UpdateArguments<C, false, cuda::small_arguments> arguments{};
  arguments.entries[0] = cuda::UpdateEntry<C, false>::of(whole, 0, 0);
  arguments.header.entry_count = 1;
  arguments.header.unit_count = units_of(numel);
  arguments.header.units_per_chunk = units_per_chunk;
  arguments.header.scalars[0] = scalars[0].in_float;

  for (const std::int64_t begin : {std::int64_t(0), (std::int64_t(1) << 31) - chunk_numel, std::int64_t(1) << 31,
                                   (std::int64_t(1) << 32) - chunk_numel, std::int64_t(1) << 32}) {
    const std::int64_t end = std::min(begin + chunk_numel, numel);
    std::vector<std::vector<bfloat16>> expected(4, std::vector<bfloat16>(end - begin));
    for (int pointer = 0; pointer < 4; ++pointer) {
      for (std::int64_t i = 0; i < end - begin; ++i) {
        const double number = any_number(random);
        store(expected[pointer][i], static_cast<float>(pointer == 3 ? number * number : number));
        memory[pointer].data()[begin + i] = expected[pointer][i];
      }
    }
    const TensorEntry alone = entry_of({expected[0].data(), expected[1].data(), expected[2].data(), expected[3].data()},
                                       end - begin, first + static_cast<std::uint64_t>(begin));
    update_on_cpu({alone}, scalars, {});
    for (int thread = 0; thread < cuda::threads_per_block; ++thread) {
      cuda::update_chunk(arguments.header, arguments.entries, begin / chunk_numel, thread, cuda::threads_per_block);
    }
    for (int pointer = 0; pointer < 4; ++pointer) {
      for (std::int64_t i = 0; i < end - begin; ++i) {
        const float a = load(memory[pointer].data()[begin + i]), e = load(expected[pointer][i]);
        require(bit_cast<std::uint32_t>(a) == bit_cast<std::uint32_t>(e) || (a != a && e != e), "a huge tensor");
      }
    }
    count("chunks of a huge tensor");
  }
}

}  // namespace

void check_updates() {
  Random random(0);
  check_random_tables(random);
  check_places(random);
  check_found_inf(random);
  check_alignments(random);
  check_tails(random);
  check_boundaries<Float32, false, cuda::small_arguments>(random);
  check_boundaries<Float32, true, cuda::small_arguments>(random);
  check_boundaries<Float64, false, cuda::small_arguments>(random);
  check_boundaries<Longest, true, cuda::small_arguments>(random);
  check_boundaries<Float32, false, cuda::large_arguments>(random);
  check_boundaries<Longest, true, cuda::large_arguments>(random);
  check_no_tensors(random);
  check_scalars<cuda::small_arguments>(random);
  check_scalars<cuda::large_arguments>(random);
}

void check_huge_tensor() {
  Random random(1);
  check_huge<Combination<bfloat16, bfloat16, Master::none, Rounding::nearest>>(random);
  check_huge<Combination<bfloat16, bfloat16, Master::none, Rounding::stochastic>>(random);
}

}  // namespace adamw_ext::sanitized
