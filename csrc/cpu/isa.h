// The instruction sets that this binary holds loops for, and the choice among them at run time.
#pragma once

#include <adamw_ext/export.h>

#include <cstdint>
#include <string>
#include <vector>

namespace adamw_ext::cpu {

enum class Isa : std::uint8_t { baseline, avx2, avx512 };

ADAMW_EXT_API const char* isa_name(Isa isa);

// What this binary was built with and this processor can run, the widest last.
ADAMW_EXT_API std::vector<Isa> supported_isas();

// The widest supported one, or the one that the environment variable ADAMW_EXT_ISA names.
// Throws std::invalid_argument, naming the choices, if it names another.
ADAMW_EXT_API Isa choose_isa();

}  // namespace adamw_ext::cpu
