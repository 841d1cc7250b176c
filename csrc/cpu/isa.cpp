#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace adamw_ext::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{Isa::baseline};
#if ADAMW_EXT_X86_LEVELS
  if (__builtin_cpu_supports("avx2")) isas.push_back(Isa::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    isas.push_back(Isa::avx512);
  }
#endif
  return isas;
}

Isa choose_isa() {
  const std::vector<Isa> isas = supported_isas();
  const char* forced = std::getenv("ADAMW_EXT_ISA");
  if (forced == nullptr || *forced == '\0') return isas.back();
  std::string choices;
  for (const Isa isa : isas) {
    if (forced == std::string(isa_name(isa))) return isa;
    choices += (choices.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("ADAMW_EXT_ISA must name a level that this build and processor have (" + choices +
                              "), but is '" + forced + "'");
}

}  // namespace adamw_ext::cpu
