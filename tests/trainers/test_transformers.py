"""Hugging Face transformers: the Trainer's own loop with our optimizer, in both ways that it takes one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_scheduler

import adamw_ext
from tests.helpers import assert_same_bits, on_cpu
from tests.trainers.helpers import Outcome, assert_continued, assert_trained_alike, outcome

pytestmark = pytest.mark.trainers

STEPS = 6
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95)}
BFLOAT16_OPTIONS: dict[str, Any] = {"master_weights": "split", "stochastic_rounding": True, "max_grad_norm": 0.5}

# Float32 params differ by their rounding, about 1e-7 of each in a step; eps keeps gradients that are nearly 0 from
# blowing it up. Under autocast a difference of one bit can become one of bfloat16's, 2^-8, in an activation. A param
# moves by about 3e-2 in all.
TOLERANCES = {False: {"rtol": 1e-4, "atol": 1e-5}, True: {"rtol": 1e-2, "atol": 1e-3}}


class Sentences(torch.utils.data.Dataset):
    """Counting upwards from somewhere, modulo 32."""

    def __len__(self) -> int:
        return 2 * 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(8) + 5 * index) % 32
        return {"input_ids": tokens, "labels": tokens}


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype)


def make_arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=HYPER["lr"],
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "max_grad_norm": 0.5,
            "save_strategy": "no",
            **options,
        },
    )


def train(
    cls: type[torch.optim.AdamW],
    folder: Path,
    *,
    by: str = "class",
    dtype: torch.dtype = torch.float32,
    resume: str | None = None,
    hyper: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Outcome, Trainer, torch.optim.AdamW]:
    """Train with an optimizer that the Trainer makes from its class, or with one that it is given with its schedule."""
    model = make_model(dtype, seed=1 if resume else 0)  # what is not loaded must show
    hyper = {**HYPER, **(hyper or {})}
    how: dict[str, Any] = {"optimizer_cls_and_kwargs": (cls, hyper)}
    if by == "object":
        optimizer = cls(model.parameters(), weight_decay=0.1, **hyper)
        how = {"optimizers": (optimizer, get_scheduler("linear", optimizer, 2, STEPS))}
    trainer = Trainer(model=model, args=make_arguments(folder, **arguments), train_dataset=Sentences(), **how)
    trainer.train(resume_from_checkpoint=resume)
    optimizer = trainer.optimizer.optimizer  # Accelerate's wrapper is around it
    assert type(optimizer) is cls
    return (
        outcome([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model, optimizer),
        trainer,
        optimizer,
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16_autocast"])
@pytest.mark.parametrize("by", ["class", "object"])
def test_trains_as_with_torchs(by: str, autocast: bool, tmp_path: Path):
    hyper = {"eps": 1e-5}
    ours, trainer, _ = train(adamw_ext.AdamW, tmp_path, by=by, bf16=autocast, hyper=hyper)
    theirs, torchs_trainer, _ = train(torch.optim.AdamW, tmp_path, by=by, bf16=autocast, hyper=hyper)
    start = on_cpu(make_model().parameters())
    assert_trained_alike(ours, theirs, start, steps=STEPS, **TOLERANCES[autocast])
    rates, norms = (
        [[entry[key] for entry in each.state.log_history if key in entry] for each in (trainer, torchs_trainer)]
        for key in ("learning_rate", "grad_norm")
    )
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 3  # the schedule moves
    assert min(norms[0]) > 0.5  # every step is clipped
    assert norms[0] == pytest.approx(norms[1], rel=TOLERANCES[autocast]["rtol"])


def test_the_trainer_makes_a_group_with_and_one_without_decay(tmp_path: Path):
    _, trainer, optimizer = train(adamw_ext.AdamW, tmp_path)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    model = trainer.model
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        sum(param.ndim > 1 for param in model.parameters()),
        sum(param.ndim <= 1 for param in model.parameters()),
    ]


def test_our_options_reach_a_bfloat16_model(tmp_path: Path):
    """With float32 masters kept in two ways, which have the same bits; the Trainer's own clipping is off."""
    split, _, optimizer = train(
        adamw_ext.AdamW, tmp_path, dtype=torch.bfloat16, hyper=BFLOAT16_OPTIONS, max_grad_norm=0.0
    )
    whole, _, _ = train(
        adamw_ext.AdamW,
        tmp_path,
        dtype=torch.bfloat16,
        hyper={**BFLOAT16_OPTIONS, "master_weights": "fp32"},
        max_grad_norm=0.0,
    )
    assert {param.dtype for param in split.params} == {torch.bfloat16}
    assert all(state["param_remainder"].dtype == torch.int16 for state in optimizer.state.values())
    assert all(group["max_grad_norm"] == 0.5 for group in optimizer.param_groups)
    assert split.steps == [STEPS] * len(split.params)
    assert split.losses[-1] < split.losses[0]
    assert_same_bits(split.params, whole.params)


def test_clipping_in_the_optimizer_is_the_trainers(tmp_path: Path):
    """Up to the rounding of the coefficient: the Trainer's gradients are rounded once more."""
    inside, _, optimizer = train(
        adamw_ext.AdamW, tmp_path, hyper={"eps": 1e-5, "max_grad_norm": 0.5}, max_grad_norm=0.0
    )
    outside, clipping_trainer, _ = train(adamw_ext.AdamW, tmp_path, hyper={"eps": 1e-5})
    start = on_cpu(make_model().parameters())
    assert_trained_alike(inside, outside, start, steps=STEPS, **TOLERANCES[False])
    last = [entry["grad_norm"] for entry in clipping_trainer.state.log_history if "grad_norm" in entry][-1]
    assert optimizer.grad_norm.item() == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("by", ["class", "object"])
@pytest.mark.parametrize(
    ("dtype", "hyper", "arguments"),
    [
        (torch.float32, {}, {"bf16": True}),
        (torch.float32, {"amsgrad": True, "fused": True}, {}),
        (torch.bfloat16, BFLOAT16_OPTIONS, {"max_grad_norm": 0.0}),
    ],
    ids=["bf16_autocast", "amsgrad_fused", "split"],
)
def test_resumed_from_a_checkpoint_the_bits_are_those_of_never_stopping(
    by: str, dtype: torch.dtype, hyper: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
):
    how: dict[str, Any] = {"by": by, "dtype": dtype, "hyper": hyper, **arguments}
    unbroken, _, _ = train(adamw_ext.AdamW, tmp_path, save_strategy="steps", save_steps=STEPS // 2, **how)
    resumed, _, _ = train(adamw_ext.AdamW, tmp_path, resume=str(tmp_path / f"checkpoint-{STEPS // 2}"), **how)
    assert len(resumed.losses) == STEPS  # the log is part of the checkpoint
    assert_continued(resumed, unbroken)


def test_a_checkpoint_of_torchs_continues_here(tmp_path: Path):
    hyper = {"eps": 1e-5}
    theirs, _, _ = train(torch.optim.AdamW, tmp_path, hyper=hyper, save_strategy="steps", save_steps=STEPS // 2)
    ours, _, _ = train(adamw_ext.AdamW, tmp_path, hyper=hyper, resume=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    start = on_cpu(make_model().parameters())
    assert_trained_alike(ours, theirs, start, steps=STEPS, **TOLERANCES[False])
