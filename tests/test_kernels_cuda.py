"""The CUDA kernels' code, as compilers made it: wide accesses, no spills, and IEEE arithmetic only.

Looks into the extension's binary, so no GPU is needed: at the machine code (SASS) of every architecture in it, and at
the PTX, in which a square root or a division is still one instruction and shows how it rounds.
"""

import functools
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adamw_ext import _C, library_path

ELEMENT_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MANGLED = {"float64": "d", "float32": "f", "bfloat16": "N?S?_?8bfloat16E?", "float16": "N?S?_?7float16E?"}
ARGUMENT_BYTES = (4096, 32764)


def find_tool(name: str) -> str | None:
    """On PATH, or where the package nvidia-cuda-NAME puts it."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    return shutil.which(name) or (str(packaged[0]) if packaged else None)


CUOBJDUMP = find_tool("cuobjdump")
NVDISASM = find_tool("nvdisasm")

pytestmark = [
    pytest.mark.skipif(not _C.cuda_kernels, reason="this build has no CUDA kernels"),
    pytest.mark.skipif(
        CUOBJDUMP is None or NVDISASM is None,
        reason="cuobjdump and nvdisasm (CUDA toolkit, or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm) are missing",
    ),
]


@dataclass
class Kernel:
    name: str  # mangled
    architecture: str
    code: list[str] = field(default_factory=list)  # mnemonics with their suffixes

    def count(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, mnemonic) is not None for mnemonic in self.code)


def cuobjdump(*options: str) -> str:
    assert CUOBJDUMP is not None
    assert NVDISASM is not None
    environment = {"PATH": f"{Path(CUOBJDUMP).parent}:{Path(NVDISASM).parent}:/usr/bin:/bin"}
    command = [CUOBJDUMP, *options, library_path()]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@functools.cache
def kernels() -> list[Kernel]:
    found: list[Kernel] = []
    architecture = ""
    for line in cuobjdump("--dump-sass").splitlines():
        if header := re.match(r"\s*code for (sm_\d+)", line):
            architecture = header[1]
        elif name := re.match(r"\s*Function : (\S+)", line):
            found.append(Kernel(name[1], architecture))
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", line):
            found[-1].code.append(code[1])
    return found


@functools.cache
def ptx() -> str:
    return cuobjdump("--dump-ptx")


def update_kernels(combination: tuple[str, str, str, str], amsgrad: bool) -> list[Kernel]:
    """Of all architectures and argument sizes."""
    param, moment, master, rounding = combination
    second = "S\\d?_" if moment == param and param in ("bfloat16", "float16") else MANGLED[moment]
    kept, rounded = ("none", "float32", "remainder").index(master), ("nearest", "stochastic").index(rounding)
    modes = rf"L\w*?6MasterE{kept}EL\w*?8RoundingE{rounded}EE"
    types = rf"CombinationI{MANGLED[param]}{second}{modes}(?:Lb|\w*?Lb){int(amsgrad)}E"
    return [kernel for kernel in kernels() if re.search(types, kernel.name)]


def architectures() -> set[str]:
    return {kernel.architecture for kernel in kernels()}


def test_every_architecture_has_all_kernels() -> None:
    names = defaultdict(set)
    for kernel in kernels():
        names[kernel.architecture].add(kernel.name)
    assert set(re.findall(r"\bsm_\d+", _C.cuda_architectures)) == set(names)
    update_count = len(_C.combinations()) * 2 * len(ARGUMENT_BYTES)
    for architecture, found in names.items():
        assert sum("update_kernel" in name for name in found) == update_count, architecture
        for name in ("advance_kernel", "norm_kernel"):
            assert sum(name in kernel for kernel in found) == len(ARGUMENT_BYTES), architecture


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("combination", _C.combinations(), ids="-".join)
def test_a_packet_is_moved_16_bytes_at_a_time(combination: tuple[str, str, str, str], amsgrad: bool) -> None:
    param, moment, master, _ = combination
    lanes = 16 // min(ELEMENT_SIZES[param], ELEMENT_SIZES[moment])
    of_param, of_moment = (lanes * ELEMENT_SIZES[dtype] // 16 for dtype in (param, moment))
    of_master = lanes * {"none": 0, "float32": 4, "remainder": 2}[master] // 16
    moments = 3 if amsgrad else 2
    chosen = update_kernels(combination, amsgrad)
    assert len(chosen) == len(ARGUMENT_BYTES) * len(architectures())
    for kernel in chosen:
        what = f"{kernel.name} for {kernel.architecture}"
        assert kernel.count(r"LDG\.E\S*\.128\S*") >= 2 * of_param + of_master + moments * of_moment, what
        # A gradient is written, too, where it is unscaled in place.
        assert kernel.count(r"STG\.E\S*\.128\S*") >= 2 * of_param + of_master + moments * of_moment, what


def test_memory_is_accessed_as_global_memory() -> None:
    """A generic access (LD, ST) looks up at run time which memory it means."""
    for kernel in kernels():
        assert kernel.count(r"(LD|ST)\.E\S*") == 0, f"{kernel.name} for {kernel.architecture}"


def test_nothing_is_spilled_to_local_memory() -> None:
    for kernel in kernels():
        assert kernel.count(r"(LDL|STL)\S*") == 0, f"{kernel.name} for {kernel.architecture}"
    usage = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resource_usage())
    assert len(usage) == len(kernels())
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), f"{name} with {registers} registers"


def resource_usage() -> str:
    return cuobjdump("--dump-resource-usage")


def test_ptx_has_no_approximate_or_flushing_or_contracted_arithmetic() -> None:
    if "compute_" not in _C.cuda_architectures:
        pytest.skip("this build has no PTX: add +PTX to TORCH_CUDA_ARCH_LIST")
    floating = set(re.findall(r"^\s*(?:@%?\w+\s+)?([a-z0-9.]+\.(?:f16|bf16|f32|f64))\s", ptx(), flags=re.MULTILINE))
    assert {"sqrt.rn.f32", "sqrt.rn.f64", "div.rn.f32", "div.rn.f64"} <= floating
    assert {"mul.rn.f32", "add.rn.f32", "sub.rn.f32"} <= floating or {"mul.f32", "add.f32", "sub.f32"} <= floating
    forbidden = re.compile(r".*\.(approx|ftz|full|sat)\b.*|(fma|mad)\..*|(rsqrt|ex2|lg2|sin|cos|tanh)\..*")
    assert not {instruction for instruction in floating if forbidden.fullmatch(instruction)}


def test_arguments_fit_into_a_launch() -> None:
    if "compute_" not in _C.cuda_architectures:
        pytest.skip("this build has no PTX: add +PTX to TORCH_CUDA_ARCH_LIST")
    argument = r"\.param \.align \d+ \.b8 \S*(?:update|advance|upload|norm)_kernel\S*_param_0\[(\d+)\]"
    sizes = [int(size) for size in re.findall(argument, ptx())]
    assert len(sizes) == (len(_C.combinations()) * 2 + 3) * len(ARGUMENT_BYTES)
    assert all(any(limit * 0.9 < size <= limit for limit in ARGUMENT_BYTES) for size in sizes)
