"""A scenario: which tensors an optimizer has, in which groups, and what happens in each step.

Plain data, whose repr can be pasted. tests/jobs.py makes the tensors of one, tests/ways.py steps them,
tests/strategies.py draws them.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
FLOAT32_MOMENTS: dict[str, Any] = {"moment_dtype": torch.float32}
BFLOAT16_MOMENTS: dict[str, Any] = {"moment_dtype": torch.bfloat16}
AT_RANDOM: dict[str, Any] = {"stochastic_rounding": True}
WHOLE, SPLIT = ({"master_weights": kind} for kind in ("fp32", "split"))
_WIDE = (torch.float32, torch.float64, *COMPLEX)

# What a group may be told about storage, with the param dtypes that it then takes.
MODES: dict[str, tuple[dict[str, Any], tuple[torch.dtype, ...]]] = {
    "default": ({}, (*FLOATS, *COMPLEX, torch.complex32)),
    "float32 moments": (FLOAT32_MOMENTS, (*FLOATS[:3], torch.complex64)),
    "bfloat16 moments": (BFLOAT16_MOMENTS, FLOATS[:3]),
    "fp32": (WHOLE, (*FLOATS, *COMPLEX)),
    "fp32, float32 moments": ({**WHOLE, **FLOAT32_MOMENTS}, (*FLOATS[:3], torch.complex64)),
    "fp32, bfloat16 moments": ({**WHOLE, **BFLOAT16_MOMENTS}, FLOATS[:3]),
    "split": (SPLIT, (torch.bfloat16, *_WIDE)),
    "split, float32 moments": ({**SPLIT, **FLOAT32_MOMENTS}, (torch.bfloat16, torch.float32, torch.complex64)),
    "at random": (AT_RANDOM, (torch.bfloat16, *_WIDE)),
    "at random, float32 moments": ({**AT_RANDOM, **FLOAT32_MOMENTS}, (torch.bfloat16, torch.float32, torch.complex64)),
    "at random, bfloat16 moments": ({**AT_RANDOM, **BFLOAT16_MOMENTS}, FLOATS[:2]),
    "at random, fp32, bfloat16 moments": ({**AT_RANDOM, **WHOLE, **BFLOAT16_MOMENTS}, FLOATS[:3]),
    "at random, fp32": ({**AT_RANDOM, **WHOLE}, (torch.bfloat16, *_WIDE)),
    "at random, split": ({**AT_RANDOM, **SPLIT}, (torch.bfloat16, *_WIDE)),
}
# Those of the functional form; those whose bits do not depend on a param's place in the optimizer.
FUNCTIONAL_MODES = ("default", "float32 moments", "bfloat16 moments")
PLACELESS_MODES = tuple(mode for mode in MODES if "at random" not in mode)

# What params and gradients may be: random numbers of both signs around this, spread over so many octaves.
NUMBERS = ("ordinary", "wide", "zeros", "denormal", "huge", "special")


class Brief:
    """A dataclass whose repr leaves out what is as by default."""

    def __repr__(self) -> str:
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


@dataclass(frozen=True, repr=False)
class Param(Brief):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    offset: int = 0  # elements behind an aligned address
    steps_before: int = 0  # with moments left by these; 0: the first step begins without state
    grad_dtype: torch.dtype | None = None  # None: the param's
    grad_layout: str = "as the param"  # or one of LAYOUTS, "expanded", "lazy" (conjugated or negated when read)
    grad_offset: int = 0


@dataclass(frozen=True, repr=False)
class Group(Brief):
    params: tuple[Param, ...]
    repeat: int = 1  # so many times these params, one after the other
    mode: str = "default"
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    amsgrad: bool = False
    maximize: bool = False
    seed: int = 0
    max_grad_norm: float | None = None

    @property
    def storage(self) -> dict[str, Any]:
        return MODES[self.mode][0]

    @property
    def hyper(self) -> dict[str, Any]:
        """As a param group has it."""
        keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
        hyper = {key: getattr(self, key) for key in keys}
        if self.storage.get("stochastic_rounding"):
            hyper["seed"] = self.seed
        return hyper if self.max_grad_norm is None else {**hyper, "max_grad_norm": self.max_grad_norm}


@dataclass(frozen=True, repr=False)
class Step(Brief):
    numbers: str = "ordinary"  # of the gradients
    idle: tuple[int, int] | None = None  # (n, k): every n-th param has no gradient, beginning with the k-th
    lr_factor: float | None = None  # from now on every group's lr is its first one times this
    grad_scale: float | None = None
    found_inf: float | None = None

    def gives(self, index: int) -> bool:
        """A gradient to this param."""
        return self.idle is None or index % self.idle[0] != self.idle[1] % self.idle[0]

    @property
    def is_skipped(self) -> bool:
        return self.found_inf is not None and self.found_inf != 0.0


@dataclass(frozen=True, repr=False)
class Scenario(Brief):
    groups: tuple[Group, ...]
    steps: tuple[Step, ...] = (Step(),)
    numbers: str = "ordinary"  # of params and moments
    seed: int = 0  # of all numbers

    @cached_property
    def params(self) -> list[tuple[Group, Param]]:
        return [(group, param) for group in self.groups for _ in range(group.repeat) for param in group.params]

    @property
    def clips(self) -> bool:
        return any(group.max_grad_norm is not None for group in self.groups)

    @property
    def unscales(self) -> bool:
        return any(step.grad_scale is not None for step in self.steps)

    @cached_property
    def members(self) -> list[range]:
        """For each group, the indices of its params."""
        ends = list(accumulate((len(group.params) * group.repeat for group in self.groups), initial=0))
        return [range(*bounds) for bounds in pairwise(ends)]

    def without_empty_groups(self) -> "Scenario":
        return replace(self, groups=tuple(group for group in self.groups if group.params))
