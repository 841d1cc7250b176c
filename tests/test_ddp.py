"""Under DistributedDataParallel replicas keep the same bits: those of one process that gets the same gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from adamw_ext import AdamW
from benchmarks.allocations import allocated_bytes
from tests import processes
from tests.helpers import assert_same_bits, name_of, on_cpu

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")

PROCESSES = 2
STEPS = 5
HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}

# DDP's destructor holds the interpreter lock and waits for gloo's threads, which may wait for that lock: none is run.
KEPT: list[nn.Module] = []


class Net(nn.Module):
    """Layers of odd sizes, so that gradients in a bucket begin at addresses that are multiples of nothing but an
    element's size; and one layer that is used only where asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(7, 9, dtype=dtype),
            nn.Tanh(),
            nn.Linear(9, 5, dtype=dtype),
            nn.Tanh(),
            nn.Linear(5, 3, dtype=dtype),
        )
        self.other = nn.Linear(7, 3, dtype=dtype)

    def forward(self, inputs: Tensor, use_other: bool = True) -> Tensor:
        outputs = self.layers(inputs)
        return outputs + self.other(inputs) if use_other else outputs


def inputs_of(rank: int, step: int, dtype: torch.dtype, part: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * part + 100 * step + rank)
    return torch.randn(8, 7, generator=generator).to(dtype)


def wrap(net: nn.Module, **options: Any) -> nn.parallel.DistributedDataParallel:
    KEPT.append(nn.parallel.DistributedDataParallel(net, **options))
    return KEPT[-1]


def state_of(net: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Params and all of the optimizer's state, by name."""
    found = {}
    for name, param in net.named_parameters():
        found[name] = param.detach()
        found.update({f"{name} {key}": value for key, value in optimizer.state.get(param, {}).items()})
    return found


def grads_of(net: nn.Module) -> list[Tensor | None]:
    return [None if param.grad is None else param.grad.clone() for param in net.parameters()]


Training = tuple[dict[str, Tensor], list[list[Tensor | None]]]  # the end, and the gradients of every step


def train(
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    hook: Callable[[Any], None] | None = None,
    parts: int = 1,
    **ddp_options: Any,
) -> Training:
    """In each process: some steps, from the gradients of one or several backwards each."""
    rank = distributed.get_rank()
    net = Net(dtype)
    ddp = wrap(net, **ddp_options)
    if hook is not None:
        hook(ddp)
    optimizer = AdamW(net.parameters(), **HYPER, **options)
    grads = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            with ddp.no_sync() if part < parts - 1 else nullcontext():
                ddp(inputs_of(rank, step, dtype, part)).square().mean().backward()
        grads.append(grads_of(net))
        optimizer.step()
        if step == 1:  # DDP has put gradients into their final buckets
            stepper = optimizer._stepper
        assert step < 1 or optimizer._stepper is stepper
    if ddp_options.get("gradient_as_bucket_view"):
        offsets = {param.grad.data_ptr() % 16 for param in net.parameters()}
        assert offsets - {0, 8}, "all gradients are aligned by chance: other sizes are needed"
    grads += [grads_of(net)] * 2
    assert allocated_bytes(optimizer.step, "cpu") == 0  # in the second of two steps
    assert optimizer._stepper is stepper
    return state_of(net, optimizer), grads


def assert_replicas_agree(trainings: list[Training]) -> None:
    (first, first_grads), *others = trainings
    for state, grads in others:
        assert state.keys() == first.keys()
        assert_same_bits(list(state.values()), list(first.values()), "replicas")
        for ours, theirs in zip(grads, first_grads, strict=True):
            assert [grad is None for grad in ours] == [grad is None for grad in theirs]


def retrain(
    optimizer_class: type[torch.optim.Optimizer],
    dtype: torch.dtype,
    options: dict[str, Any],
    grads: list[list[Tensor | None]],
) -> dict[str, Tensor]:
    """In one process, with the gradients that DDP came to."""
    net = Net(dtype)
    optimizer = optimizer_class(net.parameters(), **HYPER, **options)
    for step_grads in grads:
        for param, grad in zip(net.parameters(), step_grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return state_of(net, optimizer)


def assert_same_as_one_process(training: Training, dtype: torch.dtype, options: dict[str, Any]) -> None:
    state, grads = training
    expected = retrain(AdamW, dtype, options, grads)
    assert state.keys() == expected.keys()
    assert_same_bits(list(state.values()), list(expected.values()), "one process")


def assert_close_to_torch(training: Training, dtype: torch.dtype) -> None:
    """Each rounds in places of its own; the tolerance is a few roundings of numbers around 1."""
    state, grads = training
    tolerance = 8 * torch.finfo(dtype).eps
    for name, value in retrain(torch.optim.AdamW, dtype, {}, grads).items():
        torch.testing.assert_close(
            state[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def train_whole_batches(parts: int) -> list[Tensor]:
    """torch's optimizer in one process, on the batches of all ranks."""
    net = Net(torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), **HYPER)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(PROCESSES):
            for part in range(parts):
                loss = net(inputs_of(rank, step, torch.float32, part)).square().mean()
                (loss / PROCESSES).backward()
        optimizer.step()
    optimizer.step()
    optimizer.step()
    return on_cpu(net.parameters())


# --- How gradients come to be ----------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "bucket views, many buckets": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
    "static graph": {"static_graph": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "no_sync": {"parts": 3},
    "no_sync, bucket views": {"parts": 3, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_replicas_keep_the_bits_of_one_process(way: str, dtype: torch.dtype) -> None:
    trainings = processes.run(train, PROCESSES, dtype, {}, **WAYS[way])
    assert_replicas_agree(trainings)
    assert_same_as_one_process(trainings[0], dtype, {})
    assert_close_to_torch(trainings[0], dtype)
    if dtype == torch.float32:
        state, _ = trainings[0]
        for (name, _), expected in zip(
            Net(dtype).named_parameters(), train_whole_batches(WAYS[way].get("parts", 1)), strict=True
        ):
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-5)  # sums in another order


def compress_to_bfloat16(ddp: nn.parallel.DistributedDataParallel) -> None:
    """DDP refuses torch's hook by its name where there is no NCCL; gloo takes bfloat16 all the same."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    def compress(group: Any, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        return bf16_compress_hook(group, bucket)

    ddp.register_comm_hook(None, compress)


def compress_to_float16(ddp: nn.parallel.DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    ddp.register_comm_hook(None, fp16_compress_hook)


def approximate_by_power_sgd(ddp: nn.parallel.DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1)
    ddp.register_comm_hook(state, powerSGD_hook)


@pytest.mark.parametrize("bucket_view", [False, True], ids=["own", "bucket_view"])
@pytest.mark.parametrize("hook", [compress_to_bfloat16, compress_to_float16, approximate_by_power_sgd])
def test_gradients_of_a_communication_hook_are_those_that_step(hook: Callable[[Any], None], bucket_view: bool) -> None:
    trainings = processes.run(train, PROCESSES, torch.float32, {}, hook=hook, gradient_as_bucket_view=bucket_view)
    assert_replicas_agree(trainings)
    assert_same_as_one_process(trainings[0], torch.float32, {})
    assert_close_to_torch(trainings[0], torch.float32)


# --- Params without a gradient ---------------------------------------------------------------------------------------


def train_with_unused(used_at: dict[int, list[int]], bucket_view: bool) -> Training:
    """used_at: the ranks that use the other layer, for each step at which any does."""
    rank = distributed.get_rank()
    net = Net(torch.float32)
    ddp = wrap(net, find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    optimizer = AdamW(net.parameters(), **HYPER)
    grads = []
    for step in range(STEPS):
        optimizer.zero_grad()
        ddp(inputs_of(rank, step, torch.float32), rank in used_at.get(step, [])).square().mean().backward()
        grads.append(grads_of(net))
        optimizer.step()
    return state_of(net, optimizer), grads


@pytest.mark.parametrize("bucket_view", [False, True], ids=["own", "bucket_view"])
def test_a_param_that_no_replica_uses_stays_as_it_is(bucket_view: bool) -> None:
    trainings = processes.run(train_with_unused, PROCESSES, {}, bucket_view)
    assert_replicas_agree(trainings)
    assert_same_as_one_process(trainings[0], torch.float32, {})
    assert_close_to_torch(trainings[0], torch.float32)
    state, _ = trainings[0]
    assert_same_bits([state["other.weight"], state["other.bias"]], on_cpu(Net(torch.float32).other.parameters()))
    assert "other.weight exp_avg" not in state


@pytest.mark.parametrize("bucket_view", [False, True], ids=["own", "bucket_view"])
def test_a_param_that_some_replicas_use_steps_on_all_and_counts_its_own_steps(bucket_view: bool) -> None:
    trainings = processes.run(train_with_unused, PROCESSES, {1: [0], 2: [1], 4: [0, 1]}, bucket_view)
    assert_replicas_agree(trainings)
    assert_same_as_one_process(trainings[0], torch.float32, {})
    assert_close_to_torch(trainings[0], torch.float32)
    state, _ = trainings[0]
    assert state["other.weight step"] == 3
    assert state["layers.0.weight step"] == STEPS


# --- Options of the optimizer ----------------------------------------------------------------------------------------


def id_of(options: dict[str, Any]) -> str:
    return "-".join(f"{key}_{value}" for key, value in options.items())


OPTIONS: list[dict[str, Any]] = [
    {"moment_dtype": torch.float32},
    {"master_weights": "fp32"},
    {"master_weights": "split"},
    {"master_weights": "split", "moment_dtype": torch.float32},
    {"master_weights": "split", "stochastic_rounding": True, "seed": 3},
    {"stochastic_rounding": True},
    {"stochastic_rounding": True, "moment_dtype": torch.float32, "capturable": True},
    {"amsgrad": True, "fused": True},
    {"max_grad_norm": 0.01},
    {"master_weights": "split", "max_grad_norm": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=id_of)
def test_every_mode_keeps_replicas_equal(options: dict[str, Any]) -> None:
    trainings = processes.run(train, PROCESSES, torch.bfloat16, options, gradient_as_bucket_view=True)
    assert_replicas_agree(trainings)
    assert_same_as_one_process(trainings[0], torch.bfloat16, options)
    state, _ = trainings[0]
    for name, param in Net(torch.bfloat16).named_parameters():
        assert not torch.equal(state[name], param)
        assert state[f"{name} step"] == STEPS + 2  # two more to look for allocations


def train_scaled() -> tuple[dict[str, Tensor], int, float]:
    rank = distributed.get_rank()
    net = Net(torch.float32)
    ddp = wrap(net, gradient_as_bucket_view=True)
    optimizer = AdamW(net.parameters(), fused=True, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ddp(inputs_of(rank, step, torch.float32)).square().mean()
        scaler.scale(loss * float("inf") if (rank, step) == (1, 2) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return state_of(net, optimizer), int(optimizer.skipped_steps), scaler.get_scale()


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    (first, *first_counts), (second, *second_counts) = processes.run(train_scaled, PROCESSES)
    assert first_counts == second_counts == [1, 512.0]
    assert_same_bits(list(first.values()), list(second.values()))
    assert all(count == STEPS - 1 for name, count in first.items() if name.endswith(" step"))
