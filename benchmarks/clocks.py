"""What is timed on each device: the whole step on the CPU; on CUDA the device's time and the host's, apart."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """One quantity: ``seconds_of`` a step, reported as ``title`` in units of 1 / ``per_second`` seconds.

    ``prefix`` tells its keys in the results from those of other clocks: "" is the one that targets mean by default.
    ``times_floors``: whether it says anything about peers that only move bytes.
    """

    prefix: str
    title: str
    unit: str
    per_second: float
    digits: int
    seconds_of: Callable[[Step], float]
    times_floors: bool = True

    @property
    def seconds(self) -> str:
        return f"{self.prefix}seconds"

    @property
    def ratio(self) -> str:
        return f"{self.prefix}ratio"

    def times(self, is_floor: bool) -> bool:
        return self.times_floors or not is_floor


HOST = "host_"
WAITS = "its device time includes host time"


def clocks_on(device: str) -> list[Clock]:
    """New clocks: what one remembers about a step is worth nothing for other steps."""
    if device == "cpu":
        return [Clock("", "time of one optimizer step", "ms", 1e3, 3, cpu_seconds)]
    return [
        Clock("", "device time", "ms", 1e3, 4, DeviceSeconds()),
        Clock(HOST, "host time", "µs", 1e6, 1, host_seconds, times_floors=False),
    ]


def cpu_seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def host_seconds(step: Step) -> float:
    """Until the call returns. The device's queue is empty before, so that no launch has to wait for room in it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


@dataclass
class Plan:
    """How one step is timed: ``repeats`` steps between two events, after ``cycles`` in which the device is held."""

    repeats: int = 1
    cycles: int = 200_000
    tried: bool = False


@dataclass
class DeviceSeconds:
    """The device's time of a step, without the time in which it would wait for the host.

    A kernel that only waits holds the device until the host has enqueued the steps and the events around them. When it
    ends too early, the sample is thrown away and the next wait is twice as long. Steps shorter than the resolution of
    events are timed several at once.
    """

    plans: dict[Step, Plan] = field(default_factory=dict)

    RESOLVED_SECONDS = 2e-4
    MOST_REPEATS = 20
    MOST_CYCLES = 400_000_000  # about 0.2 s

    def __call__(self, step: Step) -> float:
        plan = self.plans.setdefault(step, Plan())
        seconds = self.held_back(step, plan)
        if not plan.tried:
            plan.tried = True
            plan.repeats = min(self.MOST_REPEATS, max(1, round(self.RESOLVED_SECONDS / max(seconds, 1e-7))))
            seconds = self.held_back(step, plan)
        return seconds

    def held_back(self, step: Step, plan: Plan) -> float:
        seconds, was_ahead = self.time(step, plan)
        while not was_ahead and plan.cycles:
            plan.cycles *= 2
            if plan.cycles > self.MOST_CYCLES:
                kind = type(getattr(step, "__self__", step))
                warnings.warn(f"{kind.__module__}.{kind.__name__} waits for the device: {WAITS}", stacklevel=2)
                plan.cycles = 0
            seconds, was_ahead = self.time(step, plan)
        return seconds

    def time(self, step: Step, plan: Plan) -> tuple[float, bool]:
        """Seconds of one step, and whether everything was enqueued before the device began with it."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if plan.cycles:
            torch.cuda._sleep(plan.cycles)
        begin.record()
        for _ in range(plan.repeats):
            step()
        end.record()
        was_ahead = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / plan.repeats, was_ahead
