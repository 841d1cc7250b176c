"""The emulated CUDA path under AddressSanitizer and UndefinedBehaviorSanitizer, as a program of its own, without torch.

What the program in sanitized/ checks, it counts and prints. That it would notice faults is shown by faults.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_emulation import CAPACITIES, SCALARS_BY_VALUE
from tests.test_max_grad_norm import CAPACITIES as NORM_CAPACITIES

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")
EMULATION = "csrc/cuda/emulation.cpp"  # takes the longest to compile, so it comes first
SOURCES = [
    EMULATION,
    *(f"tests/sanitized/{name}.cpp" for name in ("packing", "updates", "norms", "advances", "main")),
    *(f"csrc/cpu/{name}.cpp" for name in ("kernels_baseline", "launch")),
]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
# Checks as calls, and no optimisation: together they halve the time to compile.
FLAGS = ["-std=c++17", "-O0", "-g1", *SANITIZERS, "--param", "asan-instrumentation-with-call-threshold=0"]
FLAGS += ["-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # as in setup.py

KINDS = {
    "random tables",
    "parts of tensors",
    "values of found_inf",
    "lengths at every alignment",
    "combinations of alignments",
    "tails of every length",
    "numbers of tensors",
    "slots of empty tensors",
    "no tensors",
    "numbers of scalars",
    "chunks of a huge tensor",
    "hyperparameters behind a pointer",
    "mirrored hyperparameters",
    "scalings of a step",
    "numbers of steps",
    "numbers of groups",
    "alternating groups",
    "no steps",
    "launches looked at",
    "norms of random tables",
    "norms of nothing",
    "norms at every alignment",
    "norms of many tensors",
    "norms of scaled gradients",
    "clipped steps",
    "pieces of a huge tensor",
}


def run(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=300)


def compile_source(source: str, target: Path, root: Path = ROOT) -> Path:
    done = run(
        [COMPILER, *FLAGS, "-I", root / "csrc", "-I", ROOT / "adamw_ext/include", "-c", root / source, "-o", target]
    )
    assert done.returncode == 0, done.stderr
    return target


def link(objects: Sequence[Path], target: Path) -> Path:
    done = run([COMPILER, *SANITIZERS, *objects, "-o", target])
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each source; skips where programs cannot be built with the sanitizers, or do not run."""
    folder = tmp_path_factory.mktemp("sanitized")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs a C++ compiler: there is no {COMPILER}")
    (folder / "empty.cpp").write_text("int main() {}\n")
    attempt = run([COMPILER, *SANITIZERS, folder / "empty.cpp", "-o", folder / "empty"])
    if attempt.returncode == 0:
        attempt = run([folder / "empty"])
    if attempt.returncode != 0:
        pytest.skip(f"needs AddressSanitizer: a program that {COMPILER} builds with it fails: {attempt.stderr[-300:]}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda source: compile_source(source, folder / f"{Path(source).stem}.o"), SOURCES)
        return dict(zip(SOURCES, compiled, strict=True))


@pytest.fixture(scope="module")
def program(objects: dict[str, Path]) -> Path:
    return link(list(objects.values()), objects[EMULATION].with_name("program"))


def test_nothing_is_accessed_outside_tensors_and_all_bits_are_the_cpus(program: Path) -> None:
    done = run([program])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    numbers = {words: int(number) for words, _, number in (line.rpartition(" = ") for line in done.stdout.splitlines())}
    kinds = {**CAPACITIES, "tensors of a norm": NORM_CAPACITIES}
    capacities = {f"{kind} {size}": number for kind, by_size in kinds.items() for size, number in by_size.items()}
    capacities["scalars by value"] = SCALARS_BY_VALUE
    assert {words: numbers.pop(words) for words in capacities} == capacities
    assert numbers.keys() == KINDS
    assert all(number > 0 for number in numbers.values())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("short memory", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned memory", "misaligned address"),
        ("another bit", "failed: random tables, tensor 0"),
        ("short memory of a norm", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_the_program_notices_tensors_that_are_not_as_they_should_be(program: Path, fault: str, words: str) -> None:
    done = run([program, fault])
    assert done.returncode != 0
    assert words in done.stderr


# Fault: file, words in it, what they become, and what is said; nothing where a sanitizer may say this or that.
FAULTS = {
    "the tail goes an element too far": (
        "csrc/cuda/body.h",
        "i < before + (end - rest);",
        "i <= before + (end - rest);",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a packet reaches over the end": (
        "csrc/cuda/body.h",
        "packets = (end - first) / lanes;",
        "packets = (end - first + 1) / lanes;",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a load takes every address for aligned": (
        "csrc/cuda/body.h",
        "load_values(grad, aligned.grad, g);",
        "load_values(grad, true, g);",
        "",
    ),
    "a store takes every address for aligned": (
        "csrc/cuda/body.h",
        "store_values<at_random>(max_exp_avg_sq, aligned.max_exp_avg_sq, v_max,",
        "store_values<at_random>(max_exp_avg_sq, true, v_max,",
        "",
    ),
    "a master's store takes every address for aligned": (
        "csrc/cuda/body.h",
        "store_packet<lanes>(master, aligned.master,",
        "store_packet<lanes>(master, true,",
        "",
    ),
    "random words are those of the tensor's first elements": (
        "csrc/cuda/body.h",
        "words.fill(s.random, entry.element_number(), index, options.places)",
        "words.fill(s.random, 0, index, options.places)",
        "failed: random tables",
    ),
    "the places of a part's elements are those of a whole tensor's": (
        "csrc/cuda/pack.h",
        "if (!C::is_stochastic || entry.places == nullptr) return 0;",
        "return 0;",
        "failed: random tables",
    ),
    "a launch takes places too many": (
        "csrc/cuda/pack.h",
        "if (count == places_capacity<C>) return -1;",
        "if (count == places_capacity<C>) return count;",
        "failed: parts of tensors",
    ),
    "a launch takes a tensor too many": (
        "csrc/cuda/pack.h",
        "arguments_.header.entry_count == arguments_.entry_capacity",
        "arguments_.header.entry_count == arguments_.entry_capacity + 1",
        "",
    ),
    "a launch takes scalars too many": (
        "csrc/cuda/pack.h",
        "std::min<std::int64_t>(arguments.scalars_capacity, table.scalars_count - begin)",
        "std::min<std::int64_t>(arguments.scalars_capacity + 1, table.scalars_count - begin)",
        "",
    ),
    "a launch takes a group too many": (
        "csrc/cuda/pack.h",
        "source_count == arguments.source_capacity",
        "source_count == arguments.source_capacity + 1",
        "",
    ),
    "the first packet of a thread is skipped": (
        "csrc/cuda/body.h",
        "for (std::int64_t i = thread; i < packets; i += threads) {",
        "for (std::int64_t i = thread + threads; i < packets; i += threads) {",
        "failed: random tables",
    ),
    "a skipped step is counted": (
        "csrc/cuda/arguments.h",
        "if (arguments.scaling.skips()) {",
        "if (false) {",
        "failed: scalings of a step",
    ),
    "a norm's launch takes a tensor too many": (
        "csrc/cuda/pack.h",
        "arguments.entry_count == arguments.entry_capacity) {",
        "arguments.entry_count == arguments.entry_capacity + 1) {",
        "",
    ),
    "a norm's packet reaches over the end": (
        "csrc/cuda/norm_body.h",
        "if (first + per <= count) {",
        "if (first < count) {",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a norm takes every address for aligned": (
        "csrc/cuda/norm_body.h",
        "if (reinterpret_cast<std::uintptr_t>(grad) % vector_bytes == 0) {",
        "if (true) {",
        "",
    ),
    "a norm is measured though the step is skipped": (
        "csrc/cuda/arguments.h",
        "if (arguments.scaling.skips()) return false;",
        "",
        "failed: norms of scaled gradients",
    ),
    "uploaded scalars are not clipped": (
        "csrc/cuda/arguments.h",
        "if (arguments.sum_of_squares != nullptr) clip(scalars, *arguments.sum_of_squares);",
        "",
        "failed: clipped steps",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_program_notices_faults_in_the_kernels(name: str, objects: dict[str, Path], tmp_path: Path) -> None:
    file, old, new, words = FAULTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1, f"{file} no longer has {old!r} once"
    (tmp_path / file).write_text(text.replace(old, new))
    faulty = compile_source(EMULATION, tmp_path / "emulation.o", tmp_path)
    others = [path for source, path in objects.items() if source != EMULATION]
    done = run([link([faulty, *others], tmp_path / "program")])
    assert done.returncode != 0
    assert words in done.stderr
    assert done.stderr.startswith("failed: ") == words.startswith("failed: ")  # the rest is the sanitizers' to notice
