"""Everything that can be checked only on an NVIDIA GPU, in one command (`make gpu-check`).

Builds the extension in place for the GPU present, runs the tests marked `cuda`, compute-sanitizer on a small run, and
the benchmarks. Downloads and installs nothing, goes on past a part that fails, and ends within nine minutes. Writes
into the folder that the environment variable OUT names, else benchmarks/results: gpu-check-DATE.json (outcomes),
gpu-check-DATE.log (all output), cuda-DATE.json, .md and .png (times), accuracy-cuda-DATE.json and .md (errors).
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_machine import find_cuda_home, find_sanitizer, probe
from benchmarks.parts import FAILED, NOT_RUN, PASSED, Outcome, Part, run_parts

ROOT = Path(__file__).parent.parent
BUDGET_SECONDS = 535.0
TIMED_WORKLOADS = 6
MOST_NAMES = 8  # of failing tests in the summary
SANITIZER_STATUS = "99"


def main() -> int:
    begin = time.monotonic()
    facts = probe()
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-check-{date.today()}"
    log = out / f"{stem}.log"
    log.write_text(json.dumps(facts) + "\n")
    outcomes: list[Outcome] = []
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as scratch:
        parts = all_parts(facts, out, Path(scratch) / "junit.xml")
        for outcome in run_parts(parts, BUDGET_SECONDS - (time.monotonic() - begin), log):
            print(line(outcome), flush=True)
            outcomes.append(outcome)
            record = {"date": date.today().isoformat(), **facts, "parts": [asdict(one) for one in outcomes]}
            (out / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n")
    print_tail(outcomes, log)
    print("\n".join(summary(facts, outcomes, out, time.monotonic() - begin)))
    return int(any(outcome.is_failure for outcome in outcomes))


def all_parts(facts: dict[str, str], out: Path, junit: Path) -> list[Part]:
    python = sys.executable
    cuda_home = find_cuda_home()
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "ADAMW_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": facts["capability"],
    }
    if cuda_home is not None:
        environment["CUDA_HOME"] = str(cuda_home)
    # egg_info: without it, the package that is built in place has no version.
    build = [[python, "setup.py", "egg_info", "build_ext", "--inplace"], [python, "-m", "adamw_ext"]]
    tests = [python, "-m", "pytest", "-m", "cuda", "-vv", "-rfE", "--durations=15", "-p", "no:cacheprovider"]
    # The properties need hypothesis, which may not be there, and no GPU.
    tests += ["--ignore=tests/test_properties.py"]
    tests += ["-o", "faulthandler_timeout=100", f"--junitxml={junit}", "tests"]
    accuracy = [python, "-m", "benchmarks.accuracy", "--device", "cuda", "--out", str(out)]
    return [
        Part("build", lambda seconds: build, 200, 40, environment, examine_build),
        Part("tests", lambda seconds: [tests], 220, 30, environment, test_examiner(junit)),
        sanitizer_part("memcheck", find_sanitizer(cuda_home), environment),
        sanitizer_part("racecheck", find_sanitizer(cuda_home), environment),
        Part("step time", lambda seconds: [step_time(seconds, out)], 170, 60, environment),
        Part("accuracy", lambda seconds: [accuracy], 60, 15, environment),
    ]


def step_time(seconds: float, out: Path) -> list[str]:
    """More than half of the time granted goes into importing, making models, capturing, warming up, counting."""
    each = max(1.0, min(8.0, 0.4 * seconds / TIMED_WORKLOADS))
    command = [sys.executable, "-m", "benchmarks.step_time", "--device", "cuda"]
    return [*command, "--seconds", f"{each:.1f}", "--out", str(out)]


def sanitizer_part(tool: str, program: str | None, environment: dict[str, str]) -> Part:
    # Without torch's cache every tensor is an allocation of its own, and a byte beyond its end an error.
    uncached = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else environment
    command = [str(program), "--tool", tool, "--error-exitcode", SANITIZER_STATUS, "--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.sanitized_run"]
    absent = None if program else "compute-sanitizer is not installed"
    return Part(tool, lambda seconds: [command], 75, 25, uncached, examine_sanitizer, absent)


def examine_build(outcome: Outcome, output: str) -> None:
    if outcome.status == PASSED:
        outcome.notes += [text.strip() for text in output.splitlines() if text.startswith("cuda ")]
    else:
        outcome.notes += [text.strip() for text in output.splitlines() if "error" in text][:3]


def test_examiner(junit: Path) -> Callable[[Outcome, str], None]:
    def examine(outcome: Outcome, output: str) -> None:
        if not junit.exists():
            reached = [text for text in output.splitlines() if "::" in text]
            outcome.notes.append(f"no report; reached {reached[-1].strip()}" if reached else "no report")
            outcome.status, outcome.is_failure = FAILED, True
            return
        counts, failing = read_junit(junit)
        outcome.notes.insert(0, ", ".join(f"{count} {what}" for what, count in counts.items()))
        outcome.notes += [f"failing: {name}" for name in failing[:MOST_NAMES]]
        if len(failing) > MOST_NAMES:
            outcome.notes.append(f"and {len(failing) - MOST_NAMES} more")
        if counts["passed"] + counts["failed"] == 0:
            outcome.notes.append("no test was executed")
            outcome.status, outcome.is_failure = FAILED, True

    return examine


def read_junit(junit: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests ended how, and the names of those that failed or broke off."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failing = []
    for case in ElementTree.parse(junit).iter("testcase"):
        ended = {child.tag for child in case}
        if ended & {"failure", "error"}:
            counts["failed"] += 1
            failing.append("::".join(filter(None, [case.get("classname"), case.get("name")])))
        else:
            counts["skipped" if "skipped" in ended else "passed"] += 1
    return counts, failing


def examine_sanitizer(outcome: Outcome, output: str) -> None:
    if "Device not supported" in output:
        outcome.status, outcome.is_failure = NOT_RUN, False
        outcome.notes = ["compute-sanitizer does not support this device here"]
        return
    verdicts = [text.strip("= ") for text in output.splitlines() if "SUMMARY:" in text]
    outcome.notes += verdicts[-1:] or ["no verdict"]
    if not verdicts:
        outcome.status, outcome.is_failure = FAILED, True


def line(outcome: Outcome) -> str:
    text = f"{outcome.name:<10} {outcome.status:<8} {outcome.seconds:6.1f} s"
    return f"{text}  {outcome.notes[0][:150]}" if outcome.notes else text


def print_tail(outcomes: list[Outcome], log: Path) -> None:
    """The end of the log of every part that failed, for those who see only what is printed."""
    sections = log.read_text(errors="replace").split("\n===== ")
    for outcome in outcomes:
        mine = [section for section in sections if section.startswith(f"{outcome.name}: ")]
        if outcome.status == FAILED and mine:
            print(f"\n----- end of the output of {outcome.name}\n{mine[-1][-1500:].rstrip()}")


def summary(facts: dict[str, str], outcomes: list[Outcome], out: Path, seconds: float) -> list[str]:
    lines = ["", f"gpu-check, {facts['name']}, compute capability {facts['capability']}, torch {facts['torch']}"]
    for outcome in outcomes:
        lines.append(line(outcome))
        lines += [f"  {note[:150]}" for note in outcome.notes[1:]]
    lines += targets(out / f"cuda-{date.today()}.json")
    written = sorted(path.name for path in out.glob(f"*{date.today()}*") if "cuda-" in path.name or "gpu-" in path.name)
    lines.append(f"written: {', '.join(written)}")
    failed = [outcome.name for outcome in outcomes if outcome.is_failure]
    lines.append(f"{'FAILED: ' + ', '.join(failed) if failed else 'all parts passed'} ({seconds:.0f} s)")
    return lines


def targets(path: Path) -> list[str]:
    """The targets as step_time judged them."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["targets"]
    except (OSError, ValueError, KeyError):
        return ["no times were measured"]
    return [
        f"{'reached' if row['reached'] else 'MISSED':<8} {row['work']}: {row['measured']}, wanted {row['wanted']}"
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
