"""The machine code of the built module: loops are vector code of their level, and no code needs more than its level.

A binary for all x86-64 processors must not hold a wider instruction outside the loops that are chosen at run time:
DeepSpeed's -march=native builds die with SIGILL on another processor (DeepSpeed#1886).
"""

import functools
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest

from adamw_ext import _C, library_path

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels under test are x86-64's"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed"),
]

LEVELS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
CPP_TYPES = {
    "float64": "double",
    "float32": "float",
    "bfloat16": "adamw_ext::bfloat16",
    "float16": "adamw_ext::float16",
}
COMBINATIONS = _C.combinations()


@dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str

    @property
    def jump_target(self) -> int | None:
        target = re.match(r"([0-9a-f]+) <", self.operands)
        return int(target[1], 16) if self.mnemonic.startswith("j") and target else None

    def __str__(self) -> str:
        return f"{self.address:x}: {self.mnemonic} {self.operands}"


@dataclass
class Function:
    name: str
    code: list[Instruction] = field(default_factory=list)

    @property
    def level(self) -> str:
        """The level whose namespace the function is in; the baseline's rules hold for all others."""
        namespace = re.search(r"adamw_ext::cpu::(avx2|avx512)::", self.name)
        return namespace[1] if namespace else "baseline"

    def innermost_loop_with(self, mnemonic: str, register: str) -> list[Instruction]:
        """The shortest piece of code that is jumped back over and has this instruction on this kind of register."""
        loops = []
        for jump in self.code:
            if jump.jump_target is not None and self.code[0].address <= jump.jump_target < jump.address:
                loop = [i for i in self.code if jump.jump_target <= i.address <= jump.address]
                if any(i.mnemonic == mnemonic and f"%{register}" in i.operands for i in loop):
                    loops.append(loop)
        return min(loops, key=len, default=[])


@functools.cache
def functions() -> list[Function]:
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", library_path()]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    prefixes = r"(?:(?:rep|repz|repnz|lock|notrack|bnd|data16|cs) )*"
    instruction = re.compile(rf"\s*([0-9a-f]+):\s+({prefixes}\S+)\s*([^#]*)")
    found: list[Function] = []
    for line in listing.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            found.append(Function(header[1]))
        elif parts := instruction.match(line):
            found[-1].code.append(Instruction(int(parts[1], 16), parts[2], parts[3].strip()))
    return found


def kernel(level: str, name: str) -> Function:
    """The one function of this name in a level's namespace."""
    matches = [f for f in functions() if f"adamw_ext::cpu::{level}::{name}(" in f.name and "[clone" not in f.name]
    assert len(matches) == 1, f"{len(matches)} functions are called {level}::{name}: was the module stripped?"
    return matches[0]


def assert_vector_loop(function: Function, level: str, operation: str, dtype: str) -> None:
    suffix = "d" if dtype == "float64" else "s"
    mnemonic = ("" if level == "baseline" else "v") + f"{operation}p{suffix}"
    loop = function.innermost_loop_with(mnemonic, LEVELS[level])
    assert loop, f"no loop with {mnemonic} on %{LEVELS[level]} registers in {function.name}"
    element_by_element = re.compile(r"v?((add|sub|mul|div|sqrt|min|max)s[sd]|p(extr|insr)[bwdq])")
    scalar = [str(i) for i in loop if element_by_element.fullmatch(i.mnemonic)]
    assert not scalar, f"the vector loop of {function.name} takes elements apart: {scalar}"


def grad_types(param: str, _moment: str, master: str, rounding: str) -> list[str]:
    """The gradients that a combination has a loop for: the type that the arithmetic runs in, and torch's combinations
    the param's own."""
    own = {param} if (master, rounding) == ("none", "nearest") else set()
    return sorted({*own, "float64" if param == "float64" else "float32"})


def cpp_combination(param: str, moment: str, master: str, rounding: str) -> str:
    kept, rounded = ("none", "float32", "remainder").index(master), ("nearest", "stochastic").index(rounding)
    return (
        f"adamw_ext::Combination<{CPP_TYPES[param]}, {CPP_TYPES[moment]}, "
        f"(adamw_ext::Master){kept}, (adamw_ext::Rounding){rounded}>"
    )


LOOPS = [(combination, grad) for combination in COMBINATIONS for grad in grad_types(*combination)]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize(("combination", "grad"), LOOPS, ids=[f"{'-'.join(c)}-{grad}" for c, grad in LOOPS])
@pytest.mark.parametrize("level", LEVELS)
def test_the_update_loop_is_vector_code_of_its_levels_width(
    level: str, combination: tuple[str, str, str, str], grad: str, amsgrad: bool
) -> None:
    """Square roots and divisions are the last that a compiler vectorises: where they are packed, all is."""
    types = f"{cpp_combination(*combination)}, {CPP_TYPES[grad]}"
    update = kernel(level, f"update_elements<{types}, {str(amsgrad).lower()}>")
    for operation in ("sqrt", "div"):
        assert_vector_loop(update, level, operation, combination[0])


@pytest.mark.parametrize("dtype", CPP_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_unscale_loop_is_vector_code_of_its_levels_width(level: str, dtype: str) -> None:
    assert_vector_loop(kernel(level, f"unscale_elements<{CPP_TYPES[dtype]}>"), level, "mul", dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_widen_loop_is_vector_code_of_its_levels_width(level: str, dtype: str) -> None:
    """A shift makes a bfloat16 a float; a float16 takes the float unit, too."""
    widen = kernel(level, f"widen_elements<{CPP_TYPES[dtype]}>")
    mnemonic = ("" if level == "baseline" else "v") + "pslld"
    assert widen.innermost_loop_with(mnemonic, LEVELS[level])


@pytest.mark.parametrize("dtype", CPP_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_norm_loop_is_vector_code_of_its_levels_width(level: str, dtype: str) -> None:
    """Squares are added in double, whatever the gradient's type."""
    assert_vector_loop(kernel(level, f"add_squares<{CPP_TYPES[dtype]}>"), level, "mul", "float64")


@pytest.mark.parametrize("level", LEVELS)
def test_the_random_loop_is_vector_code_of_its_levels_width(level: str) -> None:
    """Two products a round of as many 32-bit numbers as a vector holds twice, and none of the slow 64-bit ones."""
    random_words = kernel(level, "fill_random_words")
    products = [i for i in random_words.code if re.fullmatch(r"v?pmul\w+|i?mul\w?", i.mnemonic)]
    mnemonic = ("" if level == "baseline" else "v") + "pmuludq"
    assert [i.mnemonic for i in products] == 14 * [mnemonic]
    assert random_words.innermost_loop_with(mnemonic, LEVELS[level])


# What each level may not contain, as the mnemonic and the operands. The run-time choice asks the processor for no more
# than the level's name says: avx2 alone, or AVX-512's F, BW, VL and DQ.
BEYOND_SSE2 = (
    r"v[a-z]\w+|h(add|sub)p[sd]|addsubp[sd]|mov(d|sh|sl)dup|lddqu|ph(add|sub)\w+|pabs[bwd]|psign[bwd]|palignr|pshufb|"
    r"pmulhrsw|pmaddubsw|p?blend\w+|dpp[sd]|extractps|insertps|movntdqa|mpsadbw|packusdw|pcmp(eq|gt)q|pextr[bdq]|"
    r"pinsr[bdq]|p(max|min)(s[bd]|u[wd])|pmov[sz]x\w+|pmul(dq|ld)|ptest|round[ps][sd]|pcmp[ei]str[im]|crc32\w?|popcnt"
)
BMI = r"andn|bextr|bls(i|msk|r)|bzhi|mulx|pdep|pext|rorx|(sar|shl|shr)x"
F16C = r"vcvtph2ps|vcvtps2ph"
BEYOND_AVX512 = (
    r"v\w+[ps]h|vcvtne\w+|vpdp\w+|vpmadd52\w+|vpopcnt\w+|vperm[it]?2?b|vp(compress|expand)[bw]|vpsh[lr]d\w+|"
    r"vpmultishiftqb|vpconflict[dq]|vplzcnt[dq]|vp(broadcastm\w+)|vaes\w+|vpclmul\w+|vgf2p8\w+|vexp2\w+|vr(cp|sqrt)28\w+"
)
FORBIDDEN = {
    "baseline": (rf"{BEYOND_SSE2}|{BMI}", r"%[yz]mm|%k[0-7]"),
    "avx2": (rf"{F16C}|{BMI}", r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])"),
    "avx512": (rf"{BEYOND_AVX512}|{BMI}", r"%tmm"),
}


def beyond(level: str, function: Function) -> list[Instruction]:
    """The function's instructions that the level does not have."""
    mnemonics, operands = (re.compile(pattern) for pattern in FORBIDDEN[level])
    return [i for i in function.code if mnemonics.fullmatch(i.mnemonic) or operands.search(i.operands)]


@pytest.mark.parametrize("level", LEVELS)
def test_no_code_needs_more_than_its_level(level: str) -> None:
    """All functions of the module are looked at: those outside the wider levels' namespaces must run everywhere."""
    of_level = [function for function in functions() if function.level == level]
    assert len(of_level) >= 2 * len(COMBINATIONS)
    for function in of_level:
        found = beyond(level, function)
        assert not found, f"{function.name} has instructions beyond {level}: {[str(i) for i in found[:5]]}"


@pytest.mark.parametrize(("level", "wider"), [("baseline", "avx2"), ("avx2", "avx512")])
def test_the_next_levels_code_would_have_been_noticed(level: str, wider: str) -> None:
    plain = cpp_combination("float32", "float32", "none", "nearest")
    assert beyond(level, kernel(wider, f"update_elements<{plain}, float, false>"))


def test_nothing_is_multiplied_and_added_in_one_rounding() -> None:
    """Contraction is off: a fused multiply-add has other bits than the levels without it."""
    fused = re.compile(r"vfn?m(add|sub)\w+")
    found = [f"{function.name}: {i}" for function in functions() for i in function.code if fused.match(i.mnemonic)]
    assert not found


@pytest.mark.parametrize("level", LEVELS)
def test_a_levels_loops_call_nothing_outside_it(level: str) -> None:
    """A function shared by several levels would be compiled for one of them, and linkers choose which."""
    for function in functions():
        if f"adamw_ext::cpu::{level}::" not in function.name:
            continue
        for i in function.code:
            callee = re.search(r"<(.*?)(\+0x[0-9a-f]+)?>$", i.operands) if i.mnemonic in ("call", "jmp") else None
            assert callee is None or f"adamw_ext::cpu::{level}::" in callee[1], f"{function.name}: {i}"
