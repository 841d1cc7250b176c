"""Counts the kernels, copies and fills that a step runs on the GPU: python -m benchmarks.kernels [--quick] NAME ...

Prints {workload: {peer: count}} as JSON; null where the profiler sees nothing. A process of its own, because a profiler
that has watched the GPU may slow later launches, and one that was started without the GPU first may never see it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.allocations import quiet_stderr
from benchmarks.clocks import Step
from benchmarks.peers import peers_on
from benchmarks.subsets import release
from benchmarks.workloads import Workload, workloads_on

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the profiler's trace
STEPS = 3
LONGEST_SECONDS = 90.0


def kernels_of(workloads: list[str], quick: bool) -> dict[str, dict[str, int | None]]:
    """What the process of its own prints; this one hands it the device's memory."""
    release()
    command = [sys.executable, "-m", "benchmarks.kernels", *(["--quick"] if quick else []), *workloads]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=LONGEST_SECONDS)
    return json.loads(answer.stdout.strip().rpartition("\n")[2])


def count_all(workload: Workload) -> dict[str, int | None]:
    params = workload.make_params("cuda")
    counts = {}
    for name, peer in peers_on("cuda").items():
        if peer.is_floor:
            continue
        release()
        try:
            counts[name] = count(peer.make_step(params))
        except Exception as error:
            print(f"{workload.name}, {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return counts


def count(step: Step) -> int | None:
    step()
    for _ in range(3):  # a profiler that has just been started may miss some
        work = device_work(trace(step))
        if work and work % STEPS == 0:
            return work // STEPS
    return None


def trace(step: Step) -> dict[str, Any]:
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder, quiet_stderr():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"))


def device_work(trace: dict[str, Any]) -> int:
    return sum(event.get("cat") in DEVICE_WORK for event in trace["traceEvents"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    counts = {w.name: count_all(w) for w in workloads_on("cuda", args.quick) if w.name in args.names}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
