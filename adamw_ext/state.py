"""The state of one parameter: how it is created and brought into shape.

Per parameter: ``step`` (0-d float32, how many updates were made; on the param's device if capturable or fused, else on
the CPU), ``exp_avg`` and ``exp_avg_sq`` (as the param, or of the group's ``moment_dtype``), and with
amsgrad ``max_exp_avg_sq`` (as ``exp_avg``). These keys are torch.optim.AdamW's, so state dicts go both ways. A bfloat16
or float16 param has with ``master_weights`` one more: ``master_param`` (float32) or ``param_remainder`` (int16).
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor

from adamw_ext import _C
from adamw_ext.memory import is_nested, laid_out_as, laid_out_copy, may_go_into, may_read, within_storage
from adamw_ext.messages import show
from adamw_ext.sharded import describe as describe_sharded
from adamw_ext.sharded import is_sharded, like, part, parts

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTERS = {"master_param": torch.float32, "param_remainder": torch.int16}

_MASTER_KEYS = {"fp32": "master_param", "split": "param_remainder"}

_KERNEL_DEVICES = ("cpu", "cuda") if _C.cuda_kernels else ("cpu",)
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64, torch.float16: torch.complex32}
# What a param of a dtype, kept so, may have: (moments, rounding).
_COMBINATIONS = {(getattr(torch, param), getattr(torch, moments)) for param, moments, _, _ in _C.combinations()}


def runs_in_kernel(param: Tensor) -> bool:
    """Whether a hand-written kernel updates this param: strided memory of the CPU, or of a CUDA device where this build
    has kernels for it, that belongs to no tensor subclass, or is the part of a DTensor in this process."""
    param = part(param)
    return (
        param.device.type in _KERNEL_DEVICES
        and param.layout == torch.strided
        and not param.is_quantized
        and not param.is_nested
        and not torch._C._dispatch_keys(param).has(torch._C.DispatchKey.Python)
    )


def new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Zeros, in the param's own memory layout, and placed as it is."""
    if is_nested(param):
        raise RuntimeError("a nested tensor can have no state")
    dtype = wanted_moment_dtype(param, group) or param.dtype
    own = part(param)
    if (own.is_conj() or own.is_neg()) and not may_read(own):  # zeros_like reads what is lazy
        raise RuntimeError(f"a param of shape {tuple(param.shape)} has no memory: its storage was freed or resized")
    made = {
        key: torch.zeros_like(own, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        for key in (MOMENTS if group["amsgrad"] else MOMENTS[:2])
    }
    if key := wanted_master(param, group):
        made[key] = new_master(own, key)
    step = torch.zeros((), dtype=torch.float32, device=step_device(param, group))
    return {"step": step, **{key: like(param, value) for key, value in made.items()}}


def wanted_master(param: Tensor, group: dict[str, Any]) -> str | None:
    """The state key of the param's master; None where it has none, because of its group or because it is wider than 16
    bits and so its own.

    Raises:
        ValueError: no kernel keeps such a master for this param.
    """
    mode = group.get("master_weights")
    if mode is None or param.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return None
    if mode not in ("fp32", "split"):
        raise ValueError(f"master_weights must be 'fp32', 'split' or None, but is {describe(mode)}")
    takes = (torch.bfloat16, torch.float16) if mode == "fp32" else (torch.bfloat16,)
    if param.dtype in takes and runs_in_kernel(param):
        return _MASTER_KEYS[mode]
    raise ValueError(
        f"master_weights={mode!r} has no kernel for a {param.dtype} param on {param.device} "
        f"of type {torch.typename(param)}"
    )


def new_master(param: Tensor, key: str) -> Tensor:
    """A master that is the param's present value."""
    if not within_storage(param):
        raise RuntimeError(f"a master cannot be made of {describe(param)}: its storage was freed or resized")
    if key == "param_remainder":
        return torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format, requires_grad=False)
    return laid_out_copy(param.detach(), param, torch.float32)


def wanted_moment_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype | None:
    """What ``moment_dtype`` says for this param, None where it says nothing.

    Raises:
        ValueError: no kernel updates such a param with such moments.
    """
    wanted = group.get("moment_dtype")
    if wanted is None:
        return None
    dtype = _COMPLEX.get(wanted) if param.is_complex() else wanted
    if dtype == param.dtype or (runs_in_kernel(param) and (param.dtype, dtype) in _COMBINATIONS):
        return dtype
    raise ValueError(
        f"moment_dtype={describe(wanted)} has no kernel for a {param.dtype} param on {param.device} "
        f"of type {torch.typename(param)}"
    )


def misfits(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[str]:
    """The keys that :func:`conform_state` would replace."""
    param, state = part(param), parts(state)
    step = state.get("step")
    wanted = (torch.float32, 0, step_device(param, group))
    fits = isinstance(step, Tensor) and (step.dtype, step.dim(), step.device) == wanted
    keys = ["step"] if to_float(step) is not None and not fits else []
    for key in MOMENTS:
        moment = state.get(key)
        if is_moment(moment, param) and within_storage(moment) and not laid_out_as(moment, param):
            keys.append(key)
    if master := wanted_master(param, group):
        value = state.get(master)
        misplaced = is_master(value, param, master) and within_storage(value) and not laid_out_as(value, param)
        if value is None or misplaced:
            keys.append(master)
    return keys


def conform_state(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Bring equal values into the form that the kernel takes: a float32 ``step`` where the group's flags have it,
    moments and master laid out as the param, and the master that ``master_weights`` asks for.

    Other shapes and dtypes are left alone, for the kernel's checks to refuse.
    """
    own, present = part(param), parts(state)
    for key in misfits(param, state, group):
        value = present.get(key)
        if key == "step":
            state[key] = new_step(value, step_device(param, group))
        elif value is None:
            state[key] = like(param, converted_master(own, present, key))
        else:
            state[key] = like(param, laid_out_copy(value, own, value.dtype))


def drop_other_masters(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Remove masters in a form that the group no longer asks for. Once a step has run on the form that it asks for, or
    on the param, they would be stale."""
    for key in MASTERS.keys() - {wanted_master(param, group)}:
        state.pop(key, None)


def converted_master(param: Tensor, state: dict[str, Any], key: str) -> Tensor:
    """The master under another key, in the form of this one; the param's present value where there is none."""
    master, remainder = state.get("master_param"), state.get("param_remainder")
    if key == "master_param" and is_master(remainder, param, "param_remainder"):
        return laid_out_copy(_whole_master(param, remainder), param, torch.float32)
    if key == "param_remainder" and is_master(master, param, "master_param"):
        return laid_out_copy(_C.split_master(master)[1], param, torch.int16)
    return new_master(param, key)


def _whole_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a param and its remainder. Its low 16 bits are the remainder in any case, so that a param
    whose value is loaded only later finds it there."""
    master = _C.join_master(param, remainder)
    rest = remainder.cpu().contiguous()
    beside = (param.detach().cpu().contiguous().view(torch.int16).int() << 16) | (rest.int() & 0xFFFF)
    return torch.where(master.view(torch.int32).short() == rest, master, beside.view(torch.float32))


def step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    return param.device if group["capturable"] or group["fused"] else torch.device("cpu")


def to_float(value: Any) -> float | None:
    """The number that a number or a 1-element tensor holds; None if it holds none that a float can be."""
    if not isinstance(value, (int, float, Tensor)) or (
        isinstance(value, Tensor) and (value.is_meta or not may_read(value))
    ):
        return None
    try:
        if isinstance(value, Tensor):
            return float(value.detach()) if value.numel() == 1 else None
        return float(value)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return None


def is_step(value: Any, param: Tensor) -> bool:
    if isinstance(value, Tensor) and value.is_meta and param.is_meta:
        return True
    number = to_float(value)
    return number is not None and number >= 0.0 and number.is_integer()


def is_moment(value: Any, param: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.shape == param.shape
        and value.layout == param.layout
        and value.is_complex() == param.is_complex()
        and (value.is_floating_point() or value.is_complex())
        and (param.is_meta or not value.is_meta)
        and may_go_into(part(value), part(param))
    )


def is_master(value: Any, param: Tensor, key: str) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and (value.shape, value.dtype, value.layout) == (param.shape, MASTERS[key], param.layout)
        and (param.is_meta or not value.is_meta)
        and may_go_into(part(value), part(param))
    )


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return show(value)
    if is_nested(value):
        return f"a nested {value.dtype} tensor"
    if is_sharded(value):
        return describe_sharded(value)
    layout = "" if value.layout == torch.strided else f" and layout {value.layout}"
    number = "" if (held := to_float(value)) is None else f" {held}"
    return f"a {value.dtype} tensor{number} of shape {tuple(value.shape)} on {value.device}{layout}"


def new_step(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor) and value.is_meta:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def kept_moment_dtype(param: Tensor, loaded: Tensor) -> torch.dtype:
    """The loaded dtype where a kernel takes it, else torch's rule: the param's."""
    keeps = runs_in_kernel(param) and (param.dtype, loaded.dtype) in _COMBINATIONS
    return loaded.dtype if keeps else param.dtype
