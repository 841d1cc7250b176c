"""Bytes and time of every precision mode on the CPU: python -m benchmarks.modes

Writes modes.json, modes.md and modes.png. For each mode over GPT-2 small shapes: bytes kept for each parameter, bytes
that a step must move, and its time, interleaved with a floor that moves the same bytes of the same memory and computes
nothing, and with torch's fused AdamW in bfloat16 and in float32. The same for DeepSpeed's CPUAdam, bitsandbytes and
torchao where they are installed (each with `pip install "torch==<the installed version>" NAME`, or pip may replace
torch). Then `max_grad_norm` against `clip_grad_norm_` before a step.
"""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import adamw_ext
from benchmarks.comparison import reason
from benchmarks.device import processor
from benchmarks.mode_bytes import as_text
from benchmarks.mode_peers import FUSED, OTHER, Subject, subjects
from benchmarks.mode_timing import Bench, measure_clipping, measure_group
from benchmarks.modes_report import markdown
from benchmarks.workloads import full_workloads

Result = dict[str, Any]

SECONDS = 90.0  # of timing in all; preparing takes as long again, and three times as long where others compile kernels
LONGEST_SECONDS = 335.0  # what would take longer, judging by what has been measured, is not started
GROUP = 4  # optimizers in memory at once: with 12 bytes of state for each of 124M parameters, 6 GB


def measure_all(
    chosen: list[Subject], bench: Bench, result: Result, seconds: float, longest: float, save: Callable[[], None]
) -> None:
    """Everything, into ``result``; what fails or has no time left becomes a line there. ``save`` follows each part."""
    result["failures"] |= {subject.name: subject.absence for subject in chosen if subject.absence}
    end = time.monotonic() + longest
    parts = list(make_parts([subject for subject in chosen if not subject.absence], bench, result))
    slowest = 0.0  # seconds for one name of a part: many times more on a busy machine
    for index, (names, least_seconds, run) in enumerate(parts):
        begin = time.monotonic()
        if begin + max(least_seconds, slowest * len(names)) > end:
            result["failures"] |= dict.fromkeys(names, "no time was left for it")
            continue
        rest = sum(len(names) for names, _, _ in parts[index:])
        try:
            run(seconds * len(names) / rest)
        except Exception as error:
            traceback.print_exc()
            result["failures"] |= dict.fromkeys(names, reason(error))
        gc.collect()
        seconds -= seconds * len(names) / rest
        took = time.monotonic() - begin
        slowest = max(slowest, took / len(names))
        print(f"{', '.join(map(repr, names))}: {took:.0f} s", flush=True)
        save()


def make_parts(
    present: list[Subject], bench: Bench, result: Result
) -> Iterator[tuple[list[str], float, Callable[[float], None]]]:
    """(names, the seconds without which it is not started, what to run). Others come last, each for itself: they may be
    slow, and what takes long is left out when time is short."""
    together = [subject for subject in present if subject.kind != OTHER]
    alone = [[subject] for subject in present if subject.kind == OTHER]

    def part_of(group: list[Subject]) -> tuple[list[str], float, Callable[[float], None]]:
        least = sum(subject.least_seconds for subject in group)
        return [subject.name for subject in group], least, lambda seconds: measure_group(group, bench, result, seconds)

    def clipping_of(dtype: torch.dtype) -> tuple[list[str], float, Callable[[float], None]]:
        def run(seconds: float) -> None:
            result["clipping"][as_text(dtype)] = measure_clipping(dtype, bench, seconds)

        return [f"clipping, {as_text(dtype)}"], 20.0, run

    yield from (part_of(together[first : first + GROUP]) for first in range(0, len(together), GROUP))
    yield from (clipping_of(dtype) for dtype in FUSED)
    yield from (part_of(group) for group in alone)


def facts(bench: Bench) -> Result:
    workload = bench.workloads[torch.float32]
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "build": adamw_ext.build_info(),
        "versions": versions(),
        "workload": workload.title.partition(",")[0],
        "tensors": len(workload.shapes),
        "numel": workload.numel,
        "modes": {},
        "clipping": {},
        "failures": {},
    }


def versions() -> dict[str, str]:
    """Of the others that are installed."""
    found = {}
    for module in sorted({subject.module for subject in subjects() if subject.kind == OTHER and not subject.absence}):
        found[module] = metadata.version(module)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="measuring time in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"modes-{date.today()}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench({workload.dtype: workload for workload in full_workloads() if workload.name.startswith("gpt2")})
    result = facts(bench)

    def save() -> None:
        (args.out / "modes.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "modes.md").write_text(markdown(result))

    measure_all(subjects(), bench, result, args.seconds, LONGEST_SECONDS, save)
    if result["modes"]:
        from benchmarks.modes_picture import draw  # last, when all is written

        draw(result, args.out / "modes.png")
    print(markdown(result))


if __name__ == "__main__":
    main()
