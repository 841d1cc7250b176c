"""DTensors, however they are placed: the bits of the unsharded optimizer, its norm, its state, and what is refused."""

import copy
import gc
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_ext import AdamW, functional
from tests.helpers import assert_same_bits
from tests.processes import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")

BFLOAT16 = torch.bfloat16
HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.2}
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {"amsgrad": True, "maximize": True}),
    "bfloat16": (BFLOAT16, {}),
    "float32 moments": (BFLOAT16, {"moment_dtype": torch.float32}),
    "fp32 masters": (BFLOAT16, {"master_weights": "fp32"}),
    "split masters": (BFLOAT16, {"master_weights": "split", "amsgrad": True}),
    "random weights": (BFLOAT16, {"stochastic_rounding": True, "seed": 2**63 + 7}),
    "random moments": (torch.float32, {"stochastic_rounding": True, "moment_dtype": BFLOAT16, "amsgrad": True}),
    "random split": (BFLOAT16, {"master_weights": "split", "stochastic_rounding": True}),
    "capturable": (torch.float32, {"capturable": True}),
    "clipped": (torch.float32, {"max_grad_norm": 0.5}),
    "clipped on the device": (BFLOAT16, {"max_grad_norm": 0.5, "capturable": True, "master_weights": "split"}),
}
# Even, uneven and too small to give every process a part; one of a single element.
SHAPES = [(8, 6), (7, 5), (3, 4, 10), (3,), (1, 9), (0, 4), ()]


def tensors() -> Any:
    """torch.distributed.tensor takes seconds to import: the tests' processes have it."""
    import torch.distributed.tensor

    return torch.distributed.tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every process. Neither gloo nor NCCL moves int16."""
    if not isinstance(tensor, tensors().DTensor):
        return tensor.detach()
    return (
        tensor.detach().to(torch.int32 if tensor.dtype == torch.int16 else tensor.dtype).full_tensor().to(tensor.dtype)
    )


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def distributed(value: Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    return tensors().distribute_tensor(value, mesh, placements, src_data_rank=None)


class Pair:
    """An optimizer over sharded params, and one over the whole params, which get the same gradients."""

    def __init__(self, shapes: Sequence[Sequence[int]], mesh: Any, placements: Sequence[Any], mode: str) -> None:
        self.dtype, options = MODES[mode]
        self.mesh, self.placements = mesh, placements
        values = [random(shape, self.dtype, seed) for seed, shape in enumerate(shapes)]
        self.params = [distributed(v, mesh, p).requires_grad_() for v, p in zip(values, placements, strict=True)]
        self.twins = [value.clone().requires_grad_() for value in values]
        self.optimizer = AdamW(self.params, **HYPER, **options)
        self.reference = AdamW(self.twins, **HYPER, **options)
        self.steps = 0

    def give_grads(self) -> None:
        self.steps += 1
        for i, (param, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            grad = random(twin.shape, self.dtype, 1000 * self.steps + i)
            param.grad, twin.grad = distributed(grad, self.mesh, self.placements[i]), grad

    def step(self) -> None:
        self.give_grads()
        self.optimizer.step()
        self.reference.step()

    def compare(self, what: object) -> None:
        assert_same_bits([whole(p) for p in self.params], [t.detach() for t in self.twins], what)
        for param, twin in zip(self.params, self.twins, strict=True):
            state, expected = self.optimizer.state[param], self.reference.state[twin]
            assert state.keys() == expected.keys()
            for key, value in state.items():
                assert_same_bits([whole(value)], [expected[key]], (what, key))
                if key != "step":
                    assert (value.placements, value.shape, value.dtype) == (
                        param.placements,
                        param.shape,
                        expected[key].dtype,
                    )


def ways_to_place(dimensions: int, shape: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """All placements of a shape on a mesh of so many dimensions."""
    t = tensors()
    cuts = [t.Shard(i) for i, size in enumerate(shape) if size > 0]
    yield from itertools.product([t.Replicate(), *cuts], repeat=dimensions)


# --- The bits ---------------------------------------------------------------------------------------------------------


def compare_all_placements(mesh_shape: tuple[int, ...], modes: Sequence[str]) -> int:
    mesh = tensors().init_device_mesh("cpu", mesh_shape)
    cases = [(shape, way) for shape in SHAPES for way in ways_to_place(len(mesh_shape), shape)]
    for mode in modes:
        pair = Pair([shape for shape, _ in cases], mesh, [way for _, way in cases], mode)
        for _ in range(3):
            pair.step()
        pair.compare(mode)
        assert pair.optimizer._elsewhere == []
        if "max_grad_norm" in MODES[mode][1]:
            norm, expected = pair.optimizer.grad_norm, pair.reference.grad_norm
            torch.testing.assert_close(norm, expected, rtol=1e-15, atol=0.0)
            assert len(set(gathered(norm))) == 1
    return len(cases)


def gathered(value: Any) -> list[Any]:
    """What every process has."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value.item() if isinstance(value, Tensor) else value)
    return values


@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2)], ids=str)
def test_any_placement_has_the_bits_of_the_whole(mesh: tuple[int, ...]):
    processes = torch.Size(mesh).numel()
    counts = run(compare_all_placements, processes, mesh, list(MODES))
    assert counts == [{1: 18, 2: 52}[len(mesh)]] * processes


def compare_strided() -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    t = tensors()
    mesh = t.init_device_mesh("cpu", (2, 2))
    ways = [(_StridedShard(0, split_factor=2), t.Shard(0)), (_StridedShard(1, split_factor=2), t.Shard(1))]
    pair = Pair([(8, 12), (6, 8)], mesh, ways, "random weights")
    pair.step()
    pair.compare("strided")
    scattered = distributed(torch.zeros(8, dtype=BFLOAT16), mesh, [_StridedShard(0, split_factor=2), t.Replicate()])
    refused = AdamW([scattered.requires_grad_()], stochastic_rounding=True)
    scattered.grad = scattered.detach().clone()
    with pytest.raises(RuntimeError, match=r"stochastic rounding of param \(group 0, index 0\).*scattered"):
        refused.step()
    assert not refused.state


def test_the_strided_shards_of_fsdp_over_tensor_parallelism_have_the_bits_of_the_whole():
    run(compare_strided, 4)


# --- Gradients --------------------------------------------------------------------------------------------------------


def pair_of(mode: str = "float32", count: int = 2) -> Pair:
    """Params cut along their first dimension, uneven ones."""
    mesh = tensors().init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return Pair([(5, 3), (3,)][:count], mesh, [[tensors().Shard(0)]] * count, mode)


def step_with_summands(mode: str) -> None:
    t = tensors()
    mesh = t.init_device_mesh("cpu", (2,))
    pair = Pair([(5, 3), (4,)], mesh, [[t.Replicate()], [t.Shard(0)]], mode)
    for _ in range(2):
        pair.give_grads()
        rank = torch.distributed.get_rank()
        for param, twin in zip(pair.params, pair.twins, strict=True):
            summand = twin.grad * (rank + 1)
            twin.grad = twin.grad * 3
            param.grad = t.DTensor.from_local(summand, mesh, [t.Partial()], run_check=False)
        summands = [param.grad for param in pair.params]
        pair.optimizer.step()
        pair.reference.step()
        assert all(param.grad is summand for param, summand in zip(pair.params, summands, strict=True))
        assert all(summand.placements == (t.Partial(),) for summand in summands)
    pair.compare("summands")


@pytest.mark.parametrize("mode", ["float32", "clipped"])
def test_gradients_that_are_summands_are_added_up(mode: str):
    run(step_with_summands, 2, mode)


def refuse_bad_grads() -> None:
    t = tensors()
    pair = pair_of()
    pair.step()
    before = [whole(param).clone() for param in pair.params]
    others = t.init_device_mesh("cpu", (1, 2))
    misplaced = distributed(torch.ones(5, 3), others, [t.Replicate(), t.Shard(0)])
    bad = {
        r"of param \(group 0, index 0\), a DTensor .* must be a DTensor, but is a Tensor": torch.ones(5, 3),
        r"of param \(group 0, index 0\), .* must lie on the same processes": misplaced,
    }
    for message, grad in bad.items():
        pair.give_grads()
        pair.params[0].grad = grad
        with pytest.raises(RuntimeError, match=message):
            pair.optimizer.step()
        assert_same_bits([whole(param) for param in pair.params], before)
        assert pair.optimizer.state[pair.params[1]]["step"] == 1.0


def test_gradients_that_lie_elsewhere_are_refused_and_nothing_changes():
    run(refuse_bad_grads, 2)


def step_with_other_dtypes() -> None:
    pair = pair_of("clipped")
    pair.give_grads()
    for param, twin in zip(pair.params, pair.twins, strict=True):
        grad, twin.grad = twin.grad.to(BFLOAT16), twin.grad.to(BFLOAT16).float()
        param.grad = None
        param.grad_dtype = BFLOAT16
        param.grad = distributed(grad, pair.mesh, [tensors().Shard(0)])
    pair.optimizer.step()
    pair.reference.step()
    pair.compare("bfloat16 gradients")


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_may_have_another_dtype():
    run(step_with_other_dtypes, 2)


def clip_what_some_have() -> list[float]:
    """Not every process has a gradient of every param, and some params are no DTensors."""
    t = tensors()
    rank = torch.distributed.get_rank()
    mesh = t.init_device_mesh("cpu", (2,))
    values = [random((5, 3), torch.float32, 0), random((4,), torch.float32, 1), random((2, 2), torch.float32, 2)]
    params = [distributed(values[0], mesh, [t.Shard(0)]), distributed(values[1], mesh, [t.Replicate()]), values[2]]
    optimizer = AdamW([param.requires_grad_() for param in params], max_grad_norm=0.1)
    norms = []
    for used in ({0, 1, 2}, {1, 2}, {0, 2} if rank == 0 else {2}, set()):
        for i, param in enumerate(params):
            param.grad = param.detach().clone().fill_(2.0) if i in used else None
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    return norms


def test_the_norm_counts_each_element_once_and_every_process_takes_part():
    norms = run(clip_what_some_have, 2)
    assert norms[0] == norms[1]
    # 15, 4 and 4 elements of size 2; then 9 of the 15 are on the first process.
    torch.testing.assert_close(torch.tensor(norms[0]), 2.0 * torch.tensor([23.0, 8.0, 13.0, 0.0]).sqrt())


def scale_and_skip(fused: bool) -> tuple[list[float], float]:
    pair = pair_of()
    pair.optimizer.param_groups[0]["fused"] = pair.reference.param_groups[0]["fused"] = fused
    pair.optimizer._step_supports_amp_scaling = pair.reference._step_supports_amp_scaling = fused
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000) for _ in range(2)]
    steps = []
    for overflows in (False, True, False):
        pair.give_grads()
        if overflows:  # on the last process alone
            for grads in (pair.params[0].grad, pair.twins[0].grad):
                part = grads._local_tensor if grads is pair.params[0].grad else grads
                if part is grads or torch.distributed.get_rank() == 1:
                    part[-1, -1] = float("inf")
        for scaler, optimizer in zip(scalers, (pair.optimizer, pair.reference), strict=True):
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        for param, twin in zip(pair.params, pair.twins, strict=True):
            assert_same_bits([whole(param.grad)], [whole(twin.grad)], "unscaled")
        steps.append(pair.optimizer.state[pair.params[1]]["step"].item())
    pair.compare("scaled")
    return steps, pair.optimizer.skipped_steps.item()


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_process_skips_the_step_on_all(fused: bool):
    results = run(scale_and_skip, 2, fused)
    assert results == [([1.0, 1.0, 2.0], 1.0 if fused else 0.0)] * 2


# --- Params and state -------------------------------------------------------------------------------------------------


def refuse_partial_params() -> None:
    t = tensors()
    mesh = t.init_device_mesh("cpu", (2,))
    param = t.DTensor.from_local(torch.ones(3), mesh, [t.Partial()], run_check=False).requires_grad_()
    plain = torch.ones(2, requires_grad=True)
    param.grad, plain.grad = param.detach().clone(), torch.ones(2)
    optimizer = AdamW([("plain", plain), ("summand", param)])
    with pytest.raises(RuntimeError, match=r"'summand' \(group 0, index 1\) must be sharded or replicated.*Partial"):
        optimizer.step()
    assert_same_bits([plain.detach(), param.to_local().detach()], [torch.ones(2), torch.ones(3)])
    assert not optimizer.state


def test_params_that_are_summands_are_refused():
    run(refuse_partial_params, 2)


def follow_replaced_parts() -> None:
    pair = pair_of("split masters")
    pair.step()
    state = pair.optimizer.state[pair.params[0]]
    replaced = [
        tensor._local_tensor for tensor in (*pair.params, state["exp_avg"])
    ]  # alive: nothing else gives it away
    for param, twin in zip(pair.params, pair.twins, strict=True):  # as FSDP does when a module is moved or reset
        param._local_tensor = param._local_tensor.clone() * 2
        with torch.no_grad():
            twin.mul_(2)
    before = [tensor.clone() for tensor in replaced]
    pair.step()
    state["exp_avg"]._local_tensor = torch.zeros_like(state["exp_avg"]._local_tensor)
    pair.reference.state[pair.twins[0]]["exp_avg"].zero_()
    before[-1] = replaced[-1].clone()
    pair.step()
    pair.compare("replaced parts")
    assert_same_bits(replaced, before)
    state["exp_avg"]._local_tensor = torch.zeros(1, dtype=BFLOAT16)
    before = [whole(param).clone() for param in pair.params]
    pair.give_grads()
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' of param \(group 0, index 0\) must have sizes"):
        pair.optimizer.step()
    assert_same_bits([whole(param) for param in pair.params], before)


def test_a_part_that_was_replaced_is_followed_and_one_that_does_not_fit_is_refused():
    run(follow_replaced_parts, 2)


def copy_and_go_on() -> None:
    pair = pair_of("split masters")
    pair.optimizer.init_state()
    pair.reference.init_state()
    pair.compare("before the first step")
    pair.step()
    pair.params, pair.optimizer = copy.deepcopy((pair.params, pair.optimizer))
    pair.step()
    pair.compare("a copy")


def test_state_can_be_made_ahead_and_copies_go_on():
    run(copy_and_go_on, 2)


def call_functional() -> None:
    t = tensors()
    pair = pair_of()
    pair.step()
    for params in (pair.params, pair.twins):
        optimizer = pair.optimizer if params is pair.params else pair.reference
        grads = [random(twin.shape, torch.float32, 50 + i) for i, twin in enumerate(pair.twins)]
        if params is pair.params:
            grads = [distributed(grad, pair.mesh, [t.Shard(0)]) for grad in grads]
        states = [optimizer.state[param] for param in params]
        versions = [param._version for param in params]
        with torch.no_grad():
            functional.adamw(
                params,
                grads,
                *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
                [],
                [state["step"] for state in states],
                amsgrad=False,
                beta1=0.8,
                beta2=0.7,
                lr=0.1,
                weight_decay=0.1,
                eps=1e-3,
                maximize=False,
            )
        assert [param._version for param in params] == [version + 1 for version in versions]
    pair.compare("functional")


def test_the_functional_form_takes_dtensors():
    run(call_functional, 2)


# --- The steady state -------------------------------------------------------------------------------------------------


def step_steadily() -> None:
    pair = pair_of("clipped")
    for _ in range(3):
        pair.step()
    stepper, versions = pair.optimizer._stepper, [param._version for param in pair.params]
    pair.give_grads()
    seen = [weakref.ref(param.grad) for param in pair.params] + [
        weakref.ref(param.grad._local_tensor) for param in pair.params
    ]
    pair.optimizer.step()
    assert pair.optimizer._stepper is stepper
    assert [param._version for param in pair.params] == [version + 1 for version in versions]
    pair.optimizer.zero_grad()
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4

    def count() -> int:
        gc.collect()
        return len(gc.get_objects())

    def train() -> None:
        for _ in range(20):
            pair.give_grads()
            pair.optimizer.step()
            pair.optimizer.zero_grad()

    train()
    before = count()
    train()
    assert abs(count() - before) < 10  # pytorch#188174: a DTensor's optimizer kept objects of every step


def test_a_steady_step_keeps_its_stepper_and_leaves_nothing_behind():
    run(step_steadily, 2)


def step_compiled() -> None:
    pair = pair_of()
    step = torch.compile(pair.optimizer.step, backend="eager")
    for _ in range(2):
        pair.give_grads()
        step()
        pair.reference.step()
    pair.compare("compiled")


def test_a_compiled_step_updates_dtensors_outside_of_the_graph():
    run(step_compiled, 2)
