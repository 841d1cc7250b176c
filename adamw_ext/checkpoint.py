"""State dicts in one common form: out of and into every mode of this optimizer, and from other libraries.

The common form is torch.optim.AdamW's state dict in float32, with one more key for a param that has a master.

>>> torch.save(checkpoint.export_float32(optimizer), path)
>>> checkpoint.import_float32(other, torch.load(path))  # whatever its options
>>> checkpoint.import_float32(other, checkpoint.from_apex(torch.load(path_of_apex)))
"""

import copy
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamw_ext import _C
from adamw_ext.memory import WHY_NOT_WRITTEN, may_read, may_write
from adamw_ext.options import STORAGE_OPTIONS, check_options, param_name
from adamw_ext.sharded import like, narrowed, part, part_of_loaded, parts
from adamw_ext.state import (
    MASTERS,
    MOMENTS,
    describe,
    is_master,
    is_moment,
    is_step,
    to_float,
    wanted_master,
    wanted_moment_dtype,
)
from adamw_ext.state_load import made_plain

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}
_LOADED = "loaded state dict"


@torch.no_grad()
def export_float32(optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """The optimizer's state dict in the common form, whatever its options.

    Per param, as copies on the CPU (of sharded params: DTensors placed as they are): ``step`` (0-d float32),
    ``exp_avg``, ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq`` (float32 for 16-bit moments, others as wide as they
    are), and for a param with a master ``master_param``: float32, the number that the next step starts from. A param
    without a master is itself that number, and is not in the dict: save the model's weights beside it.

    The groups have all hyperparameters, also ``seed`` and ``max_grad_norm``. ``master_weights``, ``moment_dtype`` and
    ``stochastic_rounding`` are left out: they say how the source stored what is float32 here.

    torch.optim.AdamW loads the dict. Its ``load_state_dict`` carries masters along without using or updating them;
    :func:`import_float32` sets its params to them instead.

    Args:
        optimizer: an :class:`adamw_ext.AdamW` or a torch.optim.AdamW.

    Returns:
        Plain tensors and containers, for ``torch.load(weights_only=True)``. Nothing is shared with the optimizer.
    """
    exported = optimizer.state_dict()
    state = dict(exported["state"])
    for group, saved in zip(optimizer.param_groups, exported["param_groups"], strict=True):
        for param, number in zip(group["params"], saved["params"], strict=True):
            if state.get(number):
                state[number] = _widened(param, group, state[number])
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in STORAGE_OPTIONS}
        for group in exported["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


@torch.no_grad()
def import_float32(optimizer: torch.optim.AdamW, state_dict: dict[str, Any]) -> None:
    """Load a state dict of the common form, whatever the options of this optimizer and of the one it comes from.

    Moments become what ``moment_dtype`` says, else of the param's dtype, rounded to nearest; to keep wider ones beside
    a 16-bit param, set ``moment_dtype`` or use ``load_state_dict``. Masters become what ``master_weights`` says.

    A param with a master in the dict is set to it, so load the model's weights before: to the master itself where the
    param is float32 or wider, else to the nearest value, ties away from zero to bfloat16, as ``master_weights`` shows
    masters. A param without a master in the dict stays as it is, and a master of it starts from there.

    An optimizer with the source's options gets back params, state and next steps bit for bit. All else is as
    ``load_state_dict``, which this calls.

    Args:
        optimizer: an :class:`adamw_ext.AdamW` or a torch.optim.AdamW.
        state_dict: from :func:`export_float32` or a function named ``from_``, or torch.optim.AdamW's own.

    Raises:
        ValueError: the dict does not fit: another number of groups or params, a key that is missing, or a value of
            another shape, dtype or range. It names the key and its group or param, what was expected and what was
            found. Nothing has changed then.
    """
    state, groups = _parts(_LOADED, state_dict)
    _check_count(_LOADED, "param_groups", "", groups, optimizer.param_groups)
    fitted, masters = dict(state), []
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        _check_hyperparameters(_LOADED, index, saved)
        numbers = {key: value for key, value in saved.items() if key not in STORAGE_OPTIONS}
        check_options(numbers, f" in group {index} of the {_LOADED}")
        _check_count(_LOADED, "params", f" of group {index}", saved["params"], group["params"])
        for position, (param, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if state.get(number):
                name = param_name(group, index, position)
                _check_items(param, name, state[number], amsgrad=bool(saved.get("amsgrad")))
                fitted[number] = _fitted(param, group, state[number])
                if "master_param" in state[number]:
                    if not may_write(part(param)):
                        raise ValueError(f"{name} cannot be set to its master: {WHY_NOT_WRITTEN}")
                    whole = state[number]["master_param"]
                    master = part_of_loaded(whole, param, f"{_LOADED}: 'master_param' of {name}")
                    masters.append((param, made_plain(master, part(param), torch.float32)))
    optimizer.load_state_dict({**state_dict, "state": fitted})
    for param, master in masters:
        own = part(param)
        own.copy_(_C.split_master(master)[0] if param.dtype == torch.bfloat16 else master)
        torch.autograd.graph.increment_version([param])


@dataclass(frozen=True)
class _Layout:
    """How another library keeps what we keep.

    ``keys``: its key, and our key and the dtypes that may be there. ``optional``: its keys that may be missing.
    ``step_in_group``: updates are counted by the group, for all of its params, and not by each param.
    """

    source: str
    keys: dict[str, tuple[str, tuple[torch.dtype, ...]]]
    optional: tuple[str, ...] = ()
    step_in_group: bool = True


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_APEX = _Layout(
    "state dict of apex FusedAdam", {"exp_avg": ("exp_avg", _FLOATS), "exp_avg_sq": ("exp_avg_sq", _FLOATS)}
)
_TRANSFORMER_ENGINE = _Layout(
    "state dict of TransformerEngine FusedAdam",
    {
        "exp_avg": ("exp_avg", (torch.float32,)),
        "exp_avg_sq": ("exp_avg_sq", (torch.float32,)),
        "master_param": ("master_param", (torch.float32, torch.int16)),
    },
    optional=("master_param",),
)
_BITSANDBYTES = _Layout(
    "state dict of bitsandbytes",
    {"state1": ("exp_avg", (torch.float32,)), "state2": ("exp_avg_sq", (torch.float32,))},
    step_in_group=False,
)
_BITSANDBYTES_NEST = "__bnb_optimizer_quant_state__"

# What a group must say, where it says it, for the update to be AdamW's; and what torch's own groups say besides.
_ADAMW = {
    "adam_w_mode": True,
    "bias_correction": True,
    "amsgrad": False,
    "maximize": False,
    "alpha": 0.0,
    "t_alpha": None,
    "t_beta3": None,
}
_TORCH = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def from_apex(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of apex.optimizers.FusedAdam in the common form.

    It has ``exp_avg`` and ``exp_avg_sq`` per param, float32 (of the param's dtype in old versions), and ``step`` per
    group, an int or a 1-element int32 tensor (capturable), missing before the first step: each param gets its group's.
    It does not have masters (``master_weights=True``), which apex makes anew from the params, as the first step here
    does; nor ``adam_w_mode``, so that a dict made with ``adam_w_mode=False``, L2 regularisation, cannot be told.

    Args:
        state_dict: what ``state_dict()`` gave. The result shares its tensors; loading copies them.

    Returns:
        A dict for :func:`import_float32`, or for ``load_state_dict``, which keeps the moments' dtype. ``lr`` (as a
        float), ``betas``, ``eps``, ``weight_decay`` and unknown keys of a group, such as ``initial_lr``, are taken
        over; torch's others have its defaults.

    Raises:
        ValueError: a key of a group or param is missing, unknown or not usable, or says that the update is not AdamW's
            (``bias_correction=False``). It names the source, the key, its group or the number of its param, what was
            expected and what was found.

    Source: github.com/NVIDIA/apex, apex/optimizers/fused_adam.py at f7fa414f and 004da4ed.
    """
    return _converted(_APEX, state_dict)


@torch.no_grad()
def from_transformer_engine(state_dict: dict[str, Any], params: Iterable[Tensor]) -> dict[str, Any]:
    """A state dict of transformer_engine.pytorch.optimizers.FusedAdam in the common form.

    As :func:`from_apex`, with float32 moments (TransformerEngine saves its scaled float16 and float8 states as float32)
    and with masters: ``master_param`` is float32, or int16 with ``store_param_remainders=True``: the low half of a
    master whose high half the param shows, as with our ``master_weights="split"``. The result has it in float32. A
    float32 param has a ``master_param`` as well, which is its initial value and is left out.

    Args:
        state_dict: what ``state_dict()`` gave. The result shares its tensors; loading copies them.
        params: what TransformerEngine updated, in the same order, with its dtypes and, for int16 masters, its values:
            from the model's weights that were saved with the dict, before any conversion to another dtype.

    Raises:
        ValueError: as :func:`from_apex`; also for another number of params, and for an int16 master of a param that is
            not bfloat16 or of another shape.

    Source: github.com/NVIDIA/TransformerEngine, transformer_engine/pytorch/optimizers/fused_adam.py at 04912bf0.
    """
    converted, params = _converted(_TRANSFORMER_ENGINE, state_dict), list(params)
    numbers = [number for group in converted["param_groups"] for number in group["params"]]
    _check_count(_TRANSFORMER_ENGINE.source, "params", " of all groups", numbers, params)
    for param, number in zip(params, numbers, strict=True):
        where = f" of param {describe(number)}"
        items = converted["state"].get(number, {})
        master = items.get("master_param")
        if master is None:
            continue
        if master.dtype == torch.int16:
            if param.dtype != torch.bfloat16 or param.shape != master.shape:
                expected, found = f"of a torch.bfloat16 param of shape {tuple(master.shape)}", f"of {describe(param)}"
                raise _error(_TRANSFORMER_ENGINE.source, "master_param", where, expected, found)
            items["master_param"] = _C.join_master(param, master)
        elif param.dtype not in (torch.bfloat16, torch.float16):
            del items["master_param"]
    return converted


def from_bitsandbytes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of bitsandbytes.optim.AdamW or AdamW32bit with 32-bit states in the common form.

    As :func:`from_apex`, but ``step`` is each param's, an int, and the moments are ``state1`` and ``state2``: beside
    ``step``, or in newer versions in a dict ``__bnb_optimizer_quant_state__``. 8-bit states are refused, and so is what
    only other optimizers and clipping have: a third beta, ``alpha``, ``unorm_vec``, ``gnorm_vec``.

    Source: dicts made with bitsandbytes 0.50.2 on a CPU; github.com/bitsandbytes-foundation/bitsandbytes,
    bitsandbytes/optim/optimizer.py at 06029dd6, for those before.
    """
    state, _ = _parts(_BITSANDBYTES.source, state_dict)
    flat = {
        number: {**{key: value for key, value in items.items() if key != _BITSANDBYTES_NEST}, **nested}
        if isinstance(items, dict) and isinstance(nested := items.get(_BITSANDBYTES_NEST), dict)
        else items
        for number, items in state.items()
    }
    return _converted(_BITSANDBYTES, {**state_dict, "state": flat})


def _converted(layout: _Layout, state_dict: dict[str, Any]) -> dict[str, Any]:
    state, groups = _parts(layout.source, state_dict)
    owners = {number: group for group in groups for number in group["params"]}
    converted = {}
    for number, items in state.items():
        if number not in owners:
            raise _error(layout.source, "state", "", "of params in a group", f"of param {describe(number)}, in none")
        if items:
            counter = owners[number] if layout.step_in_group else items
            converted[number] = _converted_items(layout, number, items, counter)
    return {"state": converted, "param_groups": [_converted_group(layout, *item) for item in enumerate(groups)]}


def _converted_items(layout: _Layout, number: Any, items: dict[str, Any], counter: dict[str, Any]) -> dict[str, Any]:
    """One param's state; ``counter`` has its ``step``."""
    where = f" of param {describe(number)}"
    if not is_step(counter.get("step"), torch.empty(0)):
        raise _error(layout.source, "step", where, "a whole number of updates", _found(counter, "step"))
    converted = {"step": torch.tensor(float(counter["step"]), dtype=torch.float32)}
    for key, (our_key, dtypes) in layout.keys.items():
        value = items.get(key)
        if isinstance(value, Tensor) and value.dtype in dtypes:
            converted[our_key] = value
        elif key in items or key not in layout.optional:
            raise _error(layout.source, key, where, f"a tensor of {' or '.join(map(str, dtypes))}", _found(items, key))
    known = [*layout.keys, *([] if layout.step_in_group else ["step"])]
    for key in sorted(items.keys() - known):
        raise _error(layout.source, key, where, f"absent (known are {', '.join(known)})", _found(items, key))
    return converted


def _converted_group(layout: _Layout, index: int, group: dict[str, Any]) -> dict[str, Any]:
    for key, expected in _ADAMW.items():
        if group.get(key, expected) != expected:
            raise _error(layout.source, key, f" of group {index}", f"{expected!r}, for AdamW", _found(group, key))
    _check_hyperparameters(layout.source, index, group)
    kept = {key: value for key, value in group.items() if key not in _ADAMW and key != "step"}
    return {**kept, **_TORCH, "lr": float(group["lr"])}


def _widened(param: Tensor, group: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """One param's state, copied to the CPU and into the common form."""
    own, kept = part(param), wanted_master(param, group)
    widened = {}
    for key, value in {"its own value": own if kept else None, **parts(items)}.items():
        if isinstance(value, Tensor) and not may_read(value):
            raise ValueError(f"{key!r} of a param of shape {tuple(param.shape)} has no memory: it was freed or resized")
    for key, value in parts(items).items():
        if key == "step":
            if to_float(value) is None:
                raise ValueError(
                    f"'step' of a param of shape {tuple(param.shape)} must be a number, but is {describe(value)}"
                )
            widened[key] = torch.tensor(float(value), dtype=torch.float32)
        elif key in MOMENTS:
            widened[key] = value.detach().to("cpu", _WIDER.get(value.dtype, value.dtype), copy=True)
        elif key not in MASTERS:
            widened[key] = copy.deepcopy(value)
    if kept is not None and kept in items:
        stored = part(items[kept])
        stored = narrowed(stored) if isinstance(stored, Tensor) else stored
        if not is_master(stored, own, kept):
            expected = f"a {MASTERS[kept]} tensor of its shape"
            raise ValueError(
                f"{kept!r} of a param of shape {tuple(param.shape)} must be {expected}, but is {describe(stored)}"
            )
        widened["master_param"] = _recalled(own, kept, made_plain(stored, own, MASTERS[kept]))
    return {key: like(param, value) if key in (*MOMENTS, "master_param") else value for key, value in widened.items()}


def _recalled(param: Tensor, key: str, value: Tensor) -> Tensor:
    """The master that the next step starts from, by the rule of recall in csrc/core/rounding.h: the stored one, unless
    someone has written another value into the param."""
    if key == "param_remainder":
        return _C.join_master(param, value)
    stored, shown = value.to("cpu", copy=True), param.detach().cpu()
    if param.dtype == torch.bfloat16:
        return _C.join_master(shown, stored.view(torch.int32).short())
    is_shown = stored.to(param.dtype).view(torch.int16) == shown.view(torch.int16)
    return torch.where(is_shown, stored, shown.float())


def _fitted(param: Tensor, group: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """One param's state as ``load_state_dict`` keeps it. Copies, because torch's keeps the very tensors."""
    dtype = wanted_moment_dtype(param, group) or param.dtype
    fitted = {key: value.to(dtype, copy=True) if key in MOMENTS else value for key, value in items.items()}
    fitted["step"] = torch.tensor(float(items["step"]), dtype=torch.float32)
    if wanted_master(param, group) is None:
        fitted.pop("master_param", None)
    return fitted


def _check_items(param: Tensor, name: str, items: dict[str, Any], *, amsgrad: bool) -> None:
    where = f" of {name}"
    if not is_step(items.get("step"), param):
        raise _error(_LOADED, "step", where, "a whole number of updates", _found(items, "step"))
    for key in MOMENTS if amsgrad or "max_exp_avg_sq" in items else MOMENTS[:2]:
        if not is_moment(items.get(key), param):
            expected = f"{describe(param)} (of any floating point precision and device)"
            raise _error(_LOADED, key, where, expected, _found(items, key))
    for key in (*MOMENTS, "master_param"):
        value = items.get(key)
        if isinstance(value, Tensor) and not may_read(part(value)):
            raise _error(_LOADED, key, where, "readable", "without memory: its storage was freed or resized")
    takes_master = param.is_floating_point() and is_master(items.get("master_param"), param, "master_param")
    if "master_param" in items and not takes_master:
        expected = f"a torch.float32 tensor of shape {tuple(param.shape)} beside a real param"
        raise _error(_LOADED, "master_param", where, expected, _found(items, "master_param"))
    if "param_remainder" in items:
        expected = "joined with its param to 'master_param', by export_float32"
        raise _error(_LOADED, "param_remainder", where, expected, _found(items, "param_remainder"))


def _check_hyperparameters(source: str, index: int, group: dict[str, Any]) -> None:
    where = f" of group {index}"
    for key in ("lr", "eps", "weight_decay"):
        if not _is_number(group.get(key)):
            raise _error(source, key, where, "a number that is not negative", _found(group, key))
    betas = group.get("betas")
    is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not is_pair or not all(_is_number(beta) and float(beta) < 1.0 for beta in group["betas"]):
        raise _error(source, "betas", where, "two numbers in [0, 1)", _found(group, "betas"))


def _parts(source: str, state_dict: Any) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The state and the groups of a state dict that has the shape of one."""
    if not isinstance(state_dict, dict):
        raise ValueError(f"{source}: must be a dict with 'state' and 'param_groups', but is {describe(state_dict)}")
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, dict):
        raise _error(source, "state", "", "a dict", _found(state_dict, "state"))
    if not isinstance(groups, list):
        raise _error(source, "param_groups", "", "a list of dicts", _found(state_dict, "param_groups"))
    for number, items in state.items():
        if not isinstance(items, dict):
            raise _error(source, "state", f" of param {describe(number)}", "a dict", describe(items))
    for index, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise _error(source, "params", f" of group {index}", "a list of numbers", _found(group, "params"))
    return state, groups


def _check_count(source: str, key: str, where: str, found: Sized, expected: Sized) -> None:
    if len(found) != len(expected):
        raise _error(source, key, where, f"of length {len(expected)}", f"of length {len(found)}")


def _is_number(value: Any) -> bool:
    number = to_float(value)
    return number is not None and 0.0 <= number < float("inf")


def _error(source: str, key: str, where: str, expected: str, found: str) -> ValueError:
    return ValueError(f"{source}: {describe(key)}{where} must be {expected}, but is {found}")


def _found(items: Any, key: str) -> str:
    if not isinstance(items, dict):
        return f"in {describe(items)}"
    return describe(items[key]) if key in items else f"missing: there are {', '.join(map(describe, items))}"
