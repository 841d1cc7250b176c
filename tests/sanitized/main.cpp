// The CUDA path, emulated under AddressSanitizer and UndefinedBehaviorSanitizer: tables are cut into launches and every
// thread of every block runs the kernels' text on heap memory that ends where a tensor ends. Expected are the bits of
// the CPU kernel, no access outside a tensor, and 16-byte accesses at multiples of 16 only.
//
// Prints what launches hold, and how many cases of each kind were checked, as lines `words = number`. Ends with status
// 1 at the first difference, or as a sanitizer wishes. The argument seeds a fault, to show that it is noticed.
#include <cstdio>
#include <map>

#include "check.h"
#include "cpu/kernels.h"

// Only the baseline is asked for.
#if ADAMW_EXT_X86_LEVELS
namespace adamw_ext::cpu {
const KernelSet avx2::kernels = {};
const KernelSet avx512::kernels = {};
}  // namespace adamw_ext::cpu
#endif

namespace adamw_ext::sanitized {
namespace {

std::map<std::string, std::int64_t> counts;

}  // namespace

Fault fault = Fault::none;

void fail(const std::string& what) {
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::_Exit(1);
}

void count(const std::string& kind) { ++counts[kind]; }

}  // namespace adamw_ext::sanitized

int main(int argument_count, char** arguments) {
  using namespace adamw_ext::sanitized;
  const std::map<std::string, Fault> faults = {{"short memory", Fault::short_memory},
                                               {"misaligned memory", Fault::misaligned_memory},
                                               {"another bit", Fault::another_bit},
                                               {"short memory of a norm", Fault::short_norm}};
  if (argument_count > 1) fault = faults.at(arguments[1]);
  check_updates();
  check_huge_tensor();
  check_advances();
  check_norms();
  check_huge_norm();
  check_packing();
  print_capacities();
  for (const auto& [kind, cases] : counts) std::printf("%s = %lld\n", kind.c_str(), static_cast<long long>(cases));
}
