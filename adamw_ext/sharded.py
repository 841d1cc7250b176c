"""DTensors (torch.distributed.tensor): tensors of which each process holds a part.

FSDP2 and tensor parallelism make params DTensors. A step works on the parts that lie in this process, as on plain
tensors: the update is elementwise. Two things need the whole: the norm of the gradients, and the bits of stochastic
rounding, which belong to an element's place in the whole param.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

DTensor: TypeAlias = Any  # torch.distributed.tensor.DTensor, which is imported only by those who have some


class Member(NamedTuple):
    """A param as the stepper takes it: csrc/python/members.cpp.

    ``first_element`` and ``places`` (run, rows, stride, block_stride; see csrc/core/random.h) say where the elements
    that lie here are in the whole param. ``sum``: see :class:`SumsOfSquares`.
    """

    param: Tensor
    state: dict[str, Any] | None
    group: int
    name: str
    number: int
    first_element: int = 0
    places: tuple[int, int, int, int] | None = None
    sum: int = 0


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether this is a DTensor. Does not import them: none exists before somebody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def part(value: Any) -> Any:
    """The part of a DTensor that lies in this process; anything else as it is."""
    return value._local_tensor if is_sharded(value) else value


def parts(state: dict[str, Any]) -> dict[str, Any]:
    """A param's state, with parts in the place of DTensors."""
    return {key: part(value) for key, value in state.items()}


def like(param: Tensor, own: Tensor) -> Tensor:
    """A tensor whose part this is, placed as the param where that is a DTensor."""
    if not is_sharded(param):
        return own
    made: DTensor = _dtensors().DTensor.from_local(
        own, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return cast(Tensor, made)


def collectable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict in types that processes can exchange. Neither gloo nor NCCL moves int16, so remainders
    in DTensors become int32. torch.distributed refuses dtypes as values, so groups have a dtype's name."""
    state = {
        index: {key: _widened(value) for key, value in items.items()} if isinstance(items, dict) else items
        for index, items in state_dict["state"].items()
    }
    groups = [{key: _named(value) for key, value in group.items()} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def _named(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _widened(value: Any) -> Any:
    return value.to(torch.int32) if is_sharded(value) and value.dtype == torch.int16 else value


def narrowed(value: Tensor) -> Tensor:
    """An int32 remainder as int16; as it is, if it is none."""
    if value.dtype != torch.int32:
        return value
    narrow = value.to(torch.int16)
    return narrow if torch.equal(narrow.int(), value) else value


def part_of_loaded(value: Tensor, param: Tensor, what: str) -> Tensor:
    """The part of a tensor from a checkpoint that belongs beside the param's. A whole tensor is cut.

    Raises:
        ValueError: it is placed otherwise than the param.
    """
    if not is_sharded(param):
        if is_sharded(value):
            raise ValueError(
                f"{what} must be a plain tensor, as the param, but is {describe(value)}: see full_tensor()"
            )
        return value
    if not is_sharded(value):
        if value.shape != param.shape:
            raise ValueError(
                f"{what} must be placed as {describe(param)}, or whole, but has shape {tuple(value.shape)}"
            )
        return cut(value.to(param.device), param, param.placements)
    if (value.shape, value.placements, value.device_mesh) != (param.shape, param.placements, param.device_mesh):
        raise ValueError(
            f"{what} must be placed as {describe(param)}, but is {describe(value)}: torch.distributed.checkpoint loads "
            "what was saved for other processes"
        )
    return cast(Tensor, value._local_tensor)


def cut(whole: Tensor, param: DTensor, placements: Iterable[Any]) -> Tensor:
    """The part of a tensor that all processes have whole."""
    made = _dtensors().distribute_tensor(whole, param.device_mesh, tuple(placements), src_data_rank=None)
    return cast(Tensor, made._local_tensor)


def check_placement(param: Tensor, name: str) -> None:
    """Raise RuntimeError unless a DTensor has all that makes one, and its elements here are elements of the whole."""
    if not is_sharded(param):
        return
    own = getattr(param, "_local_tensor", None)
    if getattr(param, "_spec", None) is None or not isinstance(own, Tensor) or is_sharded(own):
        raise RuntimeError(f"{name} is a DTensor without a placement, or without a plain tensor as its part")
    if any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(f"{name} must be sharded or replicated, but is {describe(param)}: its parts are summands")


def place_grad(param: DTensor, grad: Tensor, name: str) -> DTensor:
    """The gradient, placed as the param: of params that all processes have, tensor parallelism leaves summands. A
    collective, as in torch's own optimizers.

    Raises:
        RuntimeError: it is no DTensor, or lies on other processes.
    """
    if not is_sharded(grad):
        raise RuntimeError(
            f"the gradient of {name}, {describe(param)}, must be a DTensor, but is a {type(grad).__name__}"
        )
    if grad.device_mesh != param.device_mesh or grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {name}, {describe(param)}, must lie on the same processes, but is {describe(grad)}"
        )
    with torch.no_grad():
        return grad.redistribute(placements=param.placements)


def placed_grad(param: Tensor, grad: Tensor, name: str) -> Tensor:
    """The gradient, of a DTensor placed as that."""
    if not is_sharded(param):
        return grad
    check_placement(param, name)
    is_placed = is_sharded(grad) and (grad.placements, grad.device_mesh) == (param.placements, param.device_mesh)
    return grad if is_placed else cast(Tensor, place_grad(param, grad, name))


def check_has_all_params() -> None:
    """Raise ValueError where ZeroRedundancyOptimizer makes an optimizer of this process's share of the params: it would
    clip by the norm of that share."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            raise ValueError(
                "max_grad_norm needs the gradients of all params, but ZeroRedundancyOptimizer gives each process a "
                "share of them: call torch.nn.utils.clip_grad_norm_ before the step instead"
            )
        frame = frame.f_back


class SumsOfSquares:
    """The sums that make up the square of the gradients' global norm.

    Sum 0 is of gradients that every process has whole. Those that are cut along the same dimensions of the same mesh
    share another sum, which :meth:`complete` adds up over the processes there: in the order of their ranks and with the
    same bits in each, whatever the backend.
    """

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number_of(self, param: Tensor) -> int:
        if not is_sharded(param):
            return 0
        mesh = param.device_mesh
        cuts = tuple(i for i, placement in enumerate(param.placements) if is_cut(placement) and mesh.size(i) > 1)
        return self._numbers.setdefault((mesh, cuts), len(self._numbers) + 1) if cuts else 0

    def complete(self, number: int, part: Tensor) -> Tensor:
        """The whole of a sum, a 0-d float64 tensor, from this process's part. A collective."""
        mesh, cuts = next(key for key, value in self._numbers.items() if value == number)
        for dimension in cuts:
            group = mesh.get_group(dimension)
            gathered = part.new_empty(mesh.size(dimension))
            torch.distributed.all_gather(list(gathered.split(1)), part.reshape(1), group=group)
            part = fold(gathered)
        return part


def fold(summands: Tensor) -> Tensor:
    """The sum of a 1-d tensor, the upper half added to the lower one until one is left."""
    while (count := len(summands)) > 1:
        half = (count + 1) // 2
        upper = torch.nn.functional.pad(summands[half:], (0, 2 * half - count))
        summands = summands[:half] + upper
    return summands[0]


def is_cut(placement: Any) -> bool:
    return not (placement.is_replicate() or placement.is_partial())


def elements_of(param: Tensor, name: str) -> tuple[int, tuple[int, int, int, int] | None]:
    """Where the elements that lie here are in the whole param, in memory order: ``first_element`` and ``places``.

    Raises:
        RuntimeError: they are scattered in more ways than ``places`` can say.
    """
    if not is_sharded(param) or param._local_tensor.numel() == 0:
        return 0, None
    own: Tensor = param._local_tensor
    if own.dim() != param.dim():
        raise RuntimeError(f"{name}, {describe(param)}, has a part of shape {tuple(own.shape)} in this process")
    ranges = [own_range(param, dimension) for dimension in range(param.dim())]
    levels = merge_levels(own, param.stride()) or [(1, 1)]
    if levels[0][1] != 1:  # neighbours here are none in the whole
        levels.insert(0, (1, 1))
    if [found and len(found) for found in ranges] != list(own.shape) or len(levels) > 3 or max(levels[:2])[0] >= 2**32:
        raise RuntimeError(
            f"stochastic rounding of {name}, {describe(param)}, is not possible: its elements in this process are "
            "scattered over the whole param in too many ways"
        )
    first = sum(found.start * stride for found, stride in zip(ranges, param.stride(), strict=True) if found)
    (run, _), (rows, stride), (_, block_stride) = (*levels, (1, 0), (1, 0))[:3]
    return first, (run, rows, stride, block_stride) if len(levels) > 1 else None


def own_range(param: DTensor, dimension: int) -> range | None:
    """Which indices of a dimension of the whole param lie here; None if they do not follow each other."""
    replicate = _dtensors().Replicate()
    placements = (
        cut_first_dimension(placement) if is_cut(placement) and placement.dim == dimension else replicate
        for placement in param.placements
    )
    indices = cut(torch.arange(param.shape[dimension]), param, placements)
    found = range(int(indices[0]), int(indices[-1]) + 1)
    return found if bool((indices.diff() == 1).all()) else None


def cut_first_dimension(placement: Any) -> Any:
    """The same cut of dimension 0."""
    strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(0, **strided)


def merge_levels(own: Tensor, strides: Iterable[int]) -> list[tuple[int, int]]:
    """The dimensions of a part as loops in memory order, inner ones first: (count, distance in the whole tensor).
    Those that make one loop are merged."""
    levels: list[tuple[int, int]] = []
    for _, count, distance in sorted(zip(own.stride(), own.shape, strides, strict=True)):
        if count == 1:
            continue
        if levels and distance == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * count, levels[-1][1])
        else:
            levels.append((count, distance))
    return levels


def describe(tensor: DTensor) -> str:
    return f"a DTensor of shape {tuple(tensor.shape)} placed {tuple(tensor.placements)} on {tensor.device_mesh}"


def _dtensors() -> Any:
    return sys.modules["torch.distributed.tensor"]
