"""A job: the tensors of a scenario, all of them between guard bytes, which some way of stepping then updates."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from adamw_ext import _C
from tests.guarded import LAYOUTS, Guarded, Place, strides_of
from tests.helpers import spread
from tests.scenarios import Param, Scenario, Step
from tests.test_bits import SPECIALS

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTERS = {"fp32": ("master_param", torch.float32), "split": ("param_remainder", torch.int16)}

# How much all jobs of this process have done, for those who report it.
done: Counter[str] = Counter()


class Job:
    """Params in the order of their groups, with the state that earlier steps have left, and gradients for each step.

    Args:
        gives_state: state of params without earlier steps is made here too, so that it lies between guard bytes; else
            whoever steps makes it.
        is_dense: params, gradients and state have neither gaps nor offsets, and are contiguous; but where elements
            count in the order of memory (random bits, the norm), in the order that they have in the scenario.
    """

    def __init__(self, scenario: Scenario, *, gives_state: bool = False, is_dense: bool = False) -> None:
        self.scenario = scenario
        self.is_dense = is_dense
        self.groups = [group for group, _ in scenario.params]
        self.specs = [spec for _, spec in scenario.params]
        self.steps_made = [spec.steps_before for spec in self.specs]
        self._numbers = torch.Generator().manual_seed(scenario.seed)
        self._guards = torch.Generator().manual_seed(scenario.seed + 1)
        self._storages: list[tuple[Guarded, str, Sequence[int]]] = []  # with the indices of the params they belong to

        every = range(len(self.specs))
        params = self._place([self._param_place(i) for i in every], "param", every)
        fill(params, scenario.numbers, self._numbers)
        self.state: list[dict[str, Tensor]] = [{} for _ in every]
        self._make_state(params, [i for i in every if gives_state or self.specs[i].steps_before])
        self.params = [param.requires_grad_() for param in params]
        self.grads: list[Tensor | None] = []
        done["trainings"] += 1

    def moment_dtype(self, i: int) -> torch.dtype:
        param = self.specs[i].dtype
        return param if param.is_complex else self.groups[i].storage.get("moment_dtype", param)

    def master(self, i: int) -> str | None:
        """How the master of a param is kept; None: it is its own."""
        return self.groups[i].storage.get("master_weights") if self.specs[i].dtype.itemsize == 2 else None

    def steps(self) -> Iterator[Step]:
        """One after the other, with gradients in place; whoever iterates makes each. Checks that it writes to the
        params that have gradients and to their state, to gradients that it unscales, and to no other byte."""
        for step in self.scenario.steps:
            updated = [step.gives(i) and not step.is_skipped for i in range(len(self.params))]
            with ExitStack() as guards:
                gradients = self._give_gradients(step)
                unscaled = [was and step.grad_scale is not None for was in updated]
                guards.enter_context(gradients.only_written_in(unscaled, "gradient"))
                for storage, what, indices in self._storages:
                    guards.enter_context(storage.only_written_in([updated[i] for i in indices], what))
                yield step
            done["steps"] += 1
            done["steps skipped for found_inf"] += step.is_skipped
            done["tensors updated"] += sum(updated)
            done["elements updated"] += sum(p.numel() for p, was in zip(self.params, updated, strict=True) if was)
            self.steps_made = [made + was for made, was in zip(self.steps_made, updated, strict=True)]

    def _param_place(self, i: int) -> Place:
        spec = self.specs[i]
        strides = strides_of(spec.layout, spec.shape)
        if not self.is_dense:
            return Place(spec.shape, strides, spec.dtype, spec.offset, spec.layout == "every other")
        if self.scenario.clips or "stochastic_rounding" in self.groups[i].storage:
            strides = dense_strides(torch.empty_strided(spec.shape, strides, device="meta"))
        else:
            strides = strides_of("contiguous", spec.shape)
        return Place(spec.shape, strides, spec.dtype)

    def _place(self, places: list[Place], what: str, indices: Sequence[int]) -> list[Tensor]:
        """In a storage for each dtype: torch.save refuses others."""
        tensors: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(place.dtype for place in places):
            chosen = [(i, place) for i, place in zip(indices, places, strict=True) if place.dtype == dtype]
            storage = Guarded([place for _, place in chosen], self._guards)
            owners = [i for i, _ in chosen]
            self._storages.append((storage, what, owners))
            tensors.update(zip(owners, storage.tensors, strict=True))
        return [tensors[i] for i in indices]

    def _make_state(self, params: list[Tensor], held: list[int]) -> None:
        """As updates before have left it; zeros where none have been made."""

        def place(key: str, indices: list[int], dtypes: list[torch.dtype]) -> list[tuple[int, Tensor]]:
            places = []
            for i, dtype in zip(indices, dtypes, strict=True):
                offset = 0 if self.is_dense else (self.specs[i].offset * len(key)) % 8
                places.append(Place(self.specs[i].shape, dense_strides(params[i]), dtype, offset))
            tensors = self._place(places, key, indices)
            for i, tensor in zip(indices, tensors, strict=True):
                self.state[i][key] = tensor
            return list(zip(indices, tensors, strict=True))

        for i in held:
            self.state[i]["step"] = torch.tensor(float(self.specs[i].steps_before))
        for key in MOMENTS:
            having = [i for i in held if self.groups[i].amsgrad or key != "max_exp_avg_sq"]
            placed = place(key, having, [self.moment_dtype(i) for i in having])
            used = [tensor for i, tensor in placed if self.specs[i].steps_before]
            fill(used, self.scenario.numbers, self._numbers, squared=key != "exp_avg")
            for i, tensor in placed:
                if not self.specs[i].steps_before:
                    tensor.zero_()
        for kind, (key, dtype) in MASTERS.items():
            having = [i for i in held if self.master(i) == kind]
            for i, master in place(key, having, [dtype] * len(having)):
                make_master(params[i], master, self.specs[i])

    def _give_gradients(self, step: Step) -> Guarded:
        """Other tensors at every step."""
        is_row = [spec.grad_layout == "expanded" and not self.scenario.unscales for spec in self.specs]
        places = []
        for param, spec, repeats in zip(self.params, self.specs, is_row, strict=True):
            strides = strides_of(spec.grad_layout, spec.shape) if spec.grad_layout in LAYOUTS else param.stride()
            strides = param.stride() if self.is_dense else (0, *strides[1:]) if repeats and strides else strides
            offset = 0 if self.is_dense else spec.grad_offset
            places.append(Place(spec.shape, strides, spec.grad_dtype or spec.dtype, offset))
        storage = Guarded(places, self._guards)
        grads = storage.tensors
        for i, spec in enumerate(self.specs):
            if spec.grad_layout == "lazy" and not self.is_dense:
                grads[i] = grads[i].conj() if grads[i].is_complex() else torch._neg_view(grads[i])
        fill(grads, step.numbers, self._numbers, is_row=is_row)
        self.grads = [grad if step.gives(i) else None for i, grad in enumerate(grads)]
        for param, grad, spec in zip(self.params, self.grads, self.specs, strict=True):
            if spec.grad_dtype is not None:
                param.grad_dtype = spec.grad_dtype
            param.grad = grad
        return storage


def dense_strides(param: Tensor) -> tuple[int, ...]:
    """Those of new state."""
    return torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()


def magnitude(kind: str, dtype: torch.dtype) -> float:
    """What random numbers of this kind are multiplied by; they themselves are around 1."""
    info = torch.finfo(dtype.to_real())
    return {"denormal": info.smallest_normal / 8, "huge": info.max / 64, "zeros": 0.0}.get(kind, 1.0)


def fill(
    tensors: Sequence[Tensor],
    kind: str,
    generator: torch.Generator,
    *,
    squared: bool = False,
    is_row: Sequence[bool] | None = None,  # which tensors repeat their first row, or number
) -> None:
    """With random numbers that depend on the order of the elements in the tensors, not on that in memory."""
    counts = [(2 if tensor.is_complex() else 1) * tensor.numel() for tensor in tensors]
    numbers = spread(sum(counts), torch.float64, generator, octaves=40 if kind == "wide" else 6)
    if kind == "special":
        where = torch.rand(len(numbers), generator=generator) < 1 / 8
        special = torch.tensor(SPECIALS, dtype=torch.float64)
        numbers[where] = special[torch.randint(0, len(SPECIALS), (int(where.sum()),), generator=generator)]
    numbers = numbers.square() if squared else numbers
    for i, (tensor, values) in enumerate(zip(tensors, numbers.split(counts), strict=True)):
        values = values * magnitude(kind, tensor.dtype)
        values = (
            torch.view_as_complex(values.view(*tensor.shape, 2)) if tensor.is_complex() else values.view(tensor.shape)
        )
        if is_row and is_row[i] and tensor.dim():
            values = values[:1].expand(tensor.shape)
            if tensor.stride(0) == 0:
                tensor, values = tensor[:1], values[:1]
        tensor.copy_(values)


def make_master(param: Tensor, master: Tensor, spec: Param) -> None:
    """A number beside the param, which then shows it; before the first step that is the param itself."""
    is_remainder = master.dtype == torch.int16
    if not spec.steps_before:
        master.copy_(torch.zeros_like(param) if is_remainder else param)
        return
    value = param.float() * (1 + 1e-3)
    if param.dtype == torch.bfloat16:
        high, low = _C.split_master(value)
        param.copy_(high)
        master.copy_(low if is_remainder else _C.join_master(high, low))
    else:
        param.copy_(value)
        master.copy_(value)
