"""How far it goes: elements, tensors, groups, steps, and numbers at the edge (`python -m benchmarks.limits`).

Each run checks every number it makes and fails if one is wrong; what it writes is what was run and how long it took.
The largest tensor of the default run has 2**26 + 1 elements; `--elements 2147483649` takes 18 GB of memory.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.device import conditions, write_dated
from benchmarks.limits_sizes import different_counts, many_groups, many_tensors, one_huge_tensor
from benchmarks.limits_steps import (
    FAST_BETAS,
    SLOW_BETAS,
    rounding_past_the_last_count,
    sampled,
    scalars_of_steps,
    steps_past_the_last_count,
)
from benchmarks.limits_subnormal import subnormal_numbers
from benchmarks.limits_values import nan_and_infinity, zero_hyperparameters
from tests.helpers import running_on


def runs_of(elements: int, steps: int) -> dict[str, Callable[[], str]]:
    """What is run for each limit."""
    return {
        f"{elements:,} elements in one bfloat16 tensor": lambda: one_huge_tensor(elements),
        "100,000 tensors": lambda: many_tensors(100_000),
        "step counts that all differ": lambda: different_counts((1_000, 4_000, 16_000)),
        "10,000 groups": lambda: many_groups(10_000),
        f"scalars of steps 1 to {steps:,}": lambda: scalars_of_steps(range(1, steps + 1), SLOW_BETAS),
        "scalars of betas that are soon forgotten": lambda: scalars_of_steps(sampled(steps), FAST_BETAS),
        "step counts up to 2**24 and past it": steps_past_the_last_count,
        "stochastic rounding past 2**24 steps": rounding_past_the_last_count,
        "subnormal numbers": subnormal_numbers,
        "NaN and infinity": nan_and_infinity,
        "hyperparameters of 0": zero_hyperparameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=2**26 + 1, help="of the largest bfloat16 tensor")
    parser.add_argument("--steps", type=int, default=1_000_000, help="up to which scalars are checked")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    result = conditions()
    threads = torch.get_num_threads()
    rows = []
    for limit, run in runs_of(args.elements, args.steps).items():
        begin = time.perf_counter()
        # What prepares and compares small tensors is faster on one thread; steps on several ask for them.
        with running_on(threads=threads if "elements" in limit else 1):
            outcome = run()
        rows.append({"limit": limit, "result": outcome, "seconds": time.perf_counter() - begin})
        print(rows[-1], file=sys.stderr, flush=True)
    build = result["build"]
    text = (
        f"# Limits\n\n{result['date']}, {result['processor']}, torch {build['torch']}, adamw_ext {build['adamw_ext']} "
        f"({build['isa']}). Every number that a run makes is checked; elements on {threads} threads, the rest on one "
        "but where it says so. Other work on the machine shows in the times.\n\n"
        "| limit | result | seconds |\n| --- | --- | --- |\n"
        + "".join(f"| {row['limit']} | {row['result']} | {row['seconds']:.1f} |\n" for row in rows)
    )
    write_dated(args.out, "limits", {**result, "threads": threads, "rows": rows}, text)


if __name__ == "__main__":
    main()
