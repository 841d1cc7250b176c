"""The kernel tests on a build of the extension with sanitizers, over the CPU kernel and the emulated CUDA kernel.

    python -m tests.sanitizers address|thread [--all]

Builds a copy of the checkout in out/sanitize-NAME, with ADAMW_EXT_SANITIZE=NAME, and runs tests there, in a Python that
loads the sanitizer first. `address` is AddressSanitizer with UndefinedBehaviorSanitizer and, with --all, LeakSanitizer
over a program of its own; `thread` is ThreadSanitizer.

Fails unless both libraries hold the sanitizer's calls, the programs of sanitizer_proofs.py that must be stopped are
stopped, each file below has tests that pass, none fails or is skipped, and no sanitizer has said anything.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")
LIBRARIES = ("adamw_ext/libadamw_ext.so", "adamw_ext/_C*.so")
TIMEOUT = 1800  # seconds, for the tests: a deadlock, too, must end

# What pytest takes, without tests marked slow or cuda: whole files, or single tests of them. A new file of tests that
# reach into C++ belongs here.
ADDRESS_TESTS = (
    "tests/test_update.py",
    "tests/test_bits.py",
    "tests/test_dtypes.py",
    "tests/test_emulation.py",
    "tests/test_gradient_dtypes.py",
    "tests/test_max_grad_norm.py",
    "tests/test_stochastic_rounding.py",
    "tests/test_master_weights.py",
    "tests/test_split_masters.py",
    "tests/test_bad_input.py",
    "tests/test_script_class.py",
    "tests/test_properties.py",
    "tests/test_fuzzing.py",
)
# Of these, what takes longest, most of it in emulated kernels, or says little more of memory. Run with --all.
LONG_TESTS = (
    "tests/test_bad_input.py::test_a_gradient_that_does_not_fit_is_refused",
    "tests/test_bad_input.py::test_an_unusable_hyperparameter_is_refused_by_group",
    "tests/test_bad_input.py::test_state_that_does_not_fit_is_refused",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[bfloat16-amsgrad]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[bfloat16-float32-moments-amsgrad]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[bfloat16-float32-moments-plain]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[bfloat16-plain]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float16-bfloat16-moments-amsgrad]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float16-bfloat16-moments-plain]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float16-float32-moments-amsgrad]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float16-float32-moments-plain]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float16-plain]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float32-amsgrad]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float32-bfloat16-moments-amsgrad]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float32-bfloat16-moments-plain]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float64-amsgrad]",
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits[float64-plain]",
    "tests/test_bits.py::test_one_tensor_has_the_bits_of_many",
    "tests/test_bits.py::test_threads_do_not_change_bits",
    "tests/test_dtypes.py::test_a_step_of_lr_0_keeps_every_pattern_of_a_param",
    "tests/test_dtypes.py::test_every_float32_is_rounded_to_a_param_as_torch_rounds",
    "tests/test_dtypes.py::test_moments_of_every_gradient_are_rounded_as_torch_rounds",
    "tests/test_emulation.py::test_20321_tensors_are_updated_in_one_step",
    "tests/test_emulation.py::test_a_scale_that_the_host_would_refuse_has_the_bits_of_the_cpu",
    "tests/test_emulation.py::test_an_empty_tensor_in_any_slot_changes_nothing",
    "tests/test_emulation.py::test_any_found_inf_but_zero_changes_nothing",
    "tests/test_emulation.py::test_any_number_of_group_and_step_pairs_around_the_limits_of_a_launch",
    "tests/test_emulation.py::test_any_number_of_tensors_around_the_limits_of_a_launch",
    "tests/test_emulation.py::test_each_pointer_may_be_misaligned_alone_and_all_together",
    "tests/test_emulation.py::test_empty_tensors_at_the_boundaries_of_large_launches_change_nothing",
    "tests/test_emulation.py::test_every_way_to_cut_and_launch_has_the_bits_of_the_cpu",
    "tests/test_emulation.py::test_groups_of_all_kinds_have_the_bits_of_the_cpu",
    "tests/test_emulation.py::test_steps_after_a_skipped_one_count_on_from_those_before",
    "tests/test_fuzzing.py::test_a_case_that_kills_its_process_is_named_and_the_run_goes_on",
    "tests/test_gradient_dtypes.py::test_a_gradient_has_the_bits_of_its_numbers_in_the_params_dtype",
    "tests/test_gradient_dtypes.py::test_a_gradient_of_another_dtype_is_unscaled_in_place",
    "tests/test_master_weights.py::test_a_resumed_run_has_the_bits_of_one_that_never_stopped",
    "tests/test_master_weights.py::test_both_modes_keep_the_same_bits_when_params_are_written_to",
    "tests/test_master_weights.py::test_both_modes_start_from_the_same_bits_whatever_is_written_beside_a_master",
    "tests/test_master_weights.py::test_every_way_to_keep_a_master_trains_with_the_same_bits",
    "tests/test_master_weights.py::test_sampled_masters_survive_the_way_into_the_other_mode_and_back",
    "tests/test_master_weights.py::test_the_master_walks_as_a_float32_param_with_the_same_gradients_and_the_param_shows_it",
    "tests/test_master_weights.py::test_the_next_step_starts_from_what_was_written",
    "tests/test_master_weights.py::test_threads_and_chunks_do_not_change_bits",
    "tests/test_max_grad_norm.py::test_a_norm_that_is_not_finite_does_as_clip_grad_norm_and_a_step",
    "tests/test_max_grad_norm.py::test_a_skipped_step_leaves_the_norm_of_the_last_one_that_ran",
    "tests/test_max_grad_norm.py::test_a_step_equals_clip_grad_norm_and_a_step",
    "tests/test_max_grad_norm.py::test_a_tensor_of_more_pieces_than_the_total_has_accumulators_has_one_norm",
    "tests/test_max_grad_norm.py::test_any_number_of_tensors_around_the_limits_of_a_launch_has_one_norm",
    "tests/test_max_grad_norm.py::test_no_path_changes_the_bits_of_norm_or_params",
    "tests/test_max_grad_norm.py::test_the_norm_has_the_bits_of_the_documented_order",
    "tests/test_script_class.py::test_a_saved_module_goes_on_bit_for_bit_when_loaded",
    "tests/test_script_class.py::test_a_scripted_training_step_has_the_bits_of_the_python_loop",
    "tests/test_stochastic_rounding.py::test_a_decay_too_small_for_bfloat16_is_applied_where_plain_bfloat16_stands_still",
    "tests/test_stochastic_rounding.py::test_isa_chunks_capturable_and_launches_do_not_change_bits",
    "tests/test_stochastic_rounding.py::test_numbers_that_a_bfloat16_holds_stay",
    "tests/test_stochastic_rounding.py::"
    "test_the_second_moment_follows_gradients_that_fall_tenfold_where_plain_bfloat16_sticks",
    "tests/test_stochastic_rounding.py::test_threads_do_not_change_bits",
    "tests/test_update.py::test_error_after_1000_float32_steps_is_no_larger_than_torchs",
    "tests/test_update.py::test_float64_follows_the_textbook_for_200_steps",
    "tests/test_update.py::test_infinities_and_nans_appear_where_torch_has_them",
)
THREAD_TESTS = (
    "tests/test_bits.py",
    "tests/test_concurrency.py",
    "tests/test_script_class.py::test_two_threads_take_turns",
    "tests/test_script_class.py::test_saving_in_one_thread_while_another_zeroes_gradients_does_not_hang",
)
# The first of these has one thread.
LONG_THREAD_TESTS = (
    "tests/test_bits.py::test_isa_and_chunks_do_not_change_bits",
    "tests/test_concurrency.py::test_threads_that_step_one_optimizer_take_turns[8-capturable]",
    "tests/test_concurrency.py::test_threads_that_step_one_optimizer_take_turns[8-clipped]",
    "tests/test_concurrency.py::test_threads_that_step_one_optimizer_take_turns[8-stochastic]",
    "tests/test_concurrency.py::test_threads_with_an_optimizer_each_get_the_bits_of_one_thread[8-capturable]",
    "tests/test_concurrency.py::test_threads_with_an_optimizer_each_get_the_bits_of_one_thread[8-clipped]",
    "tests/test_concurrency.py::test_threads_with_an_optimizer_each_get_the_bits_of_one_thread[8-float32]",
    "tests/test_concurrency.py::test_threads_with_an_optimizer_each_get_the_bits_of_one_thread[8-stochastic]",
)
# How many random cases: of each entrance of tests/fuzzing, of each property. The second are those of --all.
FEW_CASES = {"TESTS_FUZZING_SEEDS": "8", "TESTS_EXAMPLES": "4"}
MORE_CASES = {"TESTS_FUZZING_SEEDS": "40", "TESTS_EXAMPLES": "15"}


@dataclass(frozen=True)
class Sanitizer:
    runtime: str
    calls: tuple[str, ...]  # that an instrumented library makes
    options: dict[str, str]  # environment variables; {log} becomes where reports are written
    proofs: dict[str, str]  # a program: what the sanitizer must say of it; "" where it must say nothing
    tests: tuple[str, ...]
    long_tests: tuple[str, ...] = ()  # of these, what is run with --all


SANITIZERS = {
    "address": Sanitizer(
        "libasan.so",
        ("__asan_store4", "__ubsan_handle_"),
        {
            # Leaks are looked for by a program of their own: pytest and torch keep much until the end.
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:log_path={log}:"
            # In place of a limit of the address space, absurd sizes fail as they do elsewhere.
            "allocator_may_return_null=1:max_allocation_size_mb=8192",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
        {
            "write_past_a_param": "heap-buffer-overflow",
            "read_past_a_gradient": "heap-buffer-overflow",
            "misaligned_param": "misaligned address",
        },
        ADDRESS_TESTS,
        LONG_TESTS,
    ),
    "thread": Sanitizer(
        "libtsan.so",
        ("__tsan_write4",),
        {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:history_size=4:suppressions={suppressions}:log_path={log}"},
        {
            "two_optimizers_of_one_param": "data race",
            "threads_that_do_not_race": "",
        },
        THREAD_TESTS,
        LONG_THREAD_TESTS,
    ),
}


class Failure(Exception):
    """What is wrong, in words for the one who ran this."""


def copy_checkout(tree: Path) -> None:
    """What git knows and what it does not ignore; unchanged files keep their times, so that little is compiled anew."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


class Sanitized:
    """A copy of the checkout that is built and run with one sanitizer."""

    def __init__(self, name: str, tree: Path) -> None:
        self.name = name
        self.sanitizer = SANITIZERS[name]
        self.tree = tree
        self.logs = tree / "out" / "reports"

    @property
    def environment(self) -> dict[str, str]:
        # The C++ library must be there when the sanitizer looks for the functions that throw.
        preloaded = [self.runtime(library) for library in (self.sanitizer.runtime, "libstdc++.so.6")]
        log, suppressions = self.logs / "report", self.tree / "tests" / "sanitized" / "tsan.supp"
        options = {
            key: value.format(log=log, suppressions=suppressions) for key, value in self.sanitizer.options.items()
        }
        return {
            **os.environ,
            **options,
            "LD_PRELOAD": " ".join(preloaded),
            "PYTHONPATH": str(self.tree),
            "PYTHONMALLOC": "malloc",  # so that Python's own memory is watched, too
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @staticmethod
    def runtime(library: str) -> str:
        command = [COMPILER, f"-print-file-name={library}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise Failure(f"{COMPILER} has no {library}")
        return path

    def build(self) -> None:
        copy_checkout(self.tree)
        self.compile()

    def compile(self) -> None:
        for library in self.libraries():
            library.unlink()  # what is tested is what is built now
        environment = {**os.environ, "ADAMW_EXT_SANITIZE": self.name, "ADAMW_EXT_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"the build failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")

    def libraries(self) -> list[Path]:
        return [path for pattern in LIBRARIES for path in self.tree.glob(pattern)]

    def check_instrumented(self) -> None:
        libraries = self.libraries()
        if len(libraries) != len(LIBRARIES):
            raise Failure(f"the build made {libraries} and not {LIBRARIES}")
        for library in libraries:
            content = library.read_bytes()
            missing = [call for call in self.sanitizer.calls if call.encode() not in content]
            if missing:
                raise Failure(f"{library} does not call {', '.join(missing)}: it is not instrumented")

    def run(self, *arguments: str, timeout: float | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        command = [sys.executable, *arguments]
        environment = {**self.environment, **variables}
        done = subprocess.run(
            command, cwd=self.tree, env=environment, capture_output=True, text=True, timeout=timeout, errors="replace"
        )
        # Beside AddressSanitizer, UndefinedBehaviorSanitizer takes no file to write to.
        if "runtime error: " in done.stderr:
            (self.logs / "report.undefined").write_text(done.stderr)
        return done

    def reports(self) -> str:
        """What sanitizers have said in the latest run, in any of its processes."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.logs.glob("report.*")))

    def prove(self, program: str, words: str) -> None:
        """That the program is stopped with these words, or, where there are none, that it ends well."""
        done = self.run("-m", "tests.sanitizer_proofs", program, timeout=TIMEOUT)
        said = self.reports()
        imported = [Path(line) for line in done.stdout.splitlines()]
        if len(imported) != len(LIBRARIES) or not all(path.is_relative_to(self.tree) for path in imported):
            raise Failure(f"would test {imported} and not {self.tree}:\n{done.stderr[-3000:]}{said[:3000]}")
        if words and (done.returncode == 0 or words not in said or "adamw_ext" not in said):
            raise Failure(f"{program} must be stopped for {words!r}, but:\n{done.stderr[-3000:]}{said[:3000]}")
        if not words and (done.returncode or said):
            raise Failure(f"{program} must run through, but:\n{done.stderr[-3000:]}{said[:6000]}")

    def check_leaks(self) -> None:
        """No memory that was allocated by, or for, our libraries is lost at the end. Python's own and torch's is not
        looked at: they keep some for as long as the process lives."""
        options = "detect_leaks=1:fast_unwind_on_malloc=0:malloc_context_size=40"
        done = self.run(
            "-m",
            "tests.sanitizer_proofs",
            "keep_nothing",
            ASAN_OPTIONS=f"{options}:log_path={self.logs / 'report'}",
            LSAN_OPTIONS="exitcode=23:report_objects=0",
        )
        said = self.reports()
        if done.returncode != 23 or "LeakSanitizer: detected memory leaks" not in said:
            raise Failure(
                f"LeakSanitizer did not look: exit status {done.returncode}\n{done.stderr[-2000:]}{said[:2000]}"
            )
        leaks = [leak for leak in re.split(r"\n\n+", said) if "leak of" in leak and "adamw_ext" in leak]
        if leaks:
            raise Failure(f"{len(leaks)} leaks through our libraries, first:\n{leaks[0]}")

    def run_tests(
        self, tests: Sequence[str], left_out: Sequence[str] = (), cases: Mapping[str, str] = FEW_CASES
    ) -> dict[str, int]:
        """How many of each file passed; all that were chosen did, and at least one of each file."""
        results = self.tree / "out" / "results.xml"
        results.unlink(missing_ok=True)
        # A crash is the sanitizer's to report, and not pytest's; what it prints must not be lost with pytest's capture.
        options = ["--capture=sys", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-m", "not slow and not cuda"]
        deselected = [f"--deselect={test}" for test in left_out]
        done = self.run(
            "-m", "pytest", *options, f"--junit-xml={results}", *deselected, *tests, timeout=TIMEOUT, **cases
        )
        said = self.reports()
        if done.returncode or said:
            raise Failure(f"exit status {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-3000:]}{said[:8000]}")
        counts: Counter[str] = Counter()
        for case in ElementTree.parse(results).getroot().iter("testcase"):
            if len(case) and case[0].tag in ("skipped", "failure", "error"):
                raise Failure(f"{case.get('classname')}, {case.get('name')}: {case[0].tag}: {case[0].get('message')}")
            counts[f"{case.get('classname', '').replace('.', '/')}.py"] += 1
        if missing := {test.partition("::")[0] for test in tests} - counts.keys():
            raise Failure(f"no test of {', '.join(sorted(missing))} was run")
        return dict(counts)


def check_names(tests: Sequence[str]) -> None:
    """Each names a file of the checkout, and a test in it: pytest says nothing of a --deselect that fits none."""
    for test in tests:
        file, _, function = test.partition("[")[0].partition("::")
        if not (ROOT / file).exists() or f"def {function}(" not in (ROOT / file).read_text() + "def (":
            raise Failure(f"there is no {test}")


def processor_seconds() -> float:
    """Of all processes that were started here and have ended: they say more than the clock of a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def check(name: str, tree: Path, *, everything: bool) -> dict[str, Any]:
    """Also the long tests and the leaks, or not; returns what was done, and how long it took."""
    sanitized = Sanitized(name, tree)
    tests, long_tests = sanitized.sanitizer.tests, sanitized.sanitizer.long_tests
    check_names([*tests, *long_tests])
    record: dict[str, Any] = {"sanitizer": name, "everything": everything, "proofs": {}}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        begin, used = time.monotonic(), processor_seconds()
        yield
        took, used = time.monotonic() - begin, processor_seconds() - used
        record[f"{what}_seconds"], record[f"{what}_processor_seconds"] = round(took, 1), round(used, 1)
        print(f"{name}: {what}: {took:.0f} s, {used:.0f} s of a processor", flush=True)

    with timed("build"):
        sanitized.build()
    sanitized.check_instrumented()
    with timed("proofs"):
        for program, words in sanitized.sanitizer.proofs.items():
            sanitized.prove(program, words)
            record["proofs"][program] = words or "runs through"
            print(f"{name}: {program}: {record['proofs'][program]}", flush=True)
        if name == "address" and everything:
            sanitized.check_leaks()
            record["proofs"]["keep_nothing"] = "no leak through our libraries"
    with timed("tests"):
        if everything:
            record["tests"] = sanitized.run_tests(tests, cases=MORE_CASES)
        else:
            record["tests"] = sanitized.run_tests(tests, long_tests)
    for file, count in record["tests"].items():
        print(f"{name}: {count:4} tests pass: {file}")
    print(f"{name}: {sum(record['tests'].values())} tests pass, and no sanitizer has said anything", flush=True)
    (tree / "out" / "record.json").write_text(json.dumps(record))  # for sanitized_mutation.py
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitizers", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SANITIZERS)
    parser.add_argument("--all", action="store_true", help="also the tests that take long, and, for address, leaks")
    choices = parser.parse_args()
    check(choices.name, ROOT / "out" / f"sanitize-{choices.name}", everything=choices.all)


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"sanitizers: {failure}")
