"""What a step allocates."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from benchmarks.clocks import Step


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


def allocated_bytes(step: Step, device: str) -> int:
    """Bytes of all tensors that a step allocates, on the host and on the device, whether or not it frees them again."""
    step()
    before = device_bytes(device)
    with quiet_stderr(), profile(profile_memory=True, use_kineto=False) as profiler:
        step()
    events = profiler.kineto_results.events()
    host = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    return sum(max(0, event.nbytes()) for event in host) + device_bytes(device) - before


def peak_bytes(work: Callable[[], object]) -> int:
    """How many bytes of the CPU tensors that work makes are alive at once, at most."""
    with quiet_stderr(), profile(profile_memory=True, use_kineto=False) as profiler:
        work()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # negative where memory is freed
        peak = max(peak, alive)
    return peak


def device_bytes(device: str) -> int:
    """What tensors have ever asked for on the device."""
    return 0 if device == "cpu" else torch.cuda.memory_stats()["requested_bytes.all.allocated"]


def status_bytes(field: str) -> int:
    """A line of this process's status, as the kernel has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
