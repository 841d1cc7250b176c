"""How many bytes a mode keeps for each parameter, counted in the memory that it holds, and what a step must move."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Rows = list[list[tuple[Tensor, bool]]]  # what buffers_floor takes: (buffer, is it written too?), one row a param


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with memory of their own in a state value: itself, or what a wrapper such as torchao's holds."""
    if not isinstance(value, Tensor):
        return
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    else:
        yield value


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """The sizes of all storages, each counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def memory(optimizer: Optimizer, params: list[Parameter]) -> dict[str, float]:
    """Bytes for each parameter by kind: "param", each state key, and "grad"."""
    numel = sum(param.numel() for param in params)
    kinds: dict[str, list[Tensor]] = {"param": [param.detach() for param in params]}
    for param in params:
        for key, value in optimizer.state[param].items():
            if tensors := list(plain_tensors(value)):
                kinds.setdefault(key, []).extend(tensors)
    kinds["grad"] = [param.grad for param in params if param.grad is not None]
    return {kind: stored_bytes(tensors) / numel for kind, tensors in kinds.items()}


def kept(per_param: dict[str, float]) -> float:
    """Params and state together; gradients apart, which some training loops free."""
    return sum(count for kind, count in per_param.items() if kind != "grad")


def moved(per_param: dict[str, float], *, clips: bool = False) -> float:
    """The least that one step moves: everything is read and all but the gradient written, and the gradient is read once
    more where its norm is taken first."""
    return 2 * kept(per_param) + (2 if clips else 1) * per_param["grad"]


def formula(per_param: dict[str, float], *, clips: bool = False) -> str:
    """:func:`moved`, spelt out; what has less than a hundredth of a byte for each parameter is left out."""
    kinds = {kind: count for kind, count in per_param.items() if count >= 0.005}

    def terms(names: Iterable[str]) -> str:
        return " + ".join(f"{name} {number(kinds[name])}" for name in names)

    again = f"read grad {number(kinds['grad'])}, then " if clips else ""
    return f"{again}read {terms(kinds)}; write {terms(kind for kind in kinds if kind != 'grad')}"


def number(count: float) -> str:
    return f"{count:.2f}".rstrip("0").rstrip(".")


def step_buffers(optimizer: Optimizer, params: list[Parameter]) -> Rows:
    """The memory that a step goes through, for a floor over the very same buffers. Tables that params share and single
    numbers are left out."""
    seen: set[int] = set()
    rows: Rows = []
    for param in params:
        assert param.grad is not None
        row = [(param.detach(), True), (param.grad, False)]
        for value in optimizer.state[param].values():
            for tensor in plain_tensors(value):
                if tensor.numel() > 1 and tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    row.append((tensor, True))
        rows.append(row)
    return rows


def gradient_buffers(params: list[Parameter]) -> Rows:
    return [[(param.grad, False)] for param in params if param.grad is not None]


def as_text(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.bfloat16: "bf16"}[dtype]
