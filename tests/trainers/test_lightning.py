"""Lightning: automatic and manual optimization, its precisions, clipping, closures, schedules and checkpoints."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adamw_ext
from tests.helpers import assert_same_bits, on_cpu
from tests.trainers.helpers import Outcome, assert_continued, assert_trained_alike, outcome

pytestmark = pytest.mark.trainers

EPOCHS, STEPS = 3, 6  # optimizer steps in all
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
SPLIT: dict[str, Any] = {"master_weights": "split", "stochastic_rounding": True, "max_grad_norm": 0.5}

# Float32 params differ by their rounding, about 1e-7 of each in a step; eps keeps gradients that are nearly 0 from
# blowing it up. Under autocast a difference of one bit can become one of bfloat16's, 2^-8, in an activation. A param
# moves by about 4e-2 in all; a float64 one is rounded to 1e-16.
TOLERANCES = {
    "32-true": {"rtol": 1e-4, "atol": 1e-5},
    "bf16-mixed": {"rtol": 1e-2, "atol": 1e-3},
    "16-mixed": {"rtol": 1e-2, "atol": 1e-3},
    "64-true": {"rtol": 1e-11, "atol": 1e-12},
}


class Regression(lightning.LightningModule):
    def __init__(self, cls: type[torch.optim.AdamW], hyper: dict[str, Any], *, manual: bool = False, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
        self.cls, self.hyper = cls, {**HYPER, **hyper}
        self.automatic_optimization = not manual
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.overflow_at: int | None = None  # a step whose gradients are made infinite

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(self.parameters(), **self.hyper)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def loss_of(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs).to(targets.dtype), targets)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor | None:
        self.rates.append(self.lr_schedulers().get_last_lr()[0])
        if self.automatic_optimization:
            return self.loss_of(batch)
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss_of(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            return loss

        optimizer.step(closure=closure)
        self.lr_schedulers().step()
        return None

    def on_after_backward(self) -> None:
        if self.overflow_at == len(self.losses):
            self.net[3].bias.grad[1] = torch.inf


class KeepStart(Callback):
    """Notes the params as they are when the training begins."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.params = on_cpu(pl_module.parameters())


def train(
    cls: type[torch.optim.AdamW],
    hyper: dict[str, Any],
    *,
    precision: str | None = "32-true",
    clip: float | None = 0.5,
    accumulate: int = 1,
    manual: bool = False,
    save_to: Path | None = None,
    resume: Path | None = None,
    plugins: list[Any] | None = None,
    overflow_at: int | None = None,
) -> tuple[Outcome, Regression, list[Tensor]]:
    """Train; also returns the module and its params before the training, in the precision's dtype."""
    module = Regression(cls, hyper, manual=manual, seed=1 if resume else 0)  # what is not loaded must show
    module.overflow_at = overflow_at
    start = KeepStart()
    callbacks: list[Callback] = [start]
    if save_to is not None:
        callbacks.append(ModelCheckpoint(dirpath=save_to, filename="{epoch}", save_top_k=-1, every_n_epochs=1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        precision=precision,
        plugins=plugins,
        gradient_clip_val=None if manual else clip,
        gradient_clip_algorithm="norm",
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        enable_checkpointing=save_to is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(4 * accumulate * STEPS // EPOCHS, 6, generator=generator)
    data = TensorDataset(inputs, 0.5 * inputs[:, :3].square() + inputs[:, 3:])
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is cls
    return outcome(module.losses, module, optimizer), module, start.params


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_trains_as_with_torchs(precision: str, manual: bool):
    ours, module, start = train(adamw_ext.AdamW, {}, precision=precision, manual=manual)
    theirs, torchs_module, _ = train(torch.optim.AdamW, {}, precision=precision, manual=manual)
    assert_trained_alike(ours, theirs, start, steps=STEPS, **TOLERANCES[precision])
    assert len(ours.losses) == STEPS  # the closure ran once a step
    assert module.rates == torchs_module.rates
    assert len(set(module.rates)) == STEPS


def test_accumulates_gradients_as_with_torchs():
    ours, _, start = train(adamw_ext.AdamW, {}, accumulate=2)
    theirs, _, _ = train(torch.optim.AdamW, {}, accumulate=2)
    assert_trained_alike(ours, theirs, start, steps=STEPS, **TOLERANCES["32-true"])
    assert len(ours.losses) == 2 * STEPS


def test_a_bfloat16_model_takes_our_options():
    ours, module, _ = train(adamw_ext.AdamW, SPLIT, precision="bf16-true", clip=None)
    whole, _, _ = train(adamw_ext.AdamW, {**SPLIT, "master_weights": "fp32"}, precision="bf16-true", clip=None)
    assert {param.dtype for param in ours.params} == {torch.bfloat16}
    assert {tensor.dtype for tensor in ours.state} == {torch.bfloat16, torch.int16}
    assert ours.steps == [STEPS] * len(ours.params)
    assert_same_bits(ours.params, whole.params)
    assert module.optimizers().optimizer.grad_norm.item() > 0.5


def test_clipping_in_the_optimizer_is_lightnings():
    """Up to the rounding of the coefficient: Lightning's gradients are rounded once more."""
    inside, _, start = train(adamw_ext.AdamW, {"max_grad_norm": 0.5}, clip=None)
    outside, _, _ = train(adamw_ext.AdamW, {}, clip=0.5)
    unclipped, _, _ = train(adamw_ext.AdamW, {}, clip=None)
    assert_trained_alike(inside, outside, start, steps=STEPS, **TOLERANCES["32-true"])
    assert not all(torch.allclose(a, b, 1e-3, 1e-4) for a, b in zip(inside.params, unclipped.params, strict=True))


@pytest.mark.parametrize(
    ("hyper", "how"),
    [
        ({}, {"precision": "bf16-mixed"}),
        ({"amsgrad": True}, {"manual": True}),
        (SPLIT, {"precision": "bf16-true", "clip": None}),
    ],
    ids=["bf16-mixed", "manual", "split"],
)
def test_resumed_from_a_checkpoint_the_bits_are_those_of_never_stopping(
    hyper: dict[str, Any], how: dict[str, Any], tmp_path: Path
):
    unbroken, module, _ = train(adamw_ext.AdamW, hyper, save_to=tmp_path, **how)
    resumed, resumed_module, _ = train(adamw_ext.AdamW, hyper, resume=tmp_path / "epoch=0.ckpt", **how)
    assert len(resumed.losses) == STEPS - STEPS // EPOCHS
    assert resumed_module.rates == module.rates[-len(resumed.losses) :]
    assert_continued(resumed, unbroken)


# --- Float16: Lightning takes bfloat16 instead on the CPU, unless it is handed the plugin ----------------------------


def train_float16(cls: type[torch.optim.AdamW], hyper: dict[str, Any], **how: Any) -> tuple[Outcome, list[Tensor]]:
    """Six steps, of which the third overflows."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    result, _, start = train(cls, hyper, precision=None, plugins=[plugin], overflow_at=3, **how)
    assert plugin.scaler.get_scale() == 128.0
    return result, start


def test_a_step_that_overflows_is_skipped():
    ours, start = train_float16(adamw_ext.AdamW, {})
    theirs, _ = train_float16(torch.optim.AdamW, {})
    assert_trained_alike(ours, theirs, start, steps=STEPS - 1, **TOLERANCES["16-mixed"])


def test_a_step_that_overflows_is_skipped_by_an_amp_aware_optimizer():
    """It also clips, which Lightning refuses to do for it."""
    ours, start = train_float16(adamw_ext.AdamW, {"fused": True}, clip=None)
    theirs, _ = train_float16(torch.optim.AdamW, {"fused": True}, clip=None)
    assert_trained_alike(ours, theirs, start, steps=STEPS - 1, **TOLERANCES["16-mixed"])
    clipping, _ = train_float16(adamw_ext.AdamW, {"fused": True, "max_grad_norm": 0.5}, clip=None)
    clipped, _ = train_float16(adamw_ext.AdamW, {}, clip=0.5)
    assert_trained_alike(clipping, clipped, start, steps=STEPS - 1, **TOLERANCES["16-mixed"])


@pytest.mark.parametrize("cls", [adamw_ext.AdamW, torch.optim.AdamW], ids=["ours", "torchs"])
def test_lightning_refuses_to_clip_for_an_amp_aware_optimizer(cls: type[torch.optim.AdamW]):
    """Without a loss scaler too: https://github.com/Lightning-AI/pytorch-lightning/issues/21435."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        train(cls, {"fused": True}, precision="bf16-mixed")
    train(cls, {"fused": True}, precision="32-true")
