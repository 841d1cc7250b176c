// How tables are cut into launches: each is looked at instead of being run.
#include <cstdio>

#include "check.h"
#include "cuda/pack.h"

namespace adamw_ext::sanitized {
namespace {

constexpr cuda::Error some_error = 700;

// Takes launches of a table, in order, and requires each to be what it should.
struct Inspector {
  const Table* table = nullptr;
  const StepTable* steps = nullptr;
  Scalars* destination = nullptr;
  int fails_at = -1;  // the launch that returns an error

  mutable std::int64_t entries = 0;  // of the table, in all launches so far
  mutable std::int64_t launches = 0;
  mutable std::int64_t pieces = 0;
  mutable std::int64_t bytes_of_last = 0;

  std::int64_t next_in_step(std::int64_t index) const {
    while (table->entries[index].scalars < 0 || table->entries[index].numel == 0) ++index;
    return index;
  }

  cuda::Error launched(std::int64_t bytes) const {
    bytes_of_last = bytes;
    count("launches looked at");
    return launches++ == fails_at ? some_error : 0;
  }

  template <class C, bool amsgrad, int bytes>
  cuda::Error update(const cuda::UpdateArguments<C, amsgrad, bytes>& arguments, std::int64_t blocks) const {
    using Arguments = cuda::UpdateArguments<C, amsgrad, bytes>;
    using T = typename C::T;
    static_assert(sizeof(Arguments) <= bytes, "too large for a launch");
    const cuda::UpdateHeader<C>& header = arguments.header;
    require(header.entry_count > 0 && header.entry_count <= Arguments::entry_capacity, "a launch's entries");
    std::int64_t units = 0;
    for (std::int32_t i = 0; i < header.entry_count; ++i, ++entries) {
      const cuda::UpdateEntry<C, amsgrad>& entry = arguments.entries[i];
      entries = next_in_step(entries);
      const TensorEntry& original = table->entries[entries];
      require(entry.param == original.param && entry.grad == original.grad && entry.exp_avg == original.exp_avg &&
                  entry.exp_avg_sq == original.exp_avg_sq && static_cast<std::int64_t>(entry.numel) == original.numel &&
                  entry.grad_type() == original.grad_dtype,
              "an entry, in its place");
      if (amsgrad) require(entry.max_exp_avg_sq() == original.max_exp_avg_sq, "an entry's maximum");
      if (C::has_master) require(entry.master() == original.master, "an entry's master");
      if (C::is_stochastic) {
        require(entry.element_number() == original.element_number, "an entry's element number");
        require((entry.places > 0) == (original.places != nullptr), "an entry's places");
        if (entry.places > 0) {
          require(entry.places <= header.places_count && header.places[entry.places - 1] == *original.places,
                  "an entry's places");
        }
      }
      require(entry.first_unit == units, "an entry's first unit");
      units += units_of(entry.numel);
      require(entry.scalars == original.scalars, "an entry's scalars");
      if (header.device_scalars == nullptr) {
        require(entry.scalars >= 0 && entry.scalars < cuda::scalars_by_value, "scalars by value");
        const StepScalars<T>& expected = table->scalars[original.scalars].as(T());
        require(header.scalars[entry.scalars].step_size == expected.step_size, "scalars by value");
      }
    }
    require(header.unit_count == units, "a launch's units");
    require(header.units_per_chunk > 0 && blocks * header.units_per_chunk >= units &&
                (blocks - 1) * header.units_per_chunk < units,
            "as many blocks as have work");
    require(blocks < (std::int64_t(1) << 31), "a grid's blocks");
    return launched(bytes);
  }

  template <int bytes>
  cuda::Error norm(const cuda::NormArguments<bytes>& arguments) const {
    using Arguments = cuda::NormArguments<bytes>;
    static_assert(sizeof(Arguments) <= bytes, "too large for a launch");
    require(arguments.entry_count > 0 && arguments.entry_count <= Arguments::entry_capacity, "a launch's gradients");
    require(arguments.first_piece == pieces, "a launch's first piece");
    for (std::int32_t i = 0; i < arguments.entry_count; ++i, ++entries) {
      const cuda::NormEntry& entry = arguments.entries[i];
      entries = next_in_step(entries);
      const TensorEntry& original = table->entries[entries];
      require(entry.grad == original.grad && static_cast<std::int64_t>(entry.numel) == original.numel &&
                  entry.grad_dtype == static_cast<std::uint64_t>(original.grad_dtype),
              "a gradient, in its place");
      require(entry.first_piece == pieces, "a gradient's first piece");
      pieces += pieces_of(entry.numel);
    }
    require(arguments.first_piece + arguments.piece_count == pieces, "a launch's pieces");
    return launched(bytes);
  }

  cuda::Error total(const cuda::TotalArguments& arguments) const {
    static_assert(sizeof(cuda::TotalArguments) <= cuda::small_arguments, "too large for a launch");
    require(arguments.count == table->piece_count && pieces == table->piece_count, "all pieces are added up");
    return launched(cuda::small_arguments);
  }

  template <int bytes>
  cuda::Error advance(const cuda::AdvanceArguments<bytes>& arguments) const {
    using Arguments = cuda::AdvanceArguments<bytes>;
    static_assert(sizeof(Arguments) <= bytes, "too large for a launch");
    require(arguments.entry_count > 0 && arguments.entry_count <= Arguments::entry_capacity, "a launch's steps");
    for (std::int32_t i = 0; i < arguments.entry_count; ++i, ++entries) {
      const StepEntry& entry = arguments.entries[i];
      const StepEntry& original = steps->entries[entries];
      require(entry.step == original.step && entry.scalars == original.scalars, "a step, in its place");
      require(entry.source >= 0 && entry.source < Arguments::source_capacity, "a step's source");
      require(arguments.sources[entry.source].values.lr == steps->sources[original.source].values.lr, "its lr");
    }
    return launched(bytes);
  }

  template <int bytes>
  cuda::Error upload(const cuda::UploadArguments<bytes>& arguments) const {
    using Arguments = cuda::UploadArguments<bytes>;
    static_assert(sizeof(Arguments) <= bytes, "too large for a launch");
    require(arguments.count > 0 && arguments.count <= Arguments::scalars_capacity, "an upload's scalars");
    require(arguments.destination == destination + entries, "their place");
    for (std::int32_t i = 0; i < arguments.count; ++i, ++entries) {
      require(arguments.scalars[i].in_double.step_size == table->scalars[entries].in_double.step_size, "a scalar");
    }
    return launched(bytes);
  }
};

// Entries that point at different addresses, none of which is touched.
std::vector<TensorEntry> some_entries(int number, int combination, std::int64_t numel, bool amsgrad = false) {
  static char addresses[50'000];
  std::vector<TensorEntry> entries;
  for (int i = 0; i < number; ++i) {
    char* const address = addresses + i;
    entries.push_back({address, address + 1, address + 2, address + 3, address + 4, address + 5, numel,
                       /*first_unit=*/-1, /*first_piece=*/-1, static_cast<std::uint64_t>(i), /*places=*/nullptr, 0,
                       static_cast<std::uint8_t>(combination), combination == 0 ? DType::float64 : DType::float32,
                       amsgrad});
  }
  return entries;
}

constexpr int float64 = 0, float32 = 1;  // combinations

std::vector<Scalars> some_scalars(int number) {
  std::vector<Scalars> scalars(number);
  for (int i = 0; i < number; ++i) scalars[i].in_double.step_size = scalars[i].in_float.step_size = i;
  return scalars;
}

Table table_of(const std::vector<TensorEntry>& entries, const std::vector<Scalars>& scalars) {
  return {entries.data(),    static_cast<std::int64_t>(entries.size()),
          scalars.data(),    static_cast<std::int64_t>(scalars.size()),
          /*unit_count=*/-1, /*piece_count=*/-1};
}

Inspector inspect(const std::vector<TensorEntry>& entries, const std::vector<Scalars>& scalars, int argument_bytes,
                  bool device_scalars = false, int fails_at = -1) {
  const Table table = table_of(entries, scalars);
  Inspector inspector{&table, nullptr, nullptr, fails_at};
  const cuda::UpdateInputs inputs{device_scalars ? scalars.data() : nullptr, nullptr, false};
  const cuda::Error error = cuda::pack_update(table, inputs, {argument_bytes, 132}, inspector);
  require(error == (fails_at >= 0 ? some_error : 0), "the launcher's error");
  for (; fails_at < 0 && inspector.entries < table.entry_count; ++inspector.entries) {
    const TensorEntry& left = entries[inspector.entries];
    require(left.scalars < 0 || left.numel == 0, "no entry is left out");
  }
  return inspector;
}

std::int64_t rounded_up(std::int64_t number, std::int64_t by) { return (number + by - 1) / by; }

template <class C, bool amsgrad, int bytes>
void check_update_limits(int combination) {
  using Arguments = cuda::UpdateArguments<C, amsgrad, bytes>;
  constexpr int few = cuda::UpdateArguments<C, amsgrad, cuda::small_arguments>::entry_capacity;
  for (const int launches : {1, 2}) {
    for (const int more : {-1, 0, 1}) {
      const int tensors = launches * Arguments::entry_capacity + more;
      std::vector<TensorEntry> entries = some_entries(tensors, combination, 1, amsgrad);
      for (int i = 0; i < tensors; ++i) entries[i].scalars = i % cuda::scalars_by_value;
      for (const bool device_scalars : {false, true}) {
        const Inspector seen = inspect(entries, some_scalars(cuda::scalars_by_value), bytes, device_scalars);
        const int room = tensors <= few ? few : Arguments::entry_capacity;
        require(seen.launches == rounded_up(tensors, room), "as few launches as can be");
        require(seen.bytes_of_last == (tensors <= few ? cuda::small_arguments : bytes), "arguments of the right size");
      }
    }
  }
}

template <int bytes>
void check_upload_limits() {
  constexpr int most = cuda::UploadArguments<bytes>::scalars_capacity;
  constexpr int few = cuda::UploadArguments<cuda::small_arguments>::scalars_capacity;
  std::printf("uploaded scalars %d = %d\n", bytes, most);
  for (const int launches : {1, 2, 3}) {
    for (const int more : {-1, 0, 1}) {
      const int number = launches * most + more;
      const std::vector<Scalars> scalars = some_scalars(number);
      std::vector<Scalars> destination(number);
      const Table table = table_of({}, scalars);
      Inspector inspector{&table, nullptr, destination.data()};
      require(cuda::pack_upload(table, nullptr, destination.data(), {bytes, 132}, inspector) == 0, "an error");
      require(inspector.entries == number, "no scalar is left out");
      require(inspector.launches == rounded_up(number, number <= few ? few : most), "as few uploads as can be");
    }
  }
}

template <int bytes>
void check_advance_limits() {
  using Arguments = cuda::AdvanceArguments<bytes>;
  std::printf("sources %d = %d\n", bytes, Arguments::source_capacity);
  std::printf("steps %d = %d\n", bytes, Arguments::entry_capacity);
  constexpr int few = cuda::AdvanceArguments<cuda::small_arguments>::source_capacity;
  std::vector<float> numbers(3 * Arguments::entry_capacity + 1);
  std::vector<HyperSource> sources(3 * Arguments::source_capacity + 1);
  for (std::size_t i = 0; i < sources.size(); ++i) sources[i].values.lr = i;
  const auto launches_of = [&](int number, int steps_a_source) {
    std::vector<StepEntry> entries;
    for (int i = 0; i < number; ++i) entries.push_back({&numbers[i], i / steps_a_source, i});
    const StepTable table{entries.data(), number, sources.data(), {}, nullptr, nullptr, nullptr};
    Inspector inspector;
    inspector.steps = &table;
    require(cuda::pack_advance(table, {bytes, 132}, inspector) == 0, "an error");
    require(inspector.entries == number, "no step is left out");
    return inspector.launches;
  };
  for (const int launches : {1, 2, 3}) {
    for (const int more : {-1, 0, 1}) {
      const int steps = launches * Arguments::entry_capacity + more;
      require(launches_of(steps, steps) == rounded_up(steps, Arguments::entry_capacity), "launches for all steps");
      const int groups = launches * Arguments::source_capacity + more;
      const int room = groups <= few ? few : Arguments::source_capacity;
      require(launches_of(groups, 1) == rounded_up(groups, room), "launches for all groups");
    }
  }
}

template <int bytes>
void check_norm_limits() {
  using Arguments = cuda::NormArguments<bytes>;
  constexpr int few = cuda::NormArguments<cuda::small_arguments>::entry_capacity;
  std::printf("tensors of a norm %d = %d\n", bytes, Arguments::entry_capacity);
  for (const int launches : {1, 2, 3}) {
    for (const int more : {-1, 0, 1}) {
      const int tensors = launches * Arguments::entry_capacity + more;
      std::vector<TensorEntry> entries = some_entries(tensors, float32, 4097);
      const auto launches_of = [&](std::int64_t fails_at) {
        const Extent extent = lay_out(entries.data(), tensors);
        const Table table{entries.data(), tensors, nullptr, 0, extent.units, extent.pieces};
        Inspector inspector{&table, nullptr, nullptr, static_cast<int>(fails_at)};
        double sums, sum;
        const cuda::Error error = cuda::pack_norm(table, {}, 1.0, &sums, &sum, {bytes, 132}, inspector);
        require(error == (fails_at >= 0 ? some_error : 0), "the launcher's error");
        return inspector.launches;
      };
      const int room = tensors <= few ? few : Arguments::entry_capacity;
      require(launches_of(-1) == rounded_up(tensors, room) + 1, "as few launches as can be, and the total");
      require(launches_of(0) == 1 && launches_of(1) == 2, "no launch after an error");
      entries[0].numel = entries[tensors - 1].numel = 0;
      entries[tensors / 2].numel = 0;
      entries[tensors / 2].scalars = -1;
      require(launches_of(-1) == rounded_up(tensors - 3, room) + 1, "empty tensors take no room");
    }
  }
}

template <int bytes>
void print_entry_capacities() {
#define ADAMW_EXT_CHECK_LIMITS(index, ...)                                      \
  check_update_limits<ADAMW_EXT_COMBINATION(__VA_ARGS__), false, bytes>(index); \
  check_update_limits<ADAMW_EXT_COMBINATION(__VA_ARGS__), true, bytes>(index);
  ADAMW_EXT_FOR_EACH_COMBINATION(ADAMW_EXT_CHECK_LIMITS)
#undef ADAMW_EXT_CHECK_LIMITS
  using Float = Combination<float, float, Master::none, Rounding::nearest>;
  using Double = Combination<double, double, Master::none, Rounding::nearest>;
  std::printf("entries of float %d = %d\n", bytes, cuda::UpdateArguments<Float, false, bytes>::entry_capacity);
  std::printf("entries of double %d = %d\n", bytes, cuda::UpdateArguments<Double, false, bytes>::entry_capacity);
}

}  // namespace

void print_capacities() {
  print_entry_capacities<cuda::small_arguments>();
  print_entry_capacities<cuda::large_arguments>();
  check_norm_limits<cuda::small_arguments>();
  check_norm_limits<cuda::large_arguments>();
  std::printf("scalars by value = %d\n", cuda::scalars_by_value);
  check_upload_limits<cuda::small_arguments>();
  check_upload_limits<cuda::large_arguments>();
  check_advance_limits<cuda::small_arguments>();
  check_advance_limits<cuda::large_arguments>();
}

void check_packing() {
  // 500 tensors are one launch, for the scalars too.
  require(inspect(some_entries(500, float32, 1), some_scalars(1), cuda::large_arguments).launches == 1, "500 tensors");
  inspect({}, {}, cuda::large_arguments);
  inspect(some_entries(20'321, float32, 1), some_scalars(1), cuda::small_arguments);
  inspect(some_entries(20'321, float32, 1), some_scalars(1), cuda::large_arguments);
  inspect(some_entries(600, float32, std::int64_t(1) << 33), some_scalars(1), cuda::large_arguments);

  // Empty tensors, and those that are not part of the step, take no room, wherever they stand.
  using Float = Combination<float, float, Master::none, Rounding::nearest>;
  constexpr int room = cuda::UpdateArguments<Float, false, cuda::large_arguments>::entry_capacity;
  for (const int slot : {0, 1, 57, 58, 59, room - 2, room - 1, room, room + 1, room + 2}) {
    std::vector<TensorEntry> entries = some_entries(room + 3, float32, 1);
    entries[slot].numel = 0;
    entries[room + 2 - slot].scalars = -1;
    require(inspect(entries, some_scalars(1), cuda::large_arguments).launches == 2, "one too many for a launch");
    entries[5].numel = 0;
    require(inspect(entries, some_scalars(1), cuda::large_arguments).launches == 1, "empty tensors take no room");
  }

  // More scalars than travel by value must be uploaded first.
  const std::vector<TensorEntry> entries = some_entries(1, float32, 1);
  const std::vector<Scalars> scalars = some_scalars(cuda::scalars_by_value + 1);
  Inspector none;
  require(cuda::pack_update(table_of(entries, scalars), {}, {cuda::large_arguments, 132}, none) != 0, "an error");
  require(none.launches == 0, "nothing is launched");

  // An error ends the step.
  for (const int launch : {0, 1, 2}) {
    const Inspector seen =
        inspect(some_entries(2'000, float64, 1), some_scalars(1), cuda::large_arguments, false, launch);
    require(seen.launches == launch + 1, "no launch after an error");
  }
}

}  // namespace adamw_ext::sanitized
