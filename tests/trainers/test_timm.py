"""timm: registered in its optimizer factory, with its param groups, schedulers, loss scaler and checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import resume_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, NativeScaler
from torch import Tensor, nn

import adamw_ext
from tests.helpers import assert_same_bits, on_cpu
from tests.trainers.helpers import Outcome, assert_continued, assert_trained_alike, outcome

pytestmark = pytest.mark.trainers

EPOCHS, BATCHES = 4, 2
HYPER: dict[str, Any] = {"lr": 2e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}

# Float32 params differ by their rounding, about 1e-7 of each in a step, which gradients amplify: less where eps keeps
# those that are nearly 0 (of biases before a norm) from being normalised. A param moves by about 1e-2 in all.
ROUNDING: dict[str, Any] = {"eps": 1e-4}
TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    info = OptimInfo(name="adamwext", opt_class=adamw_ext.AdamW, has_betas=True)  # what follows a "_" would be the name
    default_registry.register(info)


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=4, **options).to(dtype)
    return model.to(memory_format=torch.channels_last) if "resnet" in name else model


def loss_of(model: nn.Module, epoch: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * epoch + batch)
    images = torch.randn(4, 3, 32, 32, generator=generator).to(next(model.parameters()).dtype)
    labels = torch.randint(0, 4, (4,), generator=generator)
    return nn.functional.cross_entropy(model(images).float(), labels)


def make_schedule(optimizer: torch.optim.Optimizer) -> Any:
    return create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, min_lr=1e-5)[0]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: range = range(EPOCHS),
    scaler: NativeScaler | None = None,
    clip_grad: float | None = None,
    saver: CheckpointSaver | None = None,
) -> Outcome:
    schedule = make_schedule(optimizer)
    schedule.step(epochs.start)
    losses = []
    for epoch in epochs:
        for batch in range(BATCHES):
            optimizer.zero_grad()
            loss = loss_of(model, epoch, batch)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler(loss, optimizer, clip_grad=clip_grad, parameters=model.parameters())
            losses.append(loss.item())
        schedule.step(epoch + 1)
        if saver is not None:
            saver.save_checkpoint(epoch)
    return outcome(losses, model, optimizer)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("clip_grad", [None, 0.5])
def test_trains_as_with_torchs(name: str, layer_decay: float | None, clip_grad: float | None):
    outcomes = []
    for opt, expected in (("adamwext", adamw_ext.AdamW), ("adamw", torch.optim.AdamW)):
        model = make_model(name)
        start = on_cpu(model.parameters())
        optimizer = create_optimizer_v2(model, opt=opt, layer_decay=layer_decay, **HYPER, **ROUNDING)
        assert type(optimizer) is expected
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
        assert all(("lr_scale" in group) == (layer_decay is not None) for group in optimizer.param_groups)
        outcomes.append(train(model, optimizer, scaler=NativeScaler(device="cpu"), clip_grad=clip_grad))
    assert_trained_alike(*outcomes, start, steps=EPOCHS * BATCHES, **TOLERANCE)


def test_the_schedule_reaches_every_group_through_its_lr_scale():
    model = make_model("test_vit")
    optimizer = create_optimizer_v2(model, opt="adamwext", layer_decay=0.7, **HYPER)
    make_schedule(optimizer).step(1)
    rates = [group["lr"] / group["lr_scale"] for group in optimizer.param_groups]
    assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-12)
    before = on_cpu(model.parameters())
    loss_of(model, 0, 0).backward()
    optimizer.step()  # the first, without decay of 1-d params, moves them by lr where the gradient is far above eps
    moved = {id(p): (p.detach() - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)}
    for group in optimizer.param_groups:
        if group["weight_decay"] == 0.0:
            assert max(moved[id(p)] for p in group["params"]) == pytest.approx(group["lr"], rel=1e-3)


def test_the_factory_passes_our_options():
    model = make_model("test_vit", torch.bfloat16)
    optimizer = create_optimizer_v2(
        model, opt="adamwext", master_weights="split", stochastic_rounding=True, max_grad_norm=0.5, **HYPER
    )
    twin_model = make_model("test_vit", torch.bfloat16)
    twin = create_optimizer_v2(
        twin_model, opt="adamwext", master_weights="fp32", stochastic_rounding=True, max_grad_norm=0.5, **HYPER
    )
    ours, theirs = train(model, optimizer), train(twin_model, twin)
    assert {param.dtype for param in ours.params} == {torch.bfloat16}
    assert all(optimizer.state[param]["param_remainder"].dtype == torch.int16 for param in model.parameters())
    assert ours.losses == theirs.losses
    assert_same_bits(ours.params, theirs.params)
    assert ours.steps == [EPOCHS * BATCHES] * len(ours.params)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"layer_decay": 0.7, "amsgrad": True}),
        (torch.bfloat16, {"master_weights": "split", "stochastic_rounding": True, "max_grad_norm": 0.5}),
    ],
    ids=["default", "layer_decay", "split"],
)
def test_resumed_from_timms_checkpoint_the_bits_are_those_of_never_stopping(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
):
    def start() -> tuple[nn.Module, torch.optim.Optimizer, NativeScaler]:
        model = make_model("test_resnet", dtype)
        return model, create_optimizer_v2(model, opt="adamwext", **HYPER, **options), NativeScaler(device="cpu")

    model, optimizer, scaler = start()
    saver = CheckpointSaver(model, optimizer, amp_scaler=scaler, checkpoint_dir=str(tmp_path))
    unbroken = train(model, optimizer, scaler=scaler, saver=saver)

    model, optimizer, scaler = start()
    epoch = resume_checkpoint(model, str(tmp_path / "checkpoint-1.pth.tar"), optimizer, scaler, log_info=False)
    assert epoch == 2
    assert_continued(train(model, optimizer, range(epoch, EPOCHS), scaler=scaler), unbroken)
