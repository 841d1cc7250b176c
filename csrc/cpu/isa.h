// The instruction sets that this binary holds loops for, and the choice among them at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace adamw_ext::cpu {

enum class Isa : std::uint8_t { baseline, avx2, avx512 };

const char* isa_name(Isa isa);

// What this binary was built with and this processor can run, the widest last.
std::vector<Isa> supported_isas();

// The widest supported one, or the one that the environment variable ADAMW_EXT_ISA names.
// Throws std::invalid_argument, naming the choices, if it names another.
Isa choose_isa();

}  // namespace adamw_ext::cpu
