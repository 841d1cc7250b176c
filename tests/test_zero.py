"""ZeroRedundancyOptimizer over this optimizer gives the bits of the unsharded one, before and after checkpoints."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR

from adamw_ext import AdamW
from benchmarks.allocations import allocated_bytes
from tests import processes
from tests.helpers import assert_same_bits, name_of, on_cpu, spread

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")

STEPS = 6
HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
SHAPES = [(9, 7), (9,), (5, 9), (5,), (3, 5), (3,), (2, 3, 3)]  # odd, so that buckets hold params at odd addresses

Groups = list[dict[str, Any]]


def make_groups(dtype: torch.dtype, shapes: Iterable[tuple[int, ...]] = SHAPES) -> Groups:
    """Matrices decay and learn slower."""
    generator = torch.Generator().manual_seed(1)
    params = [spread(torch.Size(s).numel(), dtype, generator, octaves=1.0).reshape(s).requires_grad_() for s in shapes]
    return [
        {"params": [param for param in params if param.dim() > 1], "lr": 0.02},
        {"params": [param for param in params if param.dim() == 1], "weight_decay": 0.0},
    ]


def params_of(groups: Groups) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def set_grads(groups: Groups, step: int) -> None:
    """The same on every rank, as after a reduction; one param has none at some steps."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, param in enumerate(params_of(groups)):
        grad = spread(param.numel(), param.dtype, generator, octaves=3.0).reshape(param.shape)
        param.grad = None if number == 2 and step % 3 == 1 else grad


def make_zero(groups: Groups, options: dict[str, Any], bucket_view: bool = False) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, AdamW, parameters_as_bucket_view=bucket_view, **HYPER, **options)


def train(optimizer: torch.optim.Optimizer, groups: Groups, steps: Iterable[int]) -> None:
    """With a scheduler, which is as old as the training."""
    steps = list(steps)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"])
    scheduler = LambdaLR(optimizer, lambda count: 0.9 ** (count + steps[0]))
    for step in steps:
        set_grads(groups, step)
        optimizer.step()
        scheduler.step()


def state_tensors(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """By the param's index and the state's name."""
    return {
        f"{index} {key}": value
        for index, state in sorted(state_dict["state"].items())
        for key, value in sorted(state.items())
    }


def assert_same_training(groups: Groups, state_dict: dict[str, Any], expected: AdamW) -> None:
    assert_same_bits(params_of(groups), params_of(expected.param_groups), "params")
    found, wanted = state_tensors(state_dict), state_tensors(expected.state_dict())
    assert found.keys() == wanted.keys()
    assert_same_bits(list(found.values()), list(wanted.values()), list(found))


def train_unsharded(dtype: torch.dtype, options: dict[str, Any]) -> AdamW:
    groups = make_groups(dtype)
    optimizer = AdamW(groups, **HYPER, **options)
    train(optimizer, groups, range(STEPS))
    starts = params_of(make_groups(dtype))
    assert all(not torch.equal(param, start) for param, start in zip(params_of(groups), starts, strict=True))
    assert [int(optimizer.state[param]["step"]) for param in params_of(groups)] == [6, 6, 4, 6, 6, 6, 6]
    return optimizer


# --- The bits --------------------------------------------------------------------------------------------------------


def train_sharded(dtype: torch.dtype, options: dict[str, Any], bucket_view: bool) -> tuple[Groups, Any]:
    """In each process: the groups at the end and, on the first rank, the whole state dict."""
    groups = make_groups(dtype)
    zero = make_zero(groups, options, bucket_view)
    train(zero, groups, range(STEPS))
    held = params_of(zero.optim.param_groups)
    assert set(zero.optim.state) == set(held)
    assert 0 < len(held) < len(SHAPES)  # a shard
    zero.consolidate_state_dict()
    state_dict = copy.deepcopy(zero.state_dict()) if distributed.get_rank() == 0 else None
    found = [{"params": on_cpu(group["params"])} for group in groups]

    stepper = zero.optim._stepper
    set_grads(groups, 0)
    zero.step()
    assert allocated_bytes(zero.optim.step, "cpu") == 0
    assert zero.optim._stepper is stepper
    return found, state_dict


OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "maximize": True},
    {"master_weights": "fp32"},
    {"master_weights": "split", "moment_dtype": torch.float32},
    {"capturable": True},
]


@pytest.mark.parametrize("bucket_view", [False, True], ids=["own", "bucket_view"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.items())) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_shards_have_the_bits_of_the_unsharded_optimizer(
    dtype: torch.dtype, options: dict[str, Any], bucket_view: bool
) -> None:
    expected = train_unsharded(dtype, options)
    results = processes.run(train_sharded, 2, dtype, options, bucket_view)
    _, state_dict = results[0]
    for groups, _ in results:
        assert_same_training(groups, state_dict, expected)


def step_with_more_ranks_than_params() -> tuple[list[Tensor], int]:
    groups = make_groups(torch.float32, [(3, 5), (4,)])
    zero = make_zero(groups, {})
    train(zero, groups, range(STEPS))
    return on_cpu(params_of(groups)), len(zero.optim.state)


def test_a_rank_without_params_steps_along() -> None:
    groups = make_groups(torch.float32, [(3, 5), (4,)])
    train(AdamW(groups, **HYPER), groups, range(STEPS))
    starts = params_of(make_groups(torch.float32, [(3, 5), (4,)]))
    assert all(not torch.equal(param, start) for param, start in zip(params_of(groups), starts, strict=True))
    results = processes.run(step_with_more_ranks_than_params, 3)
    assert [held for _, held in results] == [1, 1, 0]
    for params, _ in results:
        assert_same_bits(params, params_of(groups))


def clip_in_shares() -> None:
    for groups in (
        make_groups(torch.float32),
        [{**group, "max_grad_norm": 1.0} for group in make_groups(torch.float32)],
    ):
        options = {} if "max_grad_norm" in groups[0] else {"max_grad_norm": 1.0}
        with pytest.raises(ValueError, match="max_grad_norm needs the gradients of all params, but ZeroRedundancy"):
            make_zero(groups, options)
    AdamW(make_groups(torch.float32), max_grad_norm=1.0)


def test_clipping_by_the_norm_of_a_share_is_refused() -> None:
    processes.run(clip_in_shares, 2)


def test_an_optimizer_without_params_counts_skipped_steps() -> None:
    assert AdamW([{"params": []}]).skipped_steps == 0


KEPT: list[nn.Module] = []  # DDP's destructor can hang in a process that goes on


def train_under_ddp(sharded: bool) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    start = on_cpu(net.parameters())
    if sharded:  # before DDP, which lays out its buckets by the params' addresses
        optimizer = make_zero([{"params": list(net.parameters())}], {}, bucket_view=True)
    else:
        optimizer = AdamW(net.parameters(), **HYPER)
    ddp = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    KEPT.append(ddp)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + distributed.get_rank())
        optimizer.zero_grad()
        ddp(torch.randn(8, 7, generator=generator)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(param, before) for param, before in zip(net.parameters(), start, strict=True))
    return on_cpu(net.parameters())


def test_shards_under_ddp_with_all_views_into_buckets_have_the_bits_of_plain_ddp() -> None:
    sharded, plain = (processes.run(train_under_ddp, 2, way) for way in (True, False))
    for params in (*sharded, *plain[1:]):
        assert_same_bits(params, plain[0])


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def resume_sharded(dtype: torch.dtype, options: dict[str, Any], checkpoint: Path, steps: list[int]) -> None:
    """In each process: go on from a checkpoint of either kind, and leave one."""
    groups = make_groups(dtype)
    zero = make_zero(groups, options, bucket_view=True)
    if checkpoint.exists():
        loaded = torch.load(checkpoint, weights_only=True)
        zero.load_state_dict(loaded["optimizer"])
        with torch.no_grad():
            for param, saved in zip(params_of(groups), loaded["params"], strict=True):
                param.copy_(saved)
    distributed.barrier()
    train(zero, groups, steps)
    zero.consolidate_state_dict()
    if distributed.get_rank() == 0:
        torch.save({"params": on_cpu(params_of(groups)), "optimizer": zero.state_dict()}, checkpoint)


def resume_unsharded(dtype: torch.dtype, options: dict[str, Any], checkpoint: Path, steps: list[int]) -> AdamW:
    groups = make_groups(dtype)
    optimizer = AdamW(groups, **HYPER, **options)
    loaded = torch.load(checkpoint, weights_only=True)
    with torch.no_grad():
        for param, saved in zip(params_of(groups), loaded["params"], strict=True):
            param.copy_(saved)
    optimizer.load_state_dict(loaded["optimizer"])
    train(optimizer, groups, steps)
    torch.save({"params": params_of(groups), "optimizer": optimizer.state_dict()}, checkpoint)
    return optimizer


@pytest.mark.parametrize(
    "options", [{}, {"master_weights": "split"}, {"master_weights": "fp32", "amsgrad": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_checkpoints_go_from_shards_to_one_optimizer_and_back(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    expected = train_unsharded(dtype, options)
    checkpoint = tmp_path / "checkpoint.pt"
    processes.run(resume_sharded, 2, dtype, options, checkpoint, [0, 1])
    resume_unsharded(dtype, options, checkpoint, [2, 3])
    processes.run(resume_sharded, 3, dtype, options, checkpoint, [4])  # other shards
    resumed = resume_unsharded(dtype, options, checkpoint, [5])
    assert_same_training(resumed.param_groups, resumed.state_dict(), expected)


# --- Stochastic rounding ---------------------------------------------------------------------------------------------

ROUNDED = {"stochastic_rounding": True, "seed": 5}


def round_in_shards() -> list[Tensor]:
    """ZeRO, and by hand an optimizer over the params that each rank holds."""
    groups = make_groups(torch.bfloat16)
    zero = make_zero(groups, ROUNDED)
    own = copy.deepcopy(zero.optim.param_groups)
    by_hand = AdamW(own, **ROUNDED)
    for step in range(STEPS):
        set_grads(groups, step)
        for param, twin in zip(params_of(zero.optim.param_groups), params_of(own), strict=True):
            twin.grad = param.grad
        zero.step()
        by_hand.step()
        assert_same_bits(params_of(zero.optim.param_groups), params_of(own), f"step {step}")
    return on_cpu(params_of(groups))


def test_random_bits_follow_the_place_in_the_shard_and_replicas_agree() -> None:
    """A param's place is counted in the optimizer that holds it, which here holds a shard: the unsharded optimizer, and
    another number of ranks, draw other random bits."""
    first, second = processes.run(round_in_shards, 2)
    assert_same_bits(first, second)
    groups = make_groups(torch.bfloat16)
    optimizer = AdamW(groups, **HYPER, **ROUNDED)
    for step in range(STEPS):
        set_grads(groups, step)
        optimizer.step()
    unsharded = params_of(groups)
    assert any(not torch.equal(a, b) for a, b in zip(first, unsharded, strict=True))
    for param, other in zip(first, unsharded, strict=True):  # each of a few steps rounds up or down
        torch.testing.assert_close(param, other, rtol=2 * STEPS * 2.0**-8, atol=0.02)


def test_resumed_shards_round_as_if_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    processes.run(resume_sharded, 2, torch.bfloat16, ROUNDED, whole, list(range(STEPS)))
    processes.run(resume_sharded, 2, torch.bfloat16, ROUNDED, parts, [0, 1, 2])
    processes.run(resume_sharded, 2, torch.bfloat16, ROUNDED, parts, [3, 4, 5])
    expected, found = torch.load(whole, weights_only=True), torch.load(parts, weights_only=True)
    assert_same_bits(found["params"], expected["params"])
    starts = params_of(make_groups(torch.bfloat16))
    assert all(not torch.equal(param, start) for param, start in zip(found["params"], starts, strict=True))
    expected_state, found_state = state_tensors(expected["optimizer"]), state_tensors(found["optimizer"])
    assert_same_bits(list(found_state.values()), list(expected_state.values()))
