"""How it is measured: interleaved rounds, quartiles, allocations, import time."""

import gc
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.autograd.profiler import profile

Step = Callable[[], object]
WARM_UP_STEPS = 3


def cpu_seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


CLOCKS: dict[str, Callable[[Step], float]] = {"cpu": cpu_seconds}


def interleaved(
    steps: dict[str, Step], seconds_of: Callable[[Step], float], budget: float, least_rounds: int
) -> dict[str, list[float]]:
    """Seconds of each step in each round. A round times every step once, in an order drawn anew.

    Rounds go on until ``budget`` seconds have passed, and for ``least_rounds`` at least.
    """
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    shuffled = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in steps}
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


def ratios(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Quartiles of the ratios within each round."""
    return quartiles([a / b for a, b in zip(numerators, denominators, strict=True)])


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """For the profiler: in some torch builds its library prints trace points to the process's stderr."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def allocated_bytes(step: Step) -> int:
    """Bytes of all tensors that a step allocates, whether or not it frees them again."""
    step()
    with quiet_stderr(), profile(profile_memory=True, use_kineto=False) as profiler:
        step()
    events = profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def import_seconds(repeats: int = 5) -> dict[str, float]:
    """Importing adamw_ext where torch has been imported, each time in a new process."""
    code = "import torch, time; begin = time.perf_counter(); import adamw_ext; print(time.perf_counter() - begin)"
    command = [sys.executable, "-c", code]
    return quartiles([float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)])
