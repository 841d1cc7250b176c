"""What a param group may say: its options beyond torch's, its flags, its numbers."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from adamw_ext.memory import WHY_NOT_WRITTEN, check_may_read, may_write
from adamw_ext.messages import show
from adamw_ext.state import describe, misfits, to_float

STORAGE_OPTIONS = ("master_weights", "moment_dtype", "stochastic_rounding")

# What torch.optim.AdamW does not have: options and their defaults. A group has those keys that were given.
DEFAULTS = {
    "master_weights": None,
    "moment_dtype": None,
    "stochastic_rounding": False,
    "seed": 0,
    "max_grad_norm": None,
}


class Refill:
    """A loaded number, to be held as the present one is: in the same tensor, or as a float.

    Raises:
        ValueError: it is not one number, or the present tensor cannot take one.
    """

    def __init__(self, current: Any, loaded: Any, what: str) -> None:
        self._current = current
        self._loaded = loaded
        if isinstance(current, Tensor) or isinstance(loaded, Tensor):
            number = to_float(loaded)
            if number is None:
                raise ValueError(f"{what} must be a number, but is {describe(loaded)}")
            self._loaded = number
        if isinstance(current, Tensor) and to_float(current) is None:
            raise ValueError(f"{what} has no place: the present one is {describe(current)}, which holds no number")
        if isinstance(current, Tensor) and not may_write(current):
            raise ValueError(f"{what} has no place in the present tensor: {WHY_NOT_WRITTEN}")

    def make(self) -> Any:
        return self._current.fill_(self._loaded) if isinstance(self._current, Tensor) else self._loaded


def filled(value: Any) -> Any:
    """The same with what each Refill makes in its place."""
    if isinstance(value, tuple):
        return tuple(map(filled, value))
    return value.make() if isinstance(value, Refill) else value


def is_pair(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (tuple, list)) and len(value) == 2


def check_options(options: dict[str, Any], where: str) -> None:
    """Raise ValueError unless the options beyond torch's are usable; those not given are."""
    options = {**DEFAULTS, **options}
    expected = {
        "master_weights": (options["master_weights"] in (None, "fp32", "split"), "'fp32', 'split' or None"),
        "moment_dtype": (
            options["moment_dtype"] in (None, torch.float32, torch.bfloat16),
            "torch.float32, torch.bfloat16 or None",
        ),
        "stochastic_rounding": (isinstance(options["stochastic_rounding"], bool), "a bool"),
        "seed": (type(options["seed"]) is int and 0 <= options["seed"] < 2**64, "an int in [0, 2**64)"),
        "max_grad_norm": (is_norm(options["max_grad_norm"]), "a number that is not negative, or None"),
    }
    for key, (is_usable, wanted) in expected.items():
        if not is_usable:
            raise ValueError(f"{key} must be {wanted}, but is {describe(options[key])}{where}")


def check_readable(hyperparameters: dict[str, Any]) -> None:
    """Raise ValueError where torch's constructor would read a tensor whose memory is gone."""
    for key, value in hyperparameters.items():
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, Tensor):
                check_may_read(number, key)


def is_norm(value: Any) -> bool:
    """Whether max_grad_norm may be this."""
    return value is None or (isinstance(value, numbers.Real) and not is_nan_or_negative(value))


def is_nan_or_negative(value: numbers.Real) -> bool:
    try:
        return not float(value) >= 0.0
    except OverflowError:  # an int beyond all floats
        return True


def check_left_to_torch(group: dict[str, Any], param: Tensor, name: Callable[[], str]) -> None:
    """Raise RuntimeError if a param that torch updates is in a group with options that torch does not have."""
    for key in STORAGE_OPTIONS:
        value = group.get(key, DEFAULTS[key])
        if isinstance(value, Tensor) or (value != DEFAULTS[key] and value != param.dtype):
            raise RuntimeError(
                f"{key}={describe(value)} needs the hand-written kernel, but {name()} is updated by torch"
            )


def check_flags(group: dict[str, Any], index: int) -> None:
    """Raise TypeError unless the group's flags have a truth value."""
    for key in ("amsgrad", "maximize", "capturable", "differentiable", "fused"):
        if key not in group:
            raise KeyError(f"param group {index} has no {key!r}")
        try:
            bool(group[key])
        except (RuntimeError, ValueError, TypeError) as error:
            raise TypeError(f"param group {index}: {key} must be a bool, but is {describe(group[key])}") from error


def check_ready_for_capture(param: Tensor, state: dict[str, Any] | None, group: dict[str, Any], name: str) -> None:
    """Raise RuntimeError if a captured step would create or convert state, which replays would then do again."""
    if not group["capturable"]:
        return  # refused as a whole, and with torch's words, by the stepper
    if not state:
        raise RuntimeError(f"{name} has no state yet: call init_state() before the step is captured")
    if keys := misfits(param, state, group):
        raise RuntimeError(
            f"state {keys[0]!r} of {name} must be converted: call init_state() before the step is captured"
        )


def param_name(group: dict[str, Any], index: int, position: int) -> str:
    """How messages call a param: by its name where the user gave names, else by its place."""
    names = group.get("param_names")
    where = f"group {index}, index {position}"
    return f"param {show(names[position])} ({where})" if names and position < len(names) else f"param ({where})"
