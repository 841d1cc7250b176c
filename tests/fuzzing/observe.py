"""What there is before and after: bytes of tensors, and the structure of an optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tests.fuzzing.junk import Float, Int, Text


class Broken(Exception):
    """The package broke its promise."""


def storage_bytes(tensor: Tensor) -> Tensor | None:
    """A copy of all the memory that a tensor is a view of; None where it has none that can be read."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            storage = tensor.untyped_storage()
            address = 0 if tensor._is_zerotensor() else torch._C._data_address(tensor)
        if storage.device.type != "cpu" or (address == 0 and storage.nbytes() > 0 and tensor.numel() > 0):
            return None
        return torch.empty(0, dtype=torch.uint8).set_(storage).clone()
    except (RuntimeError, NotImplementedError):
        return None


def is_readable(tensor: Any) -> bool:
    """Whether this is a plain CPU tensor within its memory, which torch can read without dying."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    plain = tensor.device.type == "cpu" and not tensor.is_quantized and not tensor.is_nested
    if not plain or torch._C._functorch.is_batchedtensor(tensor) or tensor._is_zerotensor():
        return False
    if tensor.numel() == 0:
        return True  # whatever its strides and offset say
    if torch._C._data_address(tensor) == 0:
        return False
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() < 10**6 and tensor.untyped_storage().nbytes() >= (last + 1) * tensor.itemsize


class Memory:
    """The bytes of the memory under some tensors, and how these show it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.seen = [(tensor, shown(tensor), storage_bytes(tensor)) for tensor in tensors]

    def assert_unchanged(self, what: str) -> None:
        for tensor, before, content in self.seen:
            if shown(tensor) != before:
                raise Broken(f"{what}: a tensor has changed from {before} to {shown(tensor)}")
            now = storage_bytes(tensor)
            if content is not None and (now is None or not torch.equal(now, content)):
                raise Broken(f"{what}: the memory of {before} has changed")


def shown(tensor: Tensor) -> tuple[Any, ...]:
    with torch._C.DisableTorchFunctionSubclass():
        kind = (type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad)
        try:
            version = -1 if tensor.is_inference() else tensor._version
            return (*kind, version, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        except (RuntimeError, NotImplementedError):
            return kind


def tensors_of(value: Any, depth: int = 0) -> list[Tensor]:
    """The tensors in nested plain containers."""
    if isinstance(value, Tensor):
        return [value]
    if depth > 4:
        return []
    if isinstance(value, dict):
        return [tensor for item in dict.values(value) for tensor in tensors_of(item, depth + 1)]
    if type(value) in (list, tuple):
        return [tensor for item in value for tensor in tensors_of(item, depth + 1)]
    return []


def label(value: Any) -> Any:
    """What is compared of a value that is no tensor. Where comparing may run code: identity."""
    if type(value) in (int, float, bool, str, type(None), Int, Float, Text, torch.dtype):
        return repr(value)
    if type(value) in (list, tuple):
        return [(type(value), id(item), label(item) if type(item) in (int, float) else None) for item in value]
    return id(value)


class Snapshot:
    """All that a refusal must leave as it is."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.groups = [(id(group), structure(group)) for group in optimizer.param_groups]
        self.state = {id(owner): copied(items) for owner, items in optimizer.state.items()}
        self.owners = list(optimizer.state)  # so that no id is used again
        self.defaults = structure(optimizer.defaults)
        self.numbers = numbers_of(optimizer)
        params = params_of(optimizer)
        grads = [grad for grad in map(grad_of, params) if grad is not None]
        self.memory = Memory(
            [*params, *grads, *tensors_of([list(dict.values(group)) for group in groups_of(optimizer)])]
        )
        self.state_memory = Memory(tensors_of([list(dict.values(items)) for items in dicts(optimizer.state.values())]))

    def assert_unchanged(self) -> None:
        groups = [(id(group), structure(group)) for group in self.optimizer.param_groups]
        if groups != self.groups:
            raise Broken(f"param groups have changed: {difference(self.groups, groups)}")
        if structure(self.optimizer.defaults) != self.defaults:
            raise Broken("defaults have changed")
        self.memory.assert_unchanged("params, gradients and hyperparameters")
        self.state_memory.assert_unchanged("state")
        state = {id(owner): items for owner, items in self.optimizer.state.items()}
        if state.keys() != self.state.keys():
            raise Broken(f"state has come or gone: {len(self.state)} entries, now {len(state)}")
        for owner, items in state.items():
            compare_state(self.state[owner], items)
        if numbers_of(self.optimizer) != self.numbers:
            raise Broken(f"grad_norm or skipped_steps has changed: {self.numbers} to {numbers_of(self.optimizer)}")


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    return dicts(optimizer.param_groups)


def dicts(values: Iterable[Any]) -> list[dict[Any, Any]]:
    return [value for value in values if isinstance(value, dict)]


def params_of(optimizer: Any) -> list[Tensor]:
    lists = [dict.get(group, "params") for group in groups_of(optimizer)]
    return [param for params in lists if type(params) is list for param in params if isinstance(param, Tensor)]


def grad_of(param: Tensor) -> Tensor | None:
    with torch._C.DisableTorchFunctionSubclass():
        return param.grad if param.is_leaf or param.retains_grad else None


def structure(group: Any) -> Any:
    return {key: label(value) for key, value in dict.items(group)} if isinstance(group, dict) else id(group)


def copied(items: Any) -> Any:
    """A param's state, to be compared by value: a step that is refused may have brought equal values into form."""
    if not isinstance(items, dict):
        return id(items)
    return {key: value.detach().clone() if is_readable(value) else value for key, value in dict.items(items)}


def compare_state(before: Any, items: Any) -> None:
    if not isinstance(items, dict) or not isinstance(before, dict):
        if before != id(items):
            raise Broken("the state of a param is another object")
        return
    keys = dict.keys(items)
    if before.keys() != keys:
        raise Broken(f"state keys have changed from {list(before)} to {list(keys)}")
    for key, old in before.items():
        new = dict.__getitem__(items, key)
        if new is old or (is_readable(old) and is_readable(new) and same_values(old, new)):
            continue
        if key == "step" and is_number(old) and is_readable(new) and new.numel() == 1 and float(old) == new.item():
            continue
        if not isinstance(old, Tensor) and label(old) == label(new):
            continue
        raise Broken(f"state {key!r} has changed from {old} to {new}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (is_readable(value) and value.numel() == 1)


def same_values(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return a.numel() == b.numel() == 1 and not a.is_complex() and a.item() == b.item()
    a, b = a.detach(), b.detach()
    kind = torch.complex128 if a.is_complex() else torch.float64
    return torch.equal(torch.nan_to_num(a.to(kind), 123.0), torch.nan_to_num(b.to(kind), 123.0))


def numbers_of(optimizer: Any) -> tuple[str, ...]:
    found = []
    for name in ("grad_norm", "skipped_steps"):
        try:
            found.append(repr(getattr(optimizer, name)))
        except Exception as error:  # groups may be spoilt
            found.append(type(error).__name__)
    return tuple(found)


def difference(before: Any, after: Any) -> str:
    if len(before) != len(after):
        return f"{len(before)} groups, now {len(after)}"
    for (_, old), (_, new) in zip(before, after, strict=True):
        if isinstance(old, dict) and isinstance(new, dict):
            for key in {**old, **new}:
                if old.get(key, ...) != new.get(key, ...):
                    return f"{key!r} from {old.get(key, 'missing')} to {new.get(key, 'missing')}"
    return "a group is another object"
