"""Params stepped within backward get the bits of a step after it, and their gradients never pile up."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamw_ext import AdamW
from benchmarks.allocations import peak_bytes
from examples.gpt import GPT, GPTConfig, decay_groups
from examples.in_backward import step_in_backward
from tests.helpers import assert_same_bits, name_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported):DeprecationWarning"),
]

CONFIG = GPTConfig(vocabulary=32, context=8, layers=2, heads=2, width=16)  # with a param that is used twice
HYPER: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3}
STEPS = 5

OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "fused": True},
    {"capturable": True},
    {"master_weights": "fp32"},
    {"master_weights": "split", "moment_dtype": torch.float32},
]


def make_gpt(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).to(dtype)


def losses(model: GPT, steps: range) -> Iterator[Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(CONFIG.vocabulary, (2, CONFIG.context + 1), generator=generator)
        yield model.loss(tokens[:, :-1], tokens[:, 1:])


def train_usually(model: GPT, optimizer: AdamW, steps: range) -> None:
    for loss in losses(model, steps):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_in_backward(model: GPT, steps: range) -> None:
    for loss in losses(model, steps):
        loss.backward()
        assert all(param.grad is None for param in model.parameters())


def assert_same_training(optimizers: list[AdamW], usual: AdamW) -> None:
    """Params and state, in the order of the usual optimizer's groups."""
    params = [param for group in usual.param_groups for param in group["params"]]
    assert len(optimizers) == len(params)
    for optimizer, twin in zip(optimizers, params, strict=True):
        (param,) = optimizer.param_groups[0]["params"]
        assert_same_bits([param], [twin], "param")
        state, expected = optimizer.state[param], usual.state[twin]
        assert state.keys() == expected.keys()
        assert_same_bits(list(state.values()), list(expected.values()), list(state))


def assert_moved(model: GPT) -> None:
    starts = make_gpt(next(model.parameters()).dtype).parameters()
    assert all(not torch.equal(param, start) for param, start in zip(model.parameters(), starts, strict=True))


# --- The recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_steps_in_backward_have_the_bits_of_steps_after_it(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, twin = make_gpt(dtype), make_gpt(dtype)
    optimizers = step_in_backward(decay_groups(model, 0.1), **HYPER, **options)
    usual = AdamW(decay_groups(twin, 0.1), **HYPER, **options)
    train_in_backward(model, range(STEPS))
    train_usually(twin, usual, range(STEPS))
    assert_same_training(optimizers, usual)
    assert_moved(model)
    assert {int(state["step"]) for optimizer in optimizers for state in optimizer.state.values()} == {STEPS}


def test_each_param_is_rounded_by_random_bits_of_its_own() -> None:
    start = torch.linspace(1.0, 2.0, 256, dtype=torch.bfloat16)
    params = [start.clone().requires_grad_() for _ in range(3)]
    step_in_backward([{"params": params}], lr=1e-3, stochastic_rounding=True, seed=7)
    sum(param.sum() for param in params).backward()
    assert all(not torch.equal(param, start) for param in params)
    assert not torch.equal(params[0], params[1])
    assert not torch.equal(params[1], params[2])


def test_checkpoints_go_from_one_optimizer_for_each_param_to_one_for_all_and_back() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    twin = make_gpt()
    expected = AdamW(decay_groups(twin, 0.1), **HYPER)
    train_usually(twin, expected, range(6))

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    first, second, third = make_gpt(), make_gpt(), make_gpt()
    optimizers = step_in_backward(decay_groups(first, 0.1), **HYPER)
    train_in_backward(first, range(2))

    second.load_state_dict(first.state_dict())
    usual = AdamW(decay_groups(second, 0.1), **HYPER)
    set_optimizer_state_dict(second, usual, get_optimizer_state_dict(first, optimizers, options=flat), options=flat)
    train_usually(second, usual, range(2, 4))

    third.load_state_dict(second.state_dict())
    optimizers = step_in_backward(decay_groups(third, 0.1), **HYPER)
    set_optimizer_state_dict(third, optimizers, get_optimizer_state_dict(second, usual, options=flat), options=flat)
    train_in_backward(third, range(4, 6))
    assert_same_training(optimizers, expected)


def test_gradients_are_not_alive_together() -> None:
    """In a model in which they, and not activations, make the peak."""
    layers = 8

    def peak(in_backward: bool) -> float:
        """In gradients of one layer."""
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(layers)))
        groups = [{"params": list(model.parameters())}]
        optimizers = step_in_backward(groups) if in_backward else [AdamW(groups)]

        def step() -> None:
            model(torch.ones(1, 256)).sum().backward()
            if not in_backward:
                optimizers[0].step()
                optimizers[0].zero_grad()

        step()
        return peak_bytes(step) / model[0].weight.nbytes

    assert layers <= peak(False) < layers + 1
    assert 1 <= peak(True) < 3


def test_the_example_trains_both_ways_with_the_same_bits() -> None:
    command = [sys.executable, "-m", "examples.in_backward", "--short", "--steps", "3", "--batch", "1"]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the same bits" in run.stdout


# --- torch's own way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "plain")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_torchs_apply_in_backward_gives_the_bits_of_steps_after_it(options: dict[str, Any]) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

    model, twin = make_gpt(torch.bfloat16), make_gpt(torch.bfloat16)
    usual = AdamW(decay_groups(twin, 0.1), **HYPER, **options)
    apply = partial(_apply_optimizer_in_backward, AdamW)
    for group in decay_groups(model, 0.1):
        apply(group["params"], {**HYPER, **options, "weight_decay": group["weight_decay"]})
    train_in_backward(model, range(STEPS))
    train_usually(twin, usual, range(STEPS))
    by_param = {optimizer.param_groups[0]["params"][0]: optimizer for optimizer in _get_in_backward_optimizers(model)}
    in_order = [by_param[param] for group in decay_groups(model, 0.1) for param in group["params"]]
    assert_same_training(in_order, usual)
    assert_moved(model)
