from collections.abc import Callable
from typing import Any

from torch import Tensor

from adamw_ext.sharded import Member

built_with_torch: str
compiler: str
cuda_kernels: bool
cuda_architectures: str

class HyperMirror:
    """Float hyperparameters in device memory, which captured graphs read; see csrc/torch/mirror.h."""

    def __init__(self) -> None: ...
    def sync(self, param_groups: list[dict[str, Any]]) -> None: ...

class DeviceNumbers:
    """One number ("int64" or "float64") for each device that has counted or measured; see csrc/torch/numbers.h."""

    def __init__(self, dtype: str) -> None: ...
    def on(self, device: str) -> Tensor: ...

class Stepper:
    """The tensor table over one optimizer's params and state; see csrc/torch/stepper.h.

    ``place_grad(param, grad, name)`` places the gradient of a DTensor as the param; ``complete_sum(number, part)`` adds
    up a sum of squares over processes; see adamw_ext/sharded.py.
    """

    units_per_chunk: int
    emulated_arguments: int
    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        members: list[Member],
        mirror: HyperMirror,
        skips: DeviceNumbers,
        norms: DeviceNumbers,
        place_grad: Callable[[Tensor, Tensor, str], Tensor],
        complete_sum: Callable[[int, Tensor], Tensor],
    ) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        grads: list[Tensor | None] | None = None,
    ) -> bool:
        """Update every param that has a gradient: in ``grads``, one entry per member, or its own ``.grad`` if None.
        False: nothing was done, because a new stepper is needed."""
    @property
    def started(self) -> bool:
        """Whether the latest step got as far as changing something."""
    @property
    def isa(self) -> str: ...

def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as (bfloat16, int16) of its shape, on the CPU; see csrc/core/rounding.h."""

def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor again, on the CPU."""

def same_memory(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether each tensor of one list is its counterpart in the other, or shows the same elements of the same memory in
    the same order."""

def isa_levels() -> list[str]: ...
def chosen_isa() -> str: ...
def combinations() -> list[tuple[str, str, str, str]]: ...
