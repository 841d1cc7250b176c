"""Times precision modes against floors over their own memory, and clipping in the step against clipping before it."""

import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from benchmarks.allocations import allocated_bytes
from benchmarks.buffers_floor import buffers_floor
from benchmarks.clocks import Step, cpu_seconds
from benchmarks.comparison import check_updates, reason
from benchmarks.measure import Samples, interleaved, quartiles, ratios
from benchmarks.mode_bytes import as_text, formula, gradient_buffers, kept, memory, moved, step_buffers
from benchmarks.mode_peers import FUSED, Subject, ours, torch_fused
from benchmarks.workloads import Workload, randomize

Result = dict[str, Any]

FLOOR = "floor of "
SLOW_SECONDS = 2.0  # a step that takes longer is timed a few times and not interleaved
SLOW_ROUNDS = 2

MAX_NORM = 1.0
CLIPPED = "max_grad_norm"
NOT_CLIPPED = "without clipping"
TORCH_AFTER = "clip_grad_norm_, then torch fused"
OURS_AFTER = "clip_grad_norm_, then adamw_ext"


@dataclass
class Bench:
    """The tensors that all optimizers of a dtype step, and torch's fused AdamW over them, which is in every group."""

    workloads: dict[torch.dtype, Workload]
    params: dict[torch.dtype, list[Parameter]] = field(init=False)
    fused: dict[str, Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.params = {dtype: workload.make_params("cpu") for dtype, workload in self.workloads.items()}
        self.fused = {FUSED[dtype]: torch_fused(params) for dtype, params in self.params.items()}
        for optimizer in self.fused.values():
            optimizer.step()

    def randomize(self) -> None:
        for params in self.params.values():
            randomize(params)

    def check_finite(self) -> None:
        if not all(param.isfinite().all() for params in self.params.values() for param in params):
            raise RuntimeError("params are no longer finite: the times mean nothing")


def measure_group(group: list[Subject], bench: Bench, result: Result, seconds: float) -> None:
    """Interleaves these subjects, a floor for each, and torch's fused AdamW, and adds an entry for each to ``result``.

    A subject that cannot be made or does not update every element is a failure, not an end. Optimizers are gone when
    this returns.
    """
    optimizers = prepare(group, bench, result["failures"])
    samples: Samples = {}
    steps: dict[str, Step] = {name: optimizer.step for name, optimizer in bench.fused.items()}
    for name, optimizer in optimizers.items():
        if (took := cpu_seconds(optimizer.step)) > SLOW_SECONDS:
            samples[name] = [took] + [cpu_seconds(optimizer.step) for _ in range(SLOW_ROUNDS - 1)]
        else:
            steps[name] = optimizer.step
            params = optimizer.param_groups[0]["params"]
            steps[FLOOR + name] = buffers_floor(step_buffers(optimizer, params))
    if len(steps) > len(bench.fused):
        samples |= interleaved(steps, cpu_seconds, seconds)
    bench.check_finite()
    for subject in group:
        if subject.name in optimizers:
            optimizer = optimizers[subject.name]
            entry = describe(subject, optimizer, bench) | times(samples, subject.name)
            entry["gigabytes_per_second"] = entry["step_bytes"] / entry["seconds"]["median"] / 1e9
            if subject.name in steps:
                entry["allocated_bytes"] = allocated_bytes(optimizer.step, "cpu")
            result["modes"][subject.name] = entry


def prepare(group: list[Subject], bench: Bench, failures: dict[str, str]) -> dict[str, Optimizer]:
    """The optimizers that work."""
    optimizers = {}
    for subject in group:
        params = bench.params[subject.dtype]
        try:
            optimizer = bench.fused.get(subject.name) or subject.make(params)
            check_updates(subject.name, optimizer.step, params)
            optimizers[subject.name] = optimizer
        except Exception as error:
            traceback.print_exc()
            failures[subject.name] = reason(error)
    bench.randomize()
    return optimizers


def describe(subject: Subject, optimizer: Optimizer, bench: Bench) -> Result:
    """What an entry holds besides times."""
    per_param = memory(optimizer, bench.params[subject.dtype])
    return {
        "kind": subject.kind,
        "dtype": as_text(subject.dtype),
        "bytes": per_param,
        "bytes_kept": kept(per_param),
        "bytes_moved": moved(per_param),
        "step_bytes": moved(per_param) * bench.workloads[subject.dtype].numel,
        "formula": formula(per_param),
    }


def times(samples: Samples, name: str) -> Result:
    """Seconds of a step, how many times its floor it takes, and how many times as long torch's fused AdamW takes."""
    entry: Result = {"seconds": quartiles(samples[name]), "rounds": len(samples[name])}
    if FLOOR + name in samples:
        entry["floor_seconds"] = quartiles(samples[FLOOR + name])
        entry["over_floor"] = quartiles(ratios([samples], name, FLOOR + name))
        entry["fused_over_it"] = {fused: quartiles(ratios([samples], fused, name)) for fused in FUSED.values()}
    return entry


def measure_clipping(dtype: torch.dtype, bench: Bench, seconds: float) -> Result:
    """``max_grad_norm`` against ``clip_grad_norm_`` before a step of torch's and of ours, and against no clipping."""
    params = bench.params[dtype]
    clipping, plain, fused = ours(params, max_grad_norm=MAX_NORM), ours(params), bench.fused[FUSED[dtype]]
    check_updates(CLIPPED, clipping.step, params)
    bench.randomize()
    check_norm(clipping, params)
    plain.step()
    floor = {FLOOR + CLIPPED: one_after_another(params, clipping)}
    steps: dict[str, Step] = {
        CLIPPED: clipping.step,
        NOT_CLIPPED: plain.step,
        TORCH_AFTER: clip_then(fused, params),
        OURS_AFTER: clip_then(plain, params),
    }
    samples = interleaved(steps | floor, cpu_seconds, seconds)
    bench.check_finite()
    per_param = memory(clipping, params)
    return {
        "dtype": as_text(dtype),
        "rounds": len(samples[CLIPPED]),
        "bytes_moved": moved(per_param, clips=True),
        "formula": formula(per_param, clips=True),
        "allocated_bytes": {name: allocated_bytes(step, "cpu") for name, step in steps.items()},
        "seconds": {name: quartiles(taken) for name, taken in samples.items()},
        "over_it": {name: quartiles(ratios([samples], name, CLIPPED)) for name in samples},
        "over_floor": quartiles(ratios([samples], CLIPPED, FLOOR + CLIPPED)),
    }


def clip_then(optimizer: Optimizer, params: list[Parameter]) -> Step:
    """What a training loop does. From its second call on, the factor is 1, which torch multiplies by all the same."""

    def step() -> None:
        clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()

    return step


def one_after_another(params: list[Parameter], optimizer: Optimizer) -> Step:
    """The floor of a step that clips: all gradients, then everything."""
    gradients, everything = buffers_floor(gradient_buffers(params)), buffers_floor(step_buffers(optimizer, params))

    def step() -> None:
        gradients()
        everything()

    return step


def check_norm(clipping: Any, params: list[Parameter]) -> None:
    """Raise unless the norm is the gradients': time of work not done means nothing."""
    clipping.step()
    grads = [param.grad for param in params if param.grad is not None]
    expected = sum(grad.double().square().sum().item() for grad in grads) ** 0.5
    if abs(clipping.grad_norm.item() / expected - 1) > 1e-6:
        raise RuntimeError(f"grad_norm is {clipping.grad_norm.item()}, but the norm of the gradients {expected}")
