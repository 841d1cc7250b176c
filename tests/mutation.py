"""Do the tests notice faults? Builds the extension with one seeded fault after the other, and requires them to fail.

    python -m tests.mutation [--only WORDS]...

Works on a copy of the sources in a temporary directory. The copy is built once as it is, and must pass; after each
fault its objects are put back, so that the next build compiles only what the next fault touches.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "adamw_ext", "tests", "build_checks.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = (
    "tests/test_update.py",
    "tests/test_bits.py",
    "tests/test_dtypes.py",
    "tests/test_kernels_vectorised.py",
    "tests/test_emulation.py",
    "tests/test_gradient_dtypes.py",
)
CLIPPING = ("tests/test_max_grad_norm.py",)
MASTERS = ("tests/test_split_masters.py", "tests/test_master_weights.py")
STOCHASTIC = ("tests/test_stochastic_rounding.py",)
SCRIPTED = ("tests/test_script_class.py",)
SHARDED = ("tests/test_sharded.py",)
OPERATORS = ("tests/test_functional.py", "tests/test_jit_functional.py")
TEST_TIMEOUT = 600  # seconds; a fault may also hang


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...] = TESTS  # one of them must notice it


FAULTS = [
    # The arithmetic.
    Fault("weight decay is forgotten", "csrc/core/update.h", "e.param - (decay + descent)", "e.param - descent"),
    Fault(
        "weight decay is not scaled by lr", "csrc/core/hyper.h", "hyper.lr * hyper.weight_decay,", "hyper.weight_decay,"
    ),
    Fault(
        "eps is added before the bias correction",
        "csrc/core/update.h",
        "std::sqrt(second_moment) * s.denominator_scale + s.eps",
        "(std::sqrt(second_moment) + s.eps) * s.denominator_scale",
    ),
    Fault(
        "amsgrad's maximum is kept but not used",
        "csrc/core/update.h",
        "second_moment = e.max_exp_avg_sq = maximum(",
        "e.max_exp_avg_sq = maximum(",
    ),
    Fault(
        "amsgrad's maximum is the latest second moment",
        "csrc/core/update.h",
        "maximum(e.exp_avg_sq, e.max_exp_avg_sq)",
        "maximum(e.exp_avg_sq, e.exp_avg_sq)",
    ),
    Fault("amsgrad's maximum loses a NaN", "csrc/core/update.h", "return a == a ? larger : a;", "return larger;"),
    Fault("an infinite param becomes NaN", "csrc/core/update.h", "finite_or_zero(e.param)", "e.param"),
    Fault(
        "the bias correction lags a step",
        "csrc/torch/stepper.cpp",
        "static_cast<std::int64_t>(done) + 1, unscale_",
        "static_cast<std::int64_t>(done) + (done > 0 ? 0 : 1), unscale_",
    ),
    # Storage.
    Fault("bfloat16 ties are rounded up", "csrc/core/dtypes.h", "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    Fault("float16 overflows too early", "csrc/core/dtypes.h", "overflow = 143u << 23", "overflow = 142u << 23"),
    Fault(
        "float16 subnormals are not normalised",
        "csrc/core/dtypes.h",
        "magnitude < (1u << 23) ? bit_cast<std::uint32_t>(subnormal) : normal",
        "normal",
    ),
    # The loop.
    Fault(
        "the kernel does nothing",
        "csrc/cpu/kernels_body.inc",
        "for (std::int64_t i = 0; i < count; ++i) {",
        "for (std::int64_t i = count; i < count; ++i) {",
    ),
    Fault(
        "a single element after the pairs is skipped",
        "csrc/cpu/kernels_body.inc",
        "if (rest < end) update_packets",
        "if (rest > end) update_packets",
    ),
    Fault(
        "an element at a cut is updated twice",
        "csrc/core/table.h",
        "segment(entry, begin, end < numel ? end : numel);",
        "segment(entry, begin, end < numel ? end + 1 : numel);",
    ),
    Fault(
        "the last chunk is dropped unless it is full",
        "csrc/cpu/launch.cpp",
        "(table.unit_count + units_per_chunk - 1) / units_per_chunk",
        "(table.unit_count + (table.unit_count < units_per_chunk ? units_per_chunk - 1 : 0)) / units_per_chunk",
    ),
    Fault(
        "gradients are not written back unscaled",
        "csrc/cpu/launch.cpp",
        "if (options.unscale != 1.0)",
        "if (options.unscale == 1.0)",
    ),
    Fault(
        "AVX-512 fuses multiplications and additions",
        "csrc/cpu/kernels_avx512.cpp",
        "#pragma GCC target(",
        '#pragma GCC optimize("fp-contract=fast")\n#pragma GCC target(',
    ),
    Fault(
        "the baseline needs AVX2",
        "csrc/cpu/kernels_baseline.cpp",
        "namespace adamw_ext::cpu::baseline {\n",
        '#pragma GCC target("avx2")\nnamespace adamw_ext::cpu::baseline {\n',
    ),
    # The step.
    Fault(
        "the last of several tensors is dropped",
        "csrc/torch/stepper.cpp",
        "numel = slot.numel;",
        "numel = i == 0 || i + 1 < slots_.size() ? slot.numel : 0;",
    ),
    Fault("maximize is ignored", "csrc/torch/stepper.cpp", "unscale_, options.maximize)", "unscale_, false)"),
    Fault(
        "found_inf is ignored",
        "csrc/torch/stepper.cpp",
        'read_scalar(inputs.found_inf, "found_inf") != 0.0',
        'read_scalar(inputs.found_inf, "found_inf") < 0.0',
    ),
    Fault(
        "found_inf skips only where it is 1",
        "csrc/torch/stepper.cpp",
        'read_scalar(inputs.found_inf, "found_inf") != 0.0',
        'read_scalar(inputs.found_inf, "found_inf") == 1.0',
    ),
    Fault(
        "every group takes the first one's hyperparameters",
        "csrc/torch/stepper.cpp",
        "compute_scalars(hypers_[slot.group],",
        "compute_scalars(hypers_[0],",
    ),
    Fault(
        "params of a group share the first one's step",
        "csrc/torch/stepper.cpp",
        "if (keys_[key].steps_done == done) return key;",
        "return key;",
    ),
    Fault(
        "a gradient with other strides is read in memory order",
        "csrc/torch/stepper.cpp",
        "tensor.device() == slot.bucket->device && slot.layout.matches(tensor) &&",
        "tensor.device() == slot.bucket->device &&",
    ),
    Fault("the step count does not advance", "csrc/torch/stepper.cpp", "*slot.steps_done += 1.0f;", ";"),
    # The capturable branch.
    Fault(
        "a capturable step's bias correction lags a step",
        "csrc/core/advance.h",
        "compute_scalars(source.read(), done + 1,",
        "compute_scalars(source.read(), done + (done > 0 ? 0 : 1),",
    ),
    Fault(
        "a capturable step ignores maximize",
        "csrc/core/advance.h",
        "scaling.unscale(), source.maximize",
        "scaling.unscale(), false",
    ),
    Fault(
        "a capturable step ignores found_inf",
        "csrc/torch/executor.cpp",
        "if (steps.scaling.skips()) {",
        "if (false) {",
    ),
    # The CUDA path, as it is emulated.
    Fault(
        "both ends of a run are skipped",
        "csrc/cuda/body.h",
        "i < before + (end - rest); i += threads",
        "i < 0; i += threads",
    ),
    Fault("a pointer is taken for aligned", "csrc/cuda/body.h", "% vector_bytes == 0;", "% vector_bytes != 17;"),
    Fault(
        "an entry that fills a launch is dropped",
        "csrc/cuda/pack.h",
        "if (const Error error = flush()) return error;\n      if (units > most_units)",
        "return flush();\n      if (units > most_units)",
    ),
    Fault(
        "the scalar kernel counts a skipped step",
        "csrc/cuda/arguments.h",
        "if (arguments.scaling.skips()) {",
        "if (false) {",
    ),
    Fault(
        "the update kernel ignores found_inf",
        "csrc/cuda/arguments.h",
        "if (Scaling{nullptr, header.found_inf}.skips()) return;",
        "",
    ),
    Fault(
        "a gradient of another dtype is read as the param's",
        "csrc/cpu/launch.cpp",
        "own != nullptr && entry.grad_dtype == size.param",
        "own != nullptr",
    ),
    Fault(
        "the second piece of a widened gradient repeats the first",
        "csrc/cpu/launch.cpp",
        "rest.grad = from(entry.grad, size_of(entry.grad_dtype));",
        "rest.grad = entry.grad;",
    ),
    Fault(
        "scalars of a second upload overwrite the first",
        "csrc/cuda/pack.h",
        "arguments.destination = destination + begin;",
        "arguments.destination = destination;",
    ),
    # Clipping.
    Fault(
        "the norm drops the last piece",
        "csrc/cpu/launch.cpp",
        "return add_up(sums, table.piece_count);",
        "return add_up(sums, table.piece_count > 1 ? table.piece_count - 1 : table.piece_count);",
        CLIPPING,
    ),
    Fault(
        "the norm kernel drops the last piece",
        "csrc/cuda/pack.h",
        "TotalArguments{sums, table.piece_count,",
        "TotalArguments{sums, table.piece_count > 1 ? table.piece_count - 1 : table.piece_count,",
        CLIPPING,
    ),
    Fault(
        "the norm adds the accumulators in another order",
        "csrc/core/norm.h",
        "accumulators[i] += accumulators[i + half];",
        "accumulators[i] += accumulators[2 * half - 1 - i];",
        CLIPPING,
    ),
    Fault(
        "a skipped step is measured",
        "csrc/torch/executor.cpp",
        "} else if (!steps.scaling.skips()) {",
        "} else {",
        CLIPPING,
    ),
    Fault(
        "the total kernel ignores found_inf",
        "csrc/cuda/arguments.h",
        "if (arguments.scaling.skips()) return false;",
        "",
        CLIPPING,
    ),
    Fault(
        "the clip coefficient is not limited to 1",
        "csrc/core/norm.h",
        "return coefficient >= 1.0 ? 1.0 : coefficient;",
        "return coefficient;",
        CLIPPING,
    ),
    Fault(
        "the norm is that of scaled gradients",
        "csrc/core/norm.h",
        "return sum * unscale * unscale;",
        "return sum;",
        CLIPPING,
    ),
    Fault(
        "gradients are written back clipped",
        "csrc/cpu/launch.cpp",
        "kernels.unscale[grad](entry, options.unscale, begin, end);",
        "kernels.unscale[grad](entry, table.scalars[entry.scalars].in_double.grad_factor, begin, end);",
        CLIPPING,
    ),
    Fault(
        "the update kernel writes gradients back clipped",
        "csrc/cuda/body.h",
        "g[lane] *= s.unscale;",
        "g[lane] *= s.grad_factor;",
        CLIPPING,
    ),
    Fault(
        "two buckets are clipped by their own sums",
        "csrc/torch/stepper.cpp",
        "bucket.sum_of_squares.copy_(total);",
        "bucket.sum_of_squares.copy_(bucket.own_sum_of_squares);",
        CLIPPING,
    ),
    # Masters and stochastic rounding.
    Fault(
        "a negative remainder does not borrow",
        "csrc/core/rounding.h",
        "((high - (remainder >> 15)) << 16) | remainder",
        "(high << 16) | remainder",
        MASTERS,
    ),
    Fault(
        "a param that someone has written to is ignored",
        "csrc/core/rounding.h",
        "codec<Half>::encode(stored) == param ? ~0u : 0u",
        "~0u",
        MASTERS,
    ),
    Fault(
        "random bits do not depend on the step",
        "csrc/core/random.h",
        "std::uint32_t x2 = key.step, x3 = 0;",
        "std::uint32_t x2 = 0, x3 = 0;",
        STOCHASTIC,
    ),
    Fault(
        "every piece has the random bits of the first",
        "csrc/cpu/launch.cpp",
        "fill_run(kernels, entry.element_number + begin, count, key)",
        "fill_run(kernels, entry.element_number, count, key)",
        STOCHASTIC,
    ),
    # DTensors.
    Fault(
        "a part has the random bits of the whole's first elements",
        "csrc/python/members.cpp",
        "element_number(fields[4].cast<std::uint64_t>(), fields[5].cast<std::uint64_t>())",
        "element_number(fields[4].cast<std::uint64_t>(), 0)",
        SHARDED,
    ),
    Fault(
        "random bits of a part that is cut across go on as if it were not",
        "csrc/cpu/launch.cpp",
        "entry.element_number + entry.places->of(begin + done)",
        "entry.element_number + begin + done",
        SHARDED,
    ),
    Fault(
        "each process clips by the norm of its part",
        "csrc/torch/stepper.cpp",
        "sum == 0 ? part : complete(sum, part)",
        "part",
        SHARDED,
    ),
    Fault(
        "gradients that are summands are not added up",
        "csrc/python/grads.cpp",
        "if (spec == nullptr || !same_placement(param.spec.ptr(), spec)) {",
        "if (spec == nullptr) {",
        SHARDED,
    ),
    Fault(
        "a part that was replaced goes unnoticed",
        "csrc/python/watch.cpp",
        "part_identity(whole.dtensor) == whole.part && spec_of(whole.dtensor) == whole.spec",
        "spec_of(whole.dtensor) == whole.spec",
        SHARDED,
    ),
    # The script class and the operators.
    Fault(
        "the script class counts params anew in every group",
        "csrc/torch/adamw.cpp",
        "element_number(i, 0)",
        "element_number(0, 0)",
        SCRIPTED,
    ),
    Fault("the script class skips clipping", "csrc/torch/adamw.cpp", "&skips, &norms}", "&skips, nullptr}", SCRIPTED),
    Fault("a loaded step count is lost", "csrc/torch/param_state.cpp", ".fill_(done)", ".fill_(0)", SCRIPTED),
    Fault(
        "a loaded master is that of the rounded param",
        "csrc/torch/param_state.cpp",
        "state.master = laid_out_as(param, dtype, value);",
        "state.master = new_state(param, options, name).master;",
        SCRIPTED,
    ),
    Fault(
        "TorchScript is shown what the operator writes",
        "csrc/torch/operators.cpp",
        'constexpr const char* unmarked[] = {"adamw_.unmarked", "adamw_.unmarked_tensor_lr"};',
        'constexpr const char* unmarked[] = {"unmarked_.unmarked", "unmarked_.unmarked_tensor_lr"};',
        OPERATORS,
    ),
    Fault(
        "the operator may be recorded",
        "csrc/torch/operators.cpp",
        "at::GradMode::is_enabled() && i < arguments.size()",
        "false && i < arguments.size()",
        OPERATORS,
    ),
]


class Failure(Exception):
    """The experiment itself went wrong: it says nothing about the tests."""


class Copy:
    """A copy of the sources, built in place."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "tree"
        self.built = directory / "built"
        self.tree.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy2(ROOT / name, self.tree / name)
        self.environment = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.tree, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def build(self) -> None:
        result = self.run("setup.py", "build_ext", "--inplace")
        if result.returncode:
            raise Failure(f"the build failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")

    def check_import(self) -> None:
        """The copy is what the tests import, not the installed package."""
        result = self.run("-c", "import adamw_ext; print(adamw_ext.__file__, adamw_ext._C.__file__)")
        paths = result.stdout.split()
        if len(paths) != 2 or not all(Path(path).is_relative_to(self.tree) for path in paths):
            raise Failure(f"the tests would import {paths} and not the copy in {self.tree}\n{result.stderr}")
        print(f"testing {paths[1]}", flush=True)

    def module(self) -> bytes:
        (module,) = self.tree.glob("adamw_ext/_C*.so")
        return module.read_bytes() + (self.tree / "adamw_ext" / "libadamw_ext.so").read_bytes()

    def keep(self) -> None:
        """Remember what was built, for put_back."""
        shutil.copytree(self.tree / "build", self.built)

    def put_back(self) -> None:
        shutil.rmtree(self.tree / "build")
        shutil.copytree(self.built, self.tree / "build")

    def first_failure(self, tests: tuple[str, ...]) -> str | None:
        """The first test that fails, or how the tests ended otherwise; None if all pass."""
        try:
            result = self.run("-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", *tests, timeout=TEST_TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"(no end within {TEST_TIMEOUT} s)"
        if result.returncode == 0:
            return None
        if result.returncode < 0:
            return f"(crash with signal {-result.returncode})"
        failed = re.search(r"^FAILED (?:tests/)?(\S+)", result.stdout, re.MULTILINE)
        if result.returncode != 1 or not failed:
            raise Failure(f"pytest could not run the tests:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
        return failed[1]


def check_texts(faults: list[Fault]) -> None:
    for fault in faults:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1:
            raise Failure(f"{fault.name!r}: the text to replace occurs {count} times in {fault.file}:\n{fault.old}")


def seed(copy: Copy, fault: Fault, original: bytes) -> str | None:
    """Build with the fault; the first test that fails, or None."""
    source = copy.tree / fault.file
    text, status = source.read_text(), source.stat()
    source.write_text(text.replace(fault.old, fault.new))
    try:
        copy.build()
        if copy.module() == original:
            raise Failure(f"{fault.name!r} changed nothing in the module")
        return copy.first_failure(fault.tests)
    finally:
        source.write_text(text)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        copy.put_back()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Seed faults; the tests must fail.")
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="WORDS", help="only faults whose name has one of these in it"
    )
    only = parser.parse_args().only
    faults = [fault for fault in FAULTS if only is None or any(words in fault.name for words in only)]
    if not faults:
        parser.error("no fault has such a name; there are:\n" + "\n".join(fault.name for fault in FAULTS))
    check_texts(faults)

    results: list[tuple[str, str | None]] = []
    with tempfile.TemporaryDirectory(prefix="adamw_ext-mutation-") as directory:
        copy = Copy(Path(directory))
        copy.build()
        copy.check_import()
        copy.keep()
        original = copy.module()
        for tests in dict.fromkeys(fault.tests for fault in faults):
            if (failure := copy.first_failure(tests)) is not None:
                raise Failure(f"without any fault the tests fail: {failure}")
        print("without a fault, all tests pass", flush=True)
        for fault in faults:
            begin = time.monotonic()
            results.append((fault.name, seed(copy, fault, original)))
            killer = results[-1][1] or "NOTHING"
            print(f"{time.monotonic() - begin:4.0f} s  {fault.name}: {killer}", flush=True)

    width = max(len(name) for name, _ in results)
    print(f"\n{'fault':{width}}  killed by")
    for name, killer in results:
        print(f"{name:{width}}  {killer or 'NOTHING: IT SURVIVES'}")
    survivors = sum(killer is None for _, killer in results)
    print(f"\n{len(results) - survivors} of {len(results)} faults are noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"mutation: {failure}")
