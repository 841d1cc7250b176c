"""Do the sanitizers notice faults that seldom change a number? Seeds one after the other, and requires their words.

    python -m tests.sanitized_mutation [--all | --no-faults | --only WORDS] [--out DIRECTORY]

Runs tests/sanitizers.py first, which must find nothing; with --all if that is given here. Then each fault is built in
the same copy of the checkout, and must be reported in our libraries. On demand; the record goes to benchmarks/results.
With --no-faults the record is that of the last runs of tests/sanitizers.py, as `make test-sanitized` leaves them; with
--only, too, and the day's record of the other faults stays.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device import conditions, write_dated
from tests.faults import check_texts, rows_of_today
from tests.sanitizers import ROOT, SANITIZERS, Failure, Sanitized, check


@dataclass(frozen=True)
class Fault:
    name: str
    sanitizer: str
    file: str
    old: str  # occurs once in the file
    new: str
    words: str  # of the report
    tests: tuple[str, ...]  # none: the program that LeakSanitizer looks at


UPDATE = ("tests/test_update.py",)
THREADS = "tests/test_concurrency.py::test_"

FAULTS = [
    Fault(
        "the CPU kernel writes the element after the last one back as it was",
        "address",
        "csrc/cpu/kernels_body.inc",
        "    if constexpr (amsgrad) store_packet<at_random>(max_exp_avg_sq, i, v_max, v_max_bits);\n  }\n",
        "    if constexpr (amsgrad) store_packet<at_random>(max_exp_avg_sq, i, v_max, v_max_bits);\n  }\n"
        "  exp_avg[count * lanes] = exp_avg[count * lanes];\n",
        "heap-buffer-overflow",
        UPDATE,
    ),
    Fault(
        "the emulated CUDA kernel goes an element too far",
        "address",
        "csrc/cuda/body.h",
        "i < before + (end - rest);",
        "i <= before + (end - rest);",
        "heap-buffer-overflow",
        ("tests/test_emulation.py",),
    ),
    Fault(
        "a random word is multiplied as a signed number",
        "address",
        "csrc/core/random.h",
        "number = (number & 0xffffffffu) * factor;",
        "number = static_cast<std::uint64_t>(static_cast<std::int64_t>(number & 0xffffffffu) * std::int64_t{factor});",
        "signed integer overflow",
        ("tests/test_stochastic_rounding.py",),
    ),
    Fault(
        "two 16-bit neighbours are read as an aligned word",
        "address",
        "csrc/cpu/kernels_body.inc",
        "__attribute__((aligned(2), may_alias))",
        "__attribute__((may_alias))",
        "misaligned address",
        ("tests/test_bits.py",),
    ),
    Fault(
        "a long step does not keep its memory alive",
        "address",
        "csrc/torch/stepper.cpp",
        "if (is_long() || inputs.is_shared || (clips_ && last_sum_ > 0)) pin(inputs.grads);",
        "",
        "heap-use-after-free",
        (f"{THREADS}memory_that_another_thread_drops_during_a_step_stays_alive_for_it",),
    ),
    Fault(
        "a stepper makes an executor too many, and loses it",
        "address",
        "csrc/torch/stepper.cpp",
        "buckets_.push_back({device, member.deferred, member.sum, make_executor(device)});",
        "buckets_.push_back({device, member.deferred, member.sum, make_executor(device)});\n"
        "    (void)make_executor(device).release();",
        "leaks through our libraries",
        (),
    ),
    Fault(
        "chunks overlap by an element",
        "thread",
        "csrc/core/table.h",
        "segment(entry, begin, end < numel ? end : numel);",
        "segment(entry, begin, end < numel ? end + 1 : numel);",
        "data race",
        ("tests/test_concurrency.py",),
    ),
    Fault(
        "two threads may take the same chunk",
        "thread",
        "csrc/cpu/launch.cpp",
        "(i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)",
        "(i = next.load(), next.store(i + 1), i) < tasks;)",
        "data race",
        ("tests/test_bits.py",),
    ),
    Fault(
        "threads add up the norm in one place",
        "thread",
        "csrc/cpu/launch.cpp",
        "sums[piece] = sum_piece(entry, from, to);",
        "sums[piece] = sum_piece(entry, from, to); sums[0] += 0.0;",
        "data race",
        ("tests/test_max_grad_norm.py::test_no_path_changes_the_bits_of_norm_or_params",),
    ),
    Fault(
        "the mutex of the script class keeps no other thread out",
        "thread",
        "csrc/torch/adamw.cpp",
        "mutable std::recursive_mutex mutex;",
        "static inline thread_local std::recursive_mutex mutex;",
        "data race",
        ("tests/test_script_class.py::test_two_threads_take_turns",),
    ),
]


def seed(sanitized: Sanitized, fault: Fault) -> bool:
    """Whether the sanitizer says the fault's words, of our libraries, when its tests run on a build with the fault."""
    source, built = sanitized.tree / fault.file, sanitized.tree / "out" / "built"
    shutil.rmtree(built, ignore_errors=True)
    shutil.copytree(sanitized.tree / "build", built)
    try:
        source.write_text((ROOT / fault.file).read_text().replace(fault.old, fault.new))
        sanitized.compile()
        try:
            sanitized.run_tests(fault.tests) if fault.tests else sanitized.check_leaks()
        except Failure as failure:
            said = f"{failure}\n{sanitized.reports()}"
            return fault.words in said and "adamw_ext" in said
        return False
    finally:
        shutil.copy2(ROOT / fault.file, source)
        shutil.rmtree(sanitized.tree / "build")
        built.rename(sanitized.tree / "build")


def report_of(records: list[dict[str, Any]], faults: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# The extension under sanitizers",
        "",
        f"{facts['date']}, {facts['processor']}, torch {facts['build']['torch']}; "
        "tests.sanitizers, written by tests.sanitized_mutation. Times: seconds of a processor.",
        "",
        "| sanitizer | build | proofs | tests | time of the tests | reports |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        times = [f"{record[f'{what}_processor_seconds']:.0f}" for what in ("build", "proofs", "tests")]
        count = sum(record["tests"].values())
        lines.append(f"| {record['sanitizer']} | {times[0]} | {times[1]} | {count} | {times[2]} | none |")
    lines += ["", "| program that must be stopped, or run through | sanitizer | what came |", "| --- | --- | --- |"]
    lines += [
        f"| `{program}` | {record['sanitizer']} | {words} |"
        for record in records
        for program, words in record["proofs"].items()
    ]
    if faults:
        lines += ["", "| seeded fault | sanitizer | report |", "| --- | --- | --- |"]
    lines += [f"| {f['name']} | {f['sanitizer']} | {f['words'] if f['found'] else 'NONE'} |" for f in faults]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitized_mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the record goes")
    parser.add_argument("--all", action="store_true", help="before faults, also the tests that take long")
    parser.add_argument("--no-faults", action="store_true", help="the record of what was run last")
    parser.add_argument("--only", metavar="WORDS", help="only faults with these in their name")
    choices = parser.parse_args()
    check_texts(FAULTS)
    chosen = [] if choices.no_faults else [fault for fault in FAULTS if (choices.only or "") in fault.name]
    records, faults = [], []
    for name in SANITIZERS:
        sanitized = Sanitized(name, ROOT / "out" / f"sanitize-{name}")
        if choices.no_faults or choices.only:
            records.append(json.loads((sanitized.tree / "out" / "record.json").read_text()))
        else:
            records.append(check(name, sanitized.tree, everything=choices.all))
        for fault in (fault for fault in chosen if fault.sanitizer == name):
            begin = time.monotonic()
            found = seed(sanitized, fault)
            faults.append({"name": fault.name, "sanitizer": name, "words": fault.words, "found": found})
            print(f"{time.monotonic() - begin:4.0f} s  {fault.name}: {fault.words if found else 'NOTHING'}", flush=True)
    facts = conditions()
    if choices.only:
        faults = rows_of_today(choices.out / f"sanitizers-{facts['date']}.json", faults, FAULTS, "name")
    result = {**facts, "runs": records, "faults": faults}
    write_dated(choices.out, "sanitizers", result, report_of(records, faults, facts))
    return 0 if all(fault["found"] for fault in faults) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"sanitized_mutation: {failure}")
