"""The targets, judged by the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.clocks import HOST
from benchmarks.mode_timing import TORCH_AFTER
from benchmarks.peers import COPY, FLOOR, FUSED, FUSED_CAPTURED, OURS, OURS_CAPTURABLE, OURS_CAPTURED

Result = dict[str, Any]  # what step_time.py measures and writes as JSON


@dataclass(frozen=True)
class Target:
    """A bound on the time of ``peer`` relative to ours, or, for the streaming floor, of ours relative to the floor.

    The time of a copy relative to ours is the share of the copy's bandwidth that ours reaches. A peer that is captured
    is compared with ours captured. ``prefix`` names the clock.
    """

    workload: str
    peer: str
    bound: float
    prefix: str = ""

    @property
    def is_upper(self) -> bool:
        return self.peer == FLOOR

    @property
    def form(self) -> str:
        return ".1%" if self.peer == COPY else ".2f"

    @property
    def wanted(self) -> str:
        if self.is_upper:
            return f"<= {self.bound:.2f}x floor"
        if self.peer == COPY:
            return f">= {self.bound:.0%} of {COPY}"
        return f">= {self.bound:g}x {self.peer}{', host time' if self.prefix == HOST else ''}"

    def ratio(self, workload: Result) -> dict[str, float] | None:
        """The quartiles; None where the peer could not be measured."""
        if self.is_upper:
            return workload.get("ours_over_floor")
        peer = workload["peers"].get(self.peer, {})
        if self.peer == FUSED_CAPTURED:
            return peer.get("against", {}).get("ratio")
        return peer.get(f"{self.prefix}ratio")

    def reached(self, ratio: float) -> bool:
        return ratio <= self.bound if self.is_upper else ratio >= self.bound

    def judge(self, workload: Result) -> Result:
        ratio = self.ratio(workload)
        if ratio is None:
            return row(workload["title"], self.wanted, None)
        reached = self.reached(ratio["median"])
        sure = self.reached(ratio["q1"]) == self.reached(ratio["q3"])
        return row(workload["title"], self.wanted, spread(ratio, self.form), reached=reached, sure=sure)


TARGETS = {
    "cpu": [
        Target("gpt2-fp32", FUSED, 1.0),
        Target("gpt2-fp32", FLOOR, 1.10),
        Target("gpt2-bf16", FUSED, 2.0),
        Target("gpt2-bf16", FLOOR, 1.15),
        Target("small-tensors", FUSED, 100.0),
        Target("resnet50", FUSED, 1.3),
    ],
    "cuda": [
        Target("large-fp32", COPY, 0.95),
        Target("large-bf16", COPY, 0.93),
        Target("small-tensors", FUSED, 20.0, HOST),
        Target("resnet50", FUSED, 10.0, HOST),
        Target("gpt2-fp32", FUSED_CAPTURED, 1.0),
        Target("gpt2-bf16", FUSED_CAPTURED, 1.0),
    ],
}
CAPTURED_KERNELS = 2
IMPORT_SECONDS = 0.2
BUILD_SECONDS = 60
CLIPPING = 1.3  # times as long, clip_grad_norm_ before a step of torch's


def row(work: str, wanted: str, measured: str | None, *, reached: bool = False, sure: bool = True) -> Result:
    """A verdict; ``measured`` is None where nothing was."""
    return {
        "work": work,
        "wanted": wanted,
        "measured": "not measured" if measured is None else measured,
        "reached": reached,
        "certain": sure,
    }


def judge(result: Result) -> list[Result]:
    """The targets that this run can judge: what is wanted, what was measured, and whether it is reached.

    The median decides; the verdict is ``certain`` where both quartiles agree with it.
    """
    workloads = result["workloads"]
    rows = [
        target.judge(workloads[target.workload]) for target in TARGETS[result["device"]] if target.workload in workloads
    ]
    if result["device"] == "cuda":
        rows += judge_kernels(workloads)
    if workloads:
        temporaries = max(most_allocated(workload) for workload in workloads.values())
        wanted = "temporaries of a steady-state step"
        rows.append(row(wanted, "0 bytes", f"{temporaries:,} bytes", reached=temporaries == 0))
    for clipping in result.get("clipping", {}).values():
        title, ratio = f"clipping, GPT-2 small, {clipping['dtype']}", clipping["over_it"][TORCH_AFTER]
        wanted = f">= {CLIPPING:g}x {TORCH_AFTER}"
        sure = (ratio["q1"] >= CLIPPING) == (ratio["q3"] >= CLIPPING)
        rows.append(row(title, wanted, spread(ratio, ".2f"), reached=ratio["median"] >= CLIPPING, sure=sure))
    if (built := result.get("build_seconds")) is not None:
        wanted = f"< {BUILD_SECONDS} s"
        rows.append(row("build from source, CPU only", wanted, f"{built:.0f} s", reached=built < BUILD_SECONDS))
    seconds = result["import_seconds"]["median"]
    reached = seconds < IMPORT_SECONDS
    rows.append(row("import, beyond torch's own", f"< {IMPORT_SECONDS} s", f"{seconds:.3f} s", reached=reached))
    return rows


def judge_kernels(workloads: Result) -> Iterator[Result]:
    for name in ("gpt2-fp32", "gpt2-bf16"):
        if name in workloads:
            kernels = workloads[name]["peers"].get(OURS_CAPTURED, {}).get("kernels")
            measured = None if kernels is None else f"{kernels} kernels"
            reached = kernels is not None and kernels <= CAPTURED_KERNELS
            title = f"{workloads[name]['title']}, captured"
            yield row(title, f"<= {CAPTURED_KERNELS} kernels", measured, reached=reached)


def most_allocated(workload: Result) -> int:
    ours = (OURS, OURS_CAPTURABLE, OURS_CAPTURED)
    return max(workload["peers"][name]["allocated_bytes"] for name in ours if name in workload["peers"])


def spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['q1']:{form}} to {values['q3']:{form}})"
