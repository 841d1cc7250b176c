"""Accelerate: prepared, with accumulation, clipping, mixed precision and its checkpoints, in one process and in two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adamw_ext
from tests.helpers import assert_same_bits, on_cpu
from tests.trainers.helpers import Outcome, assert_continued, assert_trained_alike, outcome, run_processes

pytestmark = pytest.mark.trainers

ACCUMULATION, STEPS = 2, 6
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
SPLIT: dict[str, Any] = {"master_weights": "split", "stochastic_rounding": True, "max_grad_norm": 0.5}
AMP_AWARE: dict[str, Any] = {"fused": True, "amsgrad": True}

# Float32 params differ by their rounding, about 1e-7 of each in a step; eps keeps gradients that are nearly 0 from
# blowing it up. Under autocast a difference of one bit can become one of bfloat16's, 2^-8, in an activation. A param
# moves by about 4e-2 in all.
TOLERANCES = {"no": {"rtol": 1e-4, "atol": 1e-5}, "bf16": {"rtol": 1e-2, "atol": 1e-3}}


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def make_batches(dtype: torch.dtype) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(4 * ACCUMULATION * STEPS, 6, generator=generator)
    targets = 0.5 * inputs[:, :3].square() + inputs[:, 3:]
    return DataLoader(TensorDataset(inputs.to(dtype), targets), batch_size=4)


def train(
    cls: type[torch.optim.AdamW],
    hyper: dict[str, Any],
    *,
    mixed_precision: str = "no",
    dtype: torch.dtype = torch.float32,
    clip: float | None = 0.5,
    save_at: tuple[int, Path] | None = None,
    resume: tuple[int, Path] | None = None,
) -> tuple[Outcome, Accelerator, list[float]]:
    """Train for an epoch, or what is left of one; also returns the learning rates."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=ACCUMULATION)
    set_seed(0)
    model = make_model(seed=1 if resume else 0, dtype=dtype)  # what is not loaded must show
    optimizer = cls(model.parameters(), **{**HYPER, **hyper})
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, make_batches(dtype), schedule)
    assert type(optimizer) is AcceleratedOptimizer
    assert type(optimizer.optimizer) is cls

    done = 0
    if resume is not None:
        done, folder = resume
        accelerator.load_state(str(folder))
        batches = accelerator.skip_first_batches(batches, done * ACCUMULATION)
    losses, rates = [], []
    for inputs, targets in batches:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(inputs).float(), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if accelerator.sync_gradients:
            assert not accelerator.optimizer_step_was_skipped
            done += 1
            rates.append(schedule.get_last_lr()[0])
            if save_at is not None and save_at[0] == done:
                accelerator.save_state(str(save_at[1]))
    return outcome(losses, accelerator.unwrap_model(model), optimizer.optimizer), accelerator, rates


# --- One process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hyper", [{}, AMP_AWARE], ids=["default", "fused"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_trains_as_with_torchs(mixed_precision: str, hyper: dict[str, Any]):
    ours, _, rates = train(adamw_ext.AdamW, hyper, mixed_precision=mixed_precision)
    theirs, _, torchs_rates = train(torch.optim.AdamW, hyper, mixed_precision=mixed_precision)
    start = on_cpu(make_model().parameters())
    assert_trained_alike(ours, theirs, start, steps=STEPS, **TOLERANCES[mixed_precision])
    assert rates == torchs_rates
    assert len(set(rates)) == STEPS


def test_prepare_keeps_our_options():
    """It puts the optimizer's state dict through load_state_dict."""
    ours, _, _ = train(adamw_ext.AdamW, SPLIT, dtype=torch.bfloat16, clip=None)
    whole, _, _ = train(adamw_ext.AdamW, {**SPLIT, "master_weights": "fp32"}, dtype=torch.bfloat16, clip=None)
    assert {tensor.dtype for tensor in ours.state} == {torch.bfloat16, torch.int16}
    assert ours.steps == [STEPS] * len(ours.params)
    assert_same_bits(ours.params, whole.params)
    unclipped, _, _ = train(adamw_ext.AdamW, {**SPLIT, "max_grad_norm": None}, dtype=torch.bfloat16, clip=None)
    assert any(not torch.equal(a, b) for a, b in zip(ours.params, unclipped.params, strict=True))


@pytest.mark.parametrize(
    ("hyper", "mixed_precision", "dtype", "clip"),
    [
        ({}, "bf16", torch.float32, 0.5),
        (AMP_AWARE, "no", torch.float32, 0.5),
        (SPLIT, "no", torch.bfloat16, None),
    ],
    ids=["bf16", "amsgrad_fused", "split"],
)
def test_resumed_from_a_saved_state_the_bits_are_those_of_never_stopping(
    hyper: dict[str, Any], mixed_precision: str, dtype: torch.dtype, clip: float | None, tmp_path: Path
):
    how: dict[str, Any] = {"mixed_precision": mixed_precision, "dtype": dtype, "clip": clip}
    unbroken, _, rates = train(adamw_ext.AdamW, hyper, save_at=(2, tmp_path / "saved"), **how)
    resumed, _, resumed_rates = train(adamw_ext.AdamW, hyper, resume=(2, tmp_path / "saved"), **how)
    assert len(resumed.losses) == ACCUMULATION * (STEPS - 2)
    assert resumed_rates == rates[2:]
    assert_continued(resumed, unbroken)


# --- Float16 and its loss scaler: Accelerate has none on the CPU, so its wrappers are put together here --------------


def train_scaled(cls: type[torch.optim.AdamW], hyper: dict[str, Any]) -> tuple[Outcome, list[bool], list[float]]:
    """Five steps, of which the third overflows; also returns which were reported as skipped, and the learning rates."""
    Accelerator(cpu=True)
    model = make_model()
    inner = cls(model.parameters(), **{**HYPER, **hyper})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    schedule = AcceleratedScheduler(torch.optim.lr_scheduler.LinearLR(inner, 1.0, 0.1, total_iters=STEPS), optimizer)
    losses, skipped, rates = [], [], []
    for number, (inputs, targets) in enumerate(list(make_batches(torch.float32))[:5]):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(model(inputs).float(), targets)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if number == 2:
            model[3].bias.grad[1] = torch.inf
        before = on_cpu(model.parameters())
        optimizer.step()
        if number == 2:
            assert_same_bits(on_cpu(model.parameters()), before)  # whatever is reported, nothing has moved
        schedule.step()
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
        rates.append(schedule.get_last_lr()[0])
    return outcome(losses, model, inner), skipped, rates


def test_accelerate_makes_no_scaler_on_the_cpu():
    """Once it does, the tests below should go through Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    assert accelerator.mixed_precision == "fp16"
    assert accelerator.scaler is None
    assert not accelerator.native_amp


def test_a_step_that_overflows_is_skipped_and_reported():
    ours, skipped, rates = train_scaled(adamw_ext.AdamW, {})
    theirs, torchs_skipped, torchs_rates = train_scaled(torch.optim.AdamW, {})
    assert skipped == torchs_skipped == [False, False, True, False, False]
    assert rates == torchs_rates
    assert rates[2] == rates[1]  # the schedule waits
    assert_trained_alike(ours, theirs, on_cpu(make_model().parameters()), steps=4, rtol=1e-3, atol=1e-4)


def test_a_step_that_overflows_in_an_amp_aware_optimizer_is_skipped_but_not_reported():
    """As with torch's: https://github.com/huggingface/accelerate/issues/4242. Once that is mended, so is this."""
    ours, skipped, rates = train_scaled(adamw_ext.AdamW, {"fused": True})
    theirs, torchs_skipped, torchs_rates = train_scaled(torch.optim.AdamW, {"fused": True})
    assert skipped == torchs_skipped == [False] * 5
    assert rates == torchs_rates
    assert rates[2] < rates[1]  # the schedule goes on
    assert_trained_alike(ours, theirs, on_cpu(make_model().parameters()), steps=4, rtol=1e-3, atol=1e-4)


# --- Two processes ---------------------------------------------------------------------------------------------------


def train_in_two(rank: int, folder: str) -> None:
    ours, accelerator, _ = train(adamw_ext.AdamW, {})
    assert accelerator.num_processes == 2
    theirs, _, _ = train(torch.optim.AdamW, {})
    split, _, _ = train(adamw_ext.AdamW, SPLIT, dtype=torch.bfloat16, clip=None)
    saved = Path(folder) / "saved"
    unbroken, _, _ = train(adamw_ext.AdamW, {"amsgrad": True}, save_at=(1, saved))
    resumed, _, _ = train(adamw_ext.AdamW, {"amsgrad": True}, resume=(1, saved))
    torch.save((ours, theirs, split, unbroken, resumed), Path(folder) / f"{rank}.pt")


def test_two_processes_train_as_with_torchs_and_resume(tmp_path: Path):
    run_processes(train_in_two, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    start = on_cpu(make_model().parameters())
    for ours, theirs, split, unbroken, resumed in ranks:
        assert_trained_alike(ours, theirs, start, steps=STEPS // 2, **TOLERANCES["no"])
        assert split.steps == [STEPS // 2] * len(split.params)
        assert_continued(resumed, unbroken)
    for one, other in zip(*ranks, strict=True):
        assert one.losses != other.losses  # each has its own batches
        assert_same_bits(one.params, other.params)
        assert_same_bits(one.state, other.state)
