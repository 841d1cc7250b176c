"""Who is measured beside our precision modes: torch's fused AdamW, and what others offer for fewer bytes on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import adamw_ext
from benchmarks.peers import HYPERPARAMETERS
from benchmarks.precision import BF16, FP32, MODES

OURS, TORCH, OTHER = "adamw_ext", "torch", "other"
FUSED = {FP32: "torch fused, float32", BF16: "torch fused, bf16"}


@dataclass(frozen=True)
class Subject:
    """An optimizer over params of one dtype.

    ``module`` must be installed for it. ``least_seconds`` is what it is not started without: others compile kernels
    first, for every shape anew, and take seconds for a step.
    """

    name: str
    kind: str
    dtype: torch.dtype
    make: Callable[[list[Parameter]], Optimizer]
    module: str = "torch"
    least_seconds: float = 10.0

    @property
    def absence(self) -> str | None:
        """Why it cannot run here; None if it may."""
        return None if find_spec(self.module) else f"{self.module} is not installed"


def ours(params: list[Parameter], **options: Any) -> Optimizer:
    return adamw_ext.AdamW(params, **HYPERPARAMETERS, **options)


def torch_fused(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, **HYPERPARAMETERS, fused=True)


def deepspeed(params: list[Parameter], **options: Any) -> Optimizer:
    return import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(params, **HYPERPARAMETERS, **options)


def bitsandbytes(params: list[Parameter]) -> Optimizer:
    return import_module("bitsandbytes.optim").AdamW8bit(params, **HYPERPARAMETERS)


def torchao(params: list[Parameter], *, name: str) -> Optimizer:
    return getattr(import_module("torchao.optim"), name)(params, **HYPERPARAMETERS, bf16_stochastic_round=True)


def subjects() -> list[Subject]:
    """In the order of measuring: what takes longest, and is left out when time is short, comes last."""
    modes = [Subject(mode.name, OURS, mode.dtype, partial(ours, **mode.options)) for mode in MODES]
    fused = [Subject(FUSED[dtype], TORCH, dtype, torch_fused) for dtype in FUSED]
    cpu_adam = {"kind": OTHER, "module": "deepspeed", "least_seconds": 30.0}
    compiled = {"kind": OTHER, "dtype": BF16, "module": "torchao", "least_seconds": 60.0}
    others = [
        Subject("DeepSpeed CPUAdam, float32", dtype=FP32, make=deepspeed, **cpu_adam),
        Subject(
            "DeepSpeed CPUAdam, bf16", dtype=BF16, make=partial(deepspeed, fp32_optimizer_states=False), **cpu_adam
        ),
        Subject("DeepSpeed CPUAdam, bf16, fp32 moments", dtype=BF16, make=deepspeed, **cpu_adam),
        Subject("bitsandbytes AdamW8bit, bf16", OTHER, BF16, bitsandbytes, "bitsandbytes", 40.0),
        Subject("torchao AdamW, bf16, SR", make=partial(torchao, name="_AdamW"), **compiled),
        Subject("torchao AdamW8bit, bf16, SR", make=partial(torchao, name="AdamW8bit"), **compiled),
        Subject("torchao AdamWFp8, bf16, SR", make=partial(torchao, name="AdamWFp8"), **compiled),
    ]
    return modes + fused + others
