"""How it is measured: interleaved rounds, quartiles, import time, build time."""

import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.clocks import Step

Samples = dict[str, list[float]]  # seconds of each step in each round

WARM_UP_STEPS = 3
LEAST_ROUNDS = 9


def interleaved(
    steps: dict[str, Step],
    seconds_of: Callable[[Step], float],
    budget: float,
    least_rounds: int = LEAST_ROUNDS,
    warm_up_steps: int = WARM_UP_STEPS,
) -> Samples:
    """Seconds of each step in each round. A round times every step once, in an order drawn anew.

    Rounds go on until ``budget`` seconds have passed, and for ``least_rounds`` at least.
    """
    for step in steps.values():
        for _ in range(warm_up_steps):
            seconds_of(step)
    shuffled = random.Random(0)
    samples: Samples = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        while time.perf_counter() < end or len(next(iter(samples.values()))) < least_rounds:
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


def build_seconds() -> float:
    """Compiling the extension without CUDA kernels from nothing, with as many compilers as cores, into nowhere."""
    environment = {name: value for name, value in os.environ.items() if name != "MAX_JOBS"} | {"ADAMW_EXT_CUDA": "0"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
        begin = time.perf_counter()
        subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=True, capture_output=True)
        return time.perf_counter() - begin
