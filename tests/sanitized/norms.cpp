// The norm of the gradients, and clipping by it, against the CPU's.
#include <memory>

#include "core/advance.h"
#include "cpu/launch.h"
#include "cuda/arguments.h"
#include "cuda/emulation.h"
#include "cuda/pack.h"
#include "sparse.h"
#include "tensors.h"

namespace adamw_ext::sanitized {
namespace {

// Heap memory for as many doubles, and no more.
using Doubles = std::unique_ptr<double[]>;
Doubles doubles(std::int64_t count) { return Doubles(new double[count]); }

// A number in memory, at an address that is a multiple of 4 only.
class Number {
 public:
  explicit Number(float value) : memory_(DType::float32, 1, 4) { memory_.set(0, value); }
  const float* address() const { return static_cast<const float*>(memory_.data()); }

 private:
  Memory memory_;
};

struct NormWay {
  int argument_bytes = cuda::large_arguments;
  double unscale = 1.0;
  Scaling scaling{};
};

bool same(double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (a != a && b != b); }

Table table_of(const std::vector<TensorEntry>& entries, const Extent& extent) {
  return {entries.data(), static_cast<std::int64_t>(entries.size()), nullptr, 0, extent.units, extent.pieces};
}

// Those that are not part of the step have no elements, as the stepper sees to.
std::vector<TensorEntry> laid_out(std::vector<TensorEntry> entries, Extent& extent) {
  for (TensorEntry& entry : entries) {
    if (entry.scalars < 0) entry.numel = 0;
  }
  extent = lay_out(entries.data(), static_cast<std::int64_t>(entries.size()));
  return entries;
}

double sum_on_cpu(const Table& table, const NormWay& way) {
  const Doubles sums = doubles(table.piece_count);
  const double sum = cpu::sum_squares(table, {cpu::Isa::baseline, 1, 0, 1.0}, sums.get());
  return unscale_squares(sum, way.unscale * way.scaling.unscale());
}

constexpr double untouched = -5.0;

double sum_emulated(const Table& table, const NormWay& way) {
  const Doubles sums = doubles(table.piece_count), sum = doubles(1);
  *sum.get() = untouched;
  const cuda::Limits limits{way.argument_bytes, 132};
  require(cuda::emulate_norm(table, way.scaling, way.unscale, sums.get(), sum.get(), limits) == 0, "an error");
  return *sum.get();
}

void compare_sums(const std::string& kind, const std::vector<Shape>& shapes, const NormWay& way, Random& random) {
  const Tensors tensors(shapes, random);
  const Tensors before = tensors;
  Extent extent;
  std::vector<TensorEntry> entries = laid_out(tensors.entries(), extent);
  if (fault == Fault::short_norm && !entries.empty()) ++entries.back().numel;
  const Table table = table_of(entries, extent);
  const double expected = way.scaling.skips() ? untouched : sum_on_cpu(table, way);
  require(same(sum_emulated(table, way), expected), kind + ": another sum than the CPU's");
  tensors.require_same(before, kind);
  count(kind);
}

NormWay any_way(Random& random) {
  return {one_of(random, std::vector{cuda::small_arguments, cuda::large_arguments}),
          one_of(random, std::vector{1.0, 0.37}),
          {}};
}

// A float64 or float32 param with a gradient of any type: all that the norm looks at.
Shape shape_of(DType grad, std::int64_t numel, int offset) {
  Shape shape{grad == DType::float64 ? 0 : 1, false, numel};
  shape.offsets[1] = offset;
  for (shape.other_grad = 0; shape.grad_dtype() != grad;) ++shape.other_grad;
  return shape;
}

DType any_grad(Random& random) { return static_cast<DType>(below(random, dtype_count)); }

// Around nothing, packets, rows and pieces.
std::int64_t any_numel(Random& random) {
  const std::int64_t around = one_of(random, std::vector{0, 8, 64, 256, 512, 4096, 8192});
  return std::max<std::int64_t>(0, around + below(random, 40) - 20);
}

void check_random_norms(Random& random) {
  for (int round = 0; round < 100; ++round) {
    std::vector<Shape> shapes;
    for (std::int64_t i = below(random, 30); i > 0; --i) {
      shapes.push_back(shape_of(any_grad(random), any_numel(random), static_cast<int>(below(random, 16))));
      if (below(random, 10) == 0) shapes.back().scalars = -1;
    }
    compare_sums("norms of random tables", shapes, any_way(random), random);
  }
  compare_sums("norms of nothing", {}, any_way(random), random);
  compare_sums("norms of nothing", std::vector<Shape>(300, shape_of(DType::float32, 0, 1)), any_way(random), random);
}

// Every length up to three rows of the shortest packets, at every alignment.
void check_norm_alignments(Random& random) {
  for (int dtype = 0; dtype < dtype_count; ++dtype) {
    const int lanes = 16 / size_of(static_cast<DType>(dtype));
    for (int offset = 0; offset < lanes; ++offset) {
      std::vector<Shape> shapes;
      for (int length = 0; length < 800; length += 1 + length / 64) {
        shapes.push_back(shape_of(static_cast<DType>(dtype), length, offset));
      }
      compare_sums("norms at every alignment", shapes, any_way(random), random);
    }
  }
}

template <int bytes>
void check_norm_boundaries(Random& random) {
  constexpr int entries = cuda::NormArguments<bytes>::entry_capacity;
  NormWay way = any_way(random);
  way.argument_bytes = bytes;
  for (const int tensors : {entries - 1, entries, entries + 1, 2 * entries + 1}) {
    std::vector<Shape> shapes(tensors, shape_of(DType::bfloat16, 3, 1));
    compare_sums("norms of many tensors", shapes, way, random);
    shapes[0].numel = shapes[entries - 2].numel = shapes[tensors - 1].numel = 0;
    compare_sums("norms of many tensors", shapes, way, random);
  }
}

void check_norm_scalings(Random& random) {
  for (const float scale : {1.0f, 1024.0f, 1536.7f, 3e-39f, 0.0f, -2.0f, INFINITY, NAN}) {
    for (const float found : {0.0f, -0.0f, 1.0f, 2.0f, -1.0f, 1e-45f, INFINITY, NAN}) {
      const Number grad_scale(scale), found_inf(found);
      NormWay way = any_way(random);
      way.unscale = 1.0;
      way.scaling = {grad_scale.address(), found_inf.address()};
      compare_sums("norms of scaled gradients", {shape_of(any_grad(random), 300, 1), shape_of(any_grad(random), 5, 0)},
                   way, random);
    }
  }
}

// A step whose scalars are clipped by a sum: where the host has counted they are uploaded, whatever their number.
void check_clipping(Random& random) {
  for (const double sum : {0.0, 1e-60, 4.0, 1e60, double(INFINITY), double(NAN)}) {
    for (const int scalars_count : {1, cuda::scalars_by_value, cuda::scalars_by_value + 1, 500}) {
      std::vector<Shape> shapes;
      for (int i = 0; i < scalars_count; ++i) {
        shapes.push_back({static_cast<int>(below(random, combination_count)), i % 2 == 0, 1 + i % 20, i});
        shapes.back().element_number = element_number(i, 0);
      }
      const Tensors expected(shapes, random);
      const Tensors actual = expected;
      std::vector<Scalars> scalars(scalars_count);
      for (Scalars& each : scalars) {
        each = compute_scalars(any_hyper(random), 1 + below(random, 5), 0.37, below(random, 3) == 0);
      }
      std::vector<Scalars> clipped = scalars;
      for (Scalars& each : clipped) clip(each, sum);

      Extent extent;
      const std::vector<TensorEntry> on_cpu = laid_out(expected.entries(), extent);
      Table table = table_of(on_cpu, extent);
      table.scalars = clipped.data();
      table.scalars_count = scalars_count;
      cpu::launch(table, {cpu::Isa::baseline, 1, 0, 0.37});

      const std::vector<TensorEntry> emulated = actual.entries();
      table.entries = emulated.data();
      table.scalars = scalars.data();
      const Doubles sum_of_squares = doubles(1);
      *sum_of_squares.get() = sum;
      StepTable steps{};
      steps.sum_of_squares = sum_of_squares.get();
      std::vector<Scalars> device_scalars(scalars_count);
      const cuda::Limits limits{one_of(random, std::vector{cuda::small_arguments, cuda::large_arguments}), 132};
      require(cuda::emulate_step(table, steps, device_scalars.data(), /*writes_grads=*/true, limits) == 0, "an error");
      actual.require_same(expected, "clipped steps");
      count("clipped steps");
    }
  }
}

}  // namespace

void check_norms() {
  Random random(3);
  check_random_norms(random);
  check_norm_alignments(random);
  check_norm_boundaries<cuda::small_arguments>(random);
  check_norm_boundaries<cuda::large_arguments>(random);
  check_norm_scalings(random);
  check_clipping(random);
}

// The pieces around element 2**31 and the last one of a tensor of 2**32 + 1 elements. Each is what the CPU makes of the
// same elements as a tensor of their own.
void check_huge_norm() {
  Random random(4);
  constexpr std::int64_t numel = (std::int64_t(1) << 32) + 1;
  const Sparse memory(numel);
  cuda::NormArguments<cuda::small_arguments> arguments{};
  arguments.entries[0] = {memory.data(), numel, static_cast<std::uint64_t>(DType::bfloat16), /*first_piece=*/7};
  arguments.entry_count = 1;
  arguments.first_piece = 7;
  arguments.piece_count = pieces_of(numel);
  const std::int64_t middle = pieces_of(numel) / 2;
  for (const std::int64_t piece : {std::int64_t(0), middle - 1, middle, pieces_of(numel) - 2, pieces_of(numel) - 1}) {
    const std::int64_t begin = piece * elements_per_piece;
    std::vector<bfloat16> alone(std::min(elements_per_piece, numel - begin));
    for (std::size_t i = 0; i < alone.size(); ++i) {
      store(alone[i], static_cast<float>(std::fmin(std::fabs(any_number(random)), 1e9)));
      memory.data()[begin + static_cast<std::int64_t>(i)] = alone[i];
    }
    Extent extent;
    std::vector<TensorEntry> entries(1);
    entries[0].grad = alone.data();
    entries[0].numel = static_cast<std::int64_t>(alone.size());
    entries[0].grad_dtype = DType::bfloat16;
    entries = laid_out(entries, extent);
    double accumulators[piece_width];
    for (int thread = 0; thread < cuda::threads_per_piece; ++thread) {
      require(cuda::square_share_of(arguments, piece, thread, accumulators), "a piece");
    }
    for (int half = piece_width / 2; half > 0; half /= 2) fold(accumulators, half, 0, 1);
    require(same(accumulators[0], sum_on_cpu(table_of(entries, extent), {})), "a piece of a huge tensor");
    count("pieces of a huge tensor");
  }
}

}  // namespace adamw_ext::sanitized
