"""How it is measured: interleaved rounds, quartiles, import time."""

import gc
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.clocks import Step

Samples = dict[str, list[float]]  # seconds of each step in each round

WARM_UP_STEPS = 3
LEAST_ROUNDS = 9


def interleaved(steps: dict[str, Step], seconds_of: Callable[[Step], float], budget: float) -> Samples:
    """Seconds of each step in each round. A round times every step once, in an order drawn anew.

    Rounds go on until ``budget`` seconds have passed, and for ``LEAST_ROUNDS`` at least.
    """
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            seconds_of(step)
    shuffled = random.Random(0)
    samples: Samples = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        while time.perf_counter() < end or len(next(iter(samples.values()))) < LEAST_ROUNDS:
            for name in shuffled.sample(list(steps), len(steps)):
                samples[name].append(seconds_of(steps[name]))
    finally:
        gc.enable()
    return samples


def quartiles(values: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4)
    return {"median": median, "q1": first, "q3": third}


def seconds_in(parts: list[Samples], name: str) -> list[float]:
    """All samples of a peer that may have been measured in several parts."""
    return [seconds for samples in parts for seconds in samples.get(name, [])]


def ratios(parts: list[Samples], numerator: str, denominator: str) -> list[float]:
    """The ratios within each round, of the parts in which both were measured."""
    both = [samples for samples in parts if numerator in samples and denominator in samples]
    return [a / b for samples in both for a, b in zip(samples[numerator], samples[denominator], strict=True)]


def import_seconds(repeats: int = 5) -> dict[str, float]:
    """Importing adamw_ext where torch has been imported, each time in a new process."""
    code = "import torch, time; begin = time.perf_counter(); import adamw_ext; print(time.perf_counter() - begin)"
    command = [sys.executable, "-c", code]
    return quartiles([float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)])
