"""Loading the state of one parameter from a state dict, whole or not at all."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamw_ext import _C
from adamw_ext.memory import WHY_NOT_WRITTEN, check_may_read, is_plain, laid_out_copy, may_write, within_storage
from adamw_ext.messages import show
from adamw_ext.sharded import like, narrowed, part, part_of_loaded, parts
from adamw_ext.state import (
    MASTERS,
    MOMENTS,
    converted_master,
    describe,
    is_master,
    is_moment,
    is_step,
    kept_moment_dtype,
    new_step,
    runs_in_kernel,
    step_device,
    wanted_master,
    wanted_moment_dtype,
)


class Carried:
    """A tensor on its way through torch's ``load_state_dict``, which casts every tensor it sees to the param's dtype
    (pytorch#75224) and may alias it to the dict that is being loaded."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def carry_tensors(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook: the same dict with the params' tensors as :class:`Carried`.

    Raises:
        ValueError: it has not the shape of a state dict, of which torch's method would make an error without words.
    """
    check_is_state_dict(state_dict)
    carried = {
        index: {key: Carried(value) if isinstance(value, Tensor) else value for key, value in items.items()}
        if isinstance(items, dict)
        else items
        for index, items in state_dict["state"].items()
    }
    return {**state_dict, "state": carried}


def check_is_state_dict(state_dict: Any) -> None:
    state = state_dict.get("state") if isinstance(state_dict, dict) else None
    if not isinstance(state, dict):
        found = describe(state_dict) if not isinstance(state_dict, dict) else f"one with {show(list(state_dict))}"
        raise ValueError(f"a state dict must be a dict with a dict 'state', but is {found}")
    groups = state_dict.get("param_groups")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"'param_groups' of a state dict must be a list, but is {describe(groups)}")
    for index, group in enumerate(groups):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, (list, tuple)) or not all(isinstance(number, Hashable) for number in params):
            raise ValueError(
                f"group {index} of a state dict must be a dict with a list of numbers 'params', not {describe(group)}"
            )


class StateLoad:
    """Loads into one param's state, in two steps so that a refusal leaves everything as it was.

    Making one checks every loaded item; :meth:`apply` then returns the new state. A tensor that exists already with the
    same shape, dtype and device receives the values and keeps its address; others are copies, so that nothing is shared
    with the dict that was loaded.

    Args:
        existing: the param's state now.
        live: data pointers of all storages of the optimizer's state now. Loaded values that lie there are copied
            before any state is overwritten.

    Raises:
        ValueError: naming parameter and key, what was expected and what came.
    """

    def __init__(
        self, param: Tensor, name: str, group: dict[str, Any], loaded: Any, existing: dict[str, Any], live: set[int]
    ) -> None:
        if not isinstance(loaded, dict):
            raise ValueError(f"loaded state of {name} must be a dict, but is {describe(loaded)}")
        self._whole_param = param
        self._param = part(param)
        self._whole_existing = existing
        self._existing = parts(existing)
        self._device = step_device(param, group)
        self._moment_dtype = wanted_moment_dtype(param, group)
        self._loaded = {key: value.tensor if isinstance(value, Carried) else value for key, value in loaded.items()}
        for key in (*MOMENTS, *MASTERS):
            if isinstance(self._loaded.get(key), Tensor):
                self._loaded[key] = part_of_loaded(self._loaded[key], param, f"loaded state {key!r} of {name}")
        if isinstance(self._loaded.get("param_remainder"), Tensor):
            self._loaded["param_remainder"] = narrowed(self._loaded["param_remainder"])
        param, existing = self._param, self._existing
        self._existing = {k: v for k, v in existing.items() if not isinstance(v, Tensor) or self._may_fill(v)}
        if self._loaded and not is_step(self._loaded.get("step"), param):
            found = describe(self._loaded.get("step", "missing"))
            raise ValueError(f"loaded state 'step' of {name} must be a whole number of updates, but is {found}")
        for key in MOMENTS:
            if key in self._loaded and not is_moment(self._loaded[key], param):
                raise ValueError(
                    f"loaded state {key!r} of {name} must be {describe(param)} (any floating point precision), "
                    f"but is {describe(self._loaded[key])}"
                )
        self._master = wanted_master(param, group)
        if self._master is not None:
            check_may_read(param, name)
        if MASTERS.keys() <= self._loaded.keys():  # as torch.distributed adds a whole one to what is here already
            raise ValueError(
                f"loaded state of {name} must have one master, but has both {' and '.join(map(repr, MASTERS))}: "
                "adamw_ext.checkpoint loads what was saved with other master_weights"
            )
        for key in MASTERS:
            if key not in self._loaded:
                continue
            value = self._loaded[key]
            if self._master is None:
                raise ValueError(
                    f"loaded state {key!r} of {name} is a master weight, but master_weights of its group is "
                    f"{group.get('master_weights')!r} and its dtype {param.dtype}"
                )
            if not is_master(value, param, key):
                raise ValueError(
                    f"loaded state {key!r} of {name} must be a {MASTERS[key]} tensor of shape {tuple(param.shape)}, "
                    f"but is {describe(value)}"
                )
        for key, value in self._loaded.items():
            if isinstance(value, Tensor):
                check_may_read(part(value), f"loaded state {key!r} of {name}")
        for key, value in self._loaded.items():
            shared = isinstance(value, Tensor) and _storage_address(value) in live
            if shared and value is not existing.get(key):
                self._loaded[key] = value.clone()
        if "master_param" in self._loaded and param.dtype == torch.bfloat16 and not may_write(param):
            raise ValueError(f"{name} cannot be set to its master: {WHY_NOT_WRITTEN}")
        self._loaded = {key: self._readied(key, value) for key, value in self._loaded.items()}

    def _may_fill(self, existing: Tensor) -> bool:
        return may_write(existing) and (is_plain(existing) or not runs_in_kernel(self._param))

    def _readied(self, key: str, value: Any) -> Any:
        """A loaded item that can be copied without an error: code of a tensor subclass may raise one, here at last."""
        if key == "step":
            return new_step(value, self._device)
        if not isinstance(value, Tensor):
            return value
        if key in MOMENTS:
            return made_plain(value, self._param, self._dtype_of(value))
        if key in MASTERS:
            return made_plain(value, self._param, MASTERS[key])
        # A key that is not ours: torch's rule.
        dtype = self._param.dtype if self._param.is_floating_point() else value.dtype
        return value.to(device=self._param.device, dtype=dtype, copy=True)

    def _dtype_of(self, moment: Tensor) -> torch.dtype:
        return self._moment_dtype or kept_moment_dtype(self._param, moment)

    def apply(self) -> dict[str, Any]:
        """The new state; writes into tensors of the existing one."""
        state = {key: self._load(key, value) for key, value in self._loaded.items() if key not in MASTERS}
        if self._master is not None and self._loaded:
            state[self._master] = self._load_master(self._master)
        return {key: self._placed(key, value) for key, value in state.items()}

    def _placed(self, key: str, value: Any) -> Any:
        """A tensor of the state, placed as the param: the existing one, where the value was written into its part."""
        if key not in (*MOMENTS, *MASTERS):
            return value
        existing = self._whole_existing.get(key)
        return existing if part(existing) is value else like(self._whole_param, value)

    def _load_master(self, key: str) -> Tensor:
        value = self._loaded[key] if key in self._loaded else converted_master(self._param, self._loaded, key)
        if "master_param" in self._loaded and self._param.dtype == torch.bfloat16:
            _show_master(self._param, self._loaded["master_param"])
        existing = self._existing.get(key)
        if is_master(existing, self._param, key) and within_storage(existing):
            return existing.copy_(value)
        return laid_out_copy(value, self._param, MASTERS[key])

    def _load(self, key: str, value: Any) -> Any:
        existing = self._existing.get(key)
        if key == "step":
            return _into(existing, value)
        if key in MOMENTS:
            dtype = self._dtype_of(value)
            if (
                isinstance(existing, Tensor)
                and (existing.dtype, existing.shape) == (dtype, value.shape)
                and (not runs_in_kernel(self._param) or within_storage(existing))
            ):
                return existing.copy_(value)
            return laid_out_copy(value, self._param, dtype)
        return value


def _into(existing: Any, value: Tensor) -> Tensor:
    if isinstance(existing, Tensor) and (existing.shape, existing.dtype) == (value.shape, value.dtype):
        return existing.copy_(value)
    return value


def made_plain(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The value itself where it is plain; else a copy, laid out as the param.

    Raises:
        ValueError: it has no numbers.
    """
    if is_plain(value):
        return value
    copy = laid_out_copy(value, param, dtype)
    if runs_in_kernel(param) and not is_plain(copy):
        raise ValueError(f"a {torch.typename(value)} has no numbers that could be copied")
    return copy


def _show_master(param: Tensor, master: Tensor) -> None:
    """A bfloat16 param that shows its master rounded half to even, as others round, is made to show it as ``split``
    does: the two are equally near."""
    high, _ = _C.split_master(master)
    shown = param.detach().cpu()
    is_rounded_to_even = shown == master.cpu().to(param.dtype)
    param.detach().copy_(torch.where(is_rounded_to_even, high, shown))


def storage_addresses(states: Iterable[Any]) -> set[int]:
    """Where the tensors of these per-param states keep their memory."""
    values = (part(value) for state in states if isinstance(state, dict) for value in state.values())
    return {_storage_address(value) for value in values if isinstance(value, Tensor)} - {0}


def _storage_address(tensor: Tensor) -> int:
    """0 for tensors without memory of their own: subclasses that wrap others, meta tensors."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
