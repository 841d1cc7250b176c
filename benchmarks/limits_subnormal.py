"""Subnormal numbers: flushed to zero on every path or on none, as the calling thread has it, in every mode."""

import functools
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.limits_sizes import check
from benchmarks.limits_values import MODES, PATHS, SHARED, TORCHS, Job, Numbers, assert_same
from tests.helpers import assert_same_bits, compute_dtype, running_on
from tests.reference import as_float64
from tests.test_bits import Path

BETAS = (0.75, 0.9375)  # whose first powers are exact
SUBNORMAL_HYPERS: dict[str, dict[str, Any]] = {
    "eps 1": {"lr": 0.5, "betas": BETAS, "eps": 1.0, "weight_decay": 0.25},
    "eps 0, amsgrad": {"lr": 1e-3, "betas": BETAS, "eps": 0.0, "amsgrad": True},
    "clipped, scaled": {"lr": 0.5, "betas": BETAS, "eps": 1.0, "max_grad_norm": 1e30},
}


@functools.cache
def small_numbers(dtype: torch.dtype, count: int = SHARED) -> Numbers:
    """From the smallest subnormal number of a dtype to 1, half of them in its lowest 60 octaves."""
    info = torch.finfo(dtype)
    lowest = math.log2(info.smallest_normal * info.eps)
    generator = torch.Generator().manual_seed(0)

    def numbers(signed: bool) -> Tensor:
        where, signs, low = (torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(3))
        sizes = torch.exp2(torch.where(low < 0.5, lowest * where, (lowest + 60 * where).clamp(max=0.0)))
        return torch.where(signs < 0.5, -sizes, sizes) if signed else sizes

    roles = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return {role: numbers(signed=not role.endswith("_sq")) for role in roles}


@contextmanager
def flushing(flush: bool) -> Iterator[None]:
    """Subnormal numbers are zeros in this thread, or are not."""
    check(torch.set_flush_denormal(flush) or not flush, "this processor cannot flush subnormal numbers to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def subnormal_steps(mode: str, name: str, path: Path, flush: bool, steps: int = 3) -> Numbers:
    """Params, gradients, state, and the norm of the gradients."""
    hyper = SUBNORMAL_HYPERS[name]
    job = Job(mode, small_numbers(MODES[mode][0]), path.capturable, **hyper)
    if "max_grad_norm" in hyper:
        job.optimizer.grad_scale = torch.tensor(2.0)
    with flushing(flush):
        job.step(path, steps)
    return {**job.tensors(), **({"grad_norm": job.optimizer.grad_norm} if "max_grad_norm" in hyper else {})}


def share_subnormal(tensors: Numbers) -> float:
    """Of what is computed, and not chosen or left; and to the arithmetic, to which those of float16 are not."""
    numbers = torch.cat([as_float64(tensors[role]) for role in ("param", "exp_avg", "exp_avg_sq")])
    least = torch.finfo(compute_dtype(tensors["param"].dtype)).smallest_normal
    return float(((numbers != 0) & (numbers.abs() < least)).double().mean())


def check_subnormal(mode: str, name: str, paths: Sequence[Path] = PATHS) -> None:
    """The bits of the first path on all of them; without flushing those of the arithmetic, one operation at a time."""
    kept, flushed = (subnormal_steps(mode, name, paths[0], flush) for flush in (False, True))
    if mode in TORCHS and "max_grad_norm" not in SUBNORMAL_HYPERS[name]:
        assert_same(kept, by_single_operations(mode, name), f"{mode}, {name}, not flushed")
    if mode != "float16":
        check(share_subnormal(kept) > 0.01, f"{mode}, {name}: no number is subnormal")
        check(share_subnormal(flushed) == 0.0, f"{mode}, {name}: a number is subnormal where they are flushed")
    for path, (flush, expected) in itertools.product(paths[1:], ((False, kept), (True, flushed))):
        assert_same(subnormal_steps(mode, name, path, flush), expected, (mode, name, path, f"flushing: {flush}"))


def by_single_operations(mode: str, name: str, steps: int = 3) -> Numbers:
    """The update in operations on whole tensors, each of which rounds once. torch's own square root of float64 numbers
    is off by a bit at times."""
    hyper = {"weight_decay": 1e-2, "amsgrad": False, **SUBNORMAL_HYPERS[name]}
    dtype = MODES[mode][0]
    computed = compute_dtype(dtype)
    stored = {role: numbers.to(dtype) for role, numbers in small_numbers(dtype).items()}

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=computed)

    with running_on(threads=1):
        for step in range(1, steps + 1):
            p, g, m, v, largest = (stored[role].to(computed) for role in stored)
            correction1, correction2 = (1 - beta**step for beta in BETAS)
            m = m + scalar(1 - BETAS[0]) * (g - m)
            v = scalar(BETAS[1]) * v + (scalar(1 - BETAS[1]) * g) * g
            second = largest = torch.maximum(v, largest) if hyper["amsgrad"] else v
            denominator = torch.from_numpy(numpy.sqrt(second.numpy())) * scalar(1 / math.sqrt(correction2)) + scalar(
                hyper["eps"]
            )
            descent = scalar(hyper["lr"] / correction1) * (m / denominator)
            p = p - (scalar(hyper["lr"] * hyper["weight_decay"]) * p + descent)
            stored = dict(zip(stored, (tensor.to(dtype) for tensor in (p, g, m, v, largest)), strict=True))
    if not hyper["amsgrad"]:
        del stored["max_exp_avg_sq"]
    return {**stored, "step": torch.tensor(float(steps))}


def check_threads_made_otherwise(mode: str = "float32", name: str = "clipped, scaled") -> None:
    """Threads are made with the environment of the one that first needs them, and keep it for other work: a step must
    neither take theirs nor leave its own with them."""
    alone, shared = Path(threads=1), Path(threads=2)
    errors: list[BaseException] = []

    def steps_in_both(first: bool) -> None:
        try:
            for flush in (first, not first, first):
                found = subnormal_steps(mode, name, shared, flush)
                assert_same(found, expected[flush], f"threads made where flushing is {first}, now {flush}")
        except BaseException as error:
            errors.append(error)

    expected = {flush: subnormal_steps(mode, name, alone, flush) for flush in (False, True)}
    for first in (True, False):
        thread = threading.Thread(target=steps_in_both, args=(first,))  # its first parallel region makes its own
        thread.start()
        thread.join()
        if errors:
            raise errors[0]


def check_other_work_keeps_its_arithmetic() -> None:
    """After a flushing step on several threads, they do not flush."""
    numbers = torch.full((1 << 20,), 1e-40)
    with running_on(threads=2):
        before = numbers * 0.5
        subnormal_steps("float32", "eps 1", Path(threads=2), True)
        assert_same_bits([numbers * 0.5], [before], "torch's own product after a flushing step")
    check((before != 0).all(), "torch flushed")


def subnormal_numbers() -> str:
    for mode, name in itertools.product(MODES, SUBNORMAL_HYPERS):
        check_subnormal(mode, name)
    check_threads_made_otherwise()
    check_other_work_keeps_its_arithmetic()
    return (
        f"{len(MODES)} modes, flushed to zero by the calling thread or not: the same bits on {len(PATHS)} paths "
        "(levels, 1 and 2 threads, capturable, emulated CUDA), and, where not, those of single operations"
    )
