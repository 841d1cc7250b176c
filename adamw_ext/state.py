"""The state of one parameter: how it is created, brought into shape, and loaded.

Per parameter: ``step`` (0-d float32, how many updates were made; on the param's device if capturable or fused, else on
the CPU), ``exp_avg`` and ``exp_avg_sq`` (as the param, or of the group's ``moment_dtype``), and with
amsgrad ``max_exp_avg_sq`` (as ``exp_avg``). These keys are torch.optim.AdamW's, so state dicts go both ways. A bfloat16
or float16 param has with ``master_weights`` one more: ``master_param`` (float32) or ``param_remainder`` (int16).
"""

from collections.abc import Hashable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamw_ext import _C
from adamw_ext.messages import show
from adamw_ext.sharded import describe as describe_sharded
from adamw_ext.sharded import is_sharded, like, narrowed, part, part_of_loaded, parts

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
    step = torch.zeros((), dtype=torch.float32, device=_step_device(param, group))
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
    if not _within_storage(param):
        raise RuntimeError(f"a master cannot be made of {describe(param)}: its storage was freed or resized")
    if key == "param_remainder":
        return torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format, requires_grad=False)
    return _laid_out_copy(param.detach(), param, torch.float32)


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
    wanted = (torch.float32, 0, _step_device(param, group))
    fits = isinstance(step, Tensor) and (step.dtype, step.dim(), step.device) == wanted
    keys = ["step"] if to_float(step) is not None and not fits else []
    for key in MOMENTS:
        moment = state.get(key)
        if is_moment(moment, param) and _within_storage(moment) and not _laid_out_as(moment, param):
            keys.append(key)
    if master := wanted_master(param, group):
        value = state.get(master)
        misplaced = is_master(value, param, master) and _within_storage(value) and not _laid_out_as(value, param)
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
            state[key] = _new_step(value, _step_device(param, group))
        elif value is None:
            state[key] = like(param, _converted_master(own, present, key))
        else:
            state[key] = like(param, _laid_out_copy(value, own, value.dtype))


def drop_other_masters(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Remove masters in a form that the group no longer asks for. Once a step has run on the form that it asks for, or
    on the param, they would be stale."""
    for key in MASTERS.keys() - {wanted_master(param, group)}:
        state.pop(key, None)


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


def _converted_master(param: Tensor, state: dict[str, Any], key: str) -> Tensor:
    """The master under another key, in the form of this one; the param's present value where there is none."""
    master, remainder = state.get("master_param"), state.get("param_remainder")
    if key == "master_param" and is_master(remainder, param, "param_remainder"):
        return _laid_out_copy(_whole_master(param, remainder), param, torch.float32)
    if key == "param_remainder" and is_master(master, param, "master_param"):
        return _laid_out_copy(_C.split_master(master)[1], param, torch.int16)
    return new_master(param, key)


def _whole_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a param and its remainder. Its low 16 bits are the remainder in any case, so that a param
    whose value is loaded only later finds it there."""
    master = _C.join_master(param, remainder)
    rest = remainder.cpu().contiguous()
    beside = (param.detach().cpu().contiguous().view(torch.int16).int() << 16) | (rest.int() & 0xFFFF)
    return torch.where(master.view(torch.int32).short() == rest, master, beside.view(torch.float32))


def _show(param: Tensor, master: Tensor) -> None:
    """A bfloat16 param that shows its master rounded half to even, as others round, is made to show it as ``split``
    does: the two are equally near."""
    high, _ = _C.split_master(master)
    shown = param.detach().cpu()
    is_rounded_to_even = shown == master.cpu().to(param.dtype)
    param.detach().copy_(torch.where(is_rounded_to_even, high, shown))


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
        self._device = _step_device(param, group)
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
            return _new_step(value, self._device)
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
        return self._moment_dtype or _kept_moment_dtype(self._param, moment)

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
        value = self._loaded[key] if key in self._loaded else _converted_master(self._param, self._loaded, key)
        if "master_param" in self._loaded and self._param.dtype == torch.bfloat16:
            _show(self._param, self._loaded["master_param"])
        existing = self._existing.get(key)
        if is_master(existing, self._param, key) and _within_storage(existing):
            return existing.copy_(value)
        return _laid_out_copy(value, self._param, MASTERS[key])

    def _load(self, key: str, value: Any) -> Any:
        existing = self._existing.get(key)
        if key == "step":
            return _into(existing, value)
        if key in MOMENTS:
            dtype = self._dtype_of(value)
            if (
                isinstance(existing, Tensor)
                and (existing.dtype, existing.shape) == (dtype, value.shape)
                and (not runs_in_kernel(self._param) or _within_storage(existing))
            ):
                return existing.copy_(value)
            return _laid_out_copy(value, self._param, dtype)
        return value


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


def _step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
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


def _new_step(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor) and value.is_meta:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def _kept_moment_dtype(param: Tensor, loaded: Tensor) -> torch.dtype:
    """The loaded dtype where a kernel takes it, else torch's rule: the param's."""
    keeps = runs_in_kernel(param) and (param.dtype, loaded.dtype) in _COMBINATIONS
    return loaded.dtype if keeps else param.dtype


def _into(existing: Any, value: Tensor) -> Tensor:
    if isinstance(existing, Tensor) and (existing.shape, existing.dtype) == (value.shape, value.dtype):
        return existing.copy_(value)
    return value


def _laid_out_copy(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    copy = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return copy.copy_(value)


def may_read(tensor: Tensor) -> bool:
    """Whether torch's own operations may read a tensor: they die of one whose storage was freed or cut short."""
    if is_nested(tensor) or has_leaked(tensor):
        return False
    try:
        return tensor.is_meta or tensor.layout != torch.strided or _within_storage(tensor)
    except (RuntimeError, NotImplementedError):  # a subclass that wraps others has none of its own
        return True


def check_may_read(tensor: Tensor, name: str) -> None:
    if not may_read(tensor):
        raise ValueError(f"{name} has no memory: its storage was freed or resized")


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its numbers, and reading it runs no code of a tensor subclass."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor._is_zerotensor():
        return False
    is_lazy = tensor.is_neg() or tensor.is_conj()
    return not is_lazy and not torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


def made_plain(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The value itself where it is plain; else a copy, laid out as the param.

    Raises:
        ValueError: it has no numbers.
    """
    if is_plain(value):
        return value
    copy = _laid_out_copy(value, param, dtype)
    if runs_in_kernel(param) and not is_plain(copy):
        raise ValueError(f"a {torch.typename(value)} has no numbers that could be copied")
    return copy


def is_nested(tensor: Tensor) -> bool:
    """Whether this is a nested tensor of torch's core, or the data of one of its subclass, put into a plain tensor by
    hand: of that, torch's operations die."""
    return tensor.is_nested and tensor.layout == torch.strided


def has_leaked(tensor: Tensor) -> bool:
    """Whether it belongs to a functorch transform that has ended: nothing can be done with it."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) and functorch.peek_interpreter_stack() is None


def may_go_into(value: Tensor, tensor: Tensor) -> bool:
    """Whether functorch can write what is made of a value into a tensor: not where the value alone belongs to one of
    its transforms. torch's update would fail halfway."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return wrapped(tensor) or not wrapped(value)


WHY_NOT_WRITTEN = (
    "it has no memory, is an inference tensor outside of InferenceMode, or more than one of its elements refers to a "
    "single memory location"
)


def may_write(tensor: Tensor) -> bool:
    """Whether values can be copied into a tensor that was made for state, whatever was done to it since."""
    if not may_read(tensor) or tensor._is_zerotensor():
        return False
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return tensor.is_meta or tensor.layout != torch.strided or tensor.is_contiguous() or is_dense(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether no two elements lie in one place, as far as the order of strides tells."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _within_storage(tensor: Tensor) -> bool:
    """False where the memory of a strided tensor has been freed or cut short."""
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()


def _laid_out_as(moment: Tensor, param: Tensor) -> bool:
    """Whether both put their elements in the same order; strides of dimensions of size 1 do not matter."""
    expected = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
    return all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(moment.shape, moment.stride(), expected, strict=True)
    )
