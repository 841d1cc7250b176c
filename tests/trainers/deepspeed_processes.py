"""What test_deepspeed.py runs in two processes: trainings by DeepSpeed's engine on the CPU, over gloo."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

import adamw_ext
from tests.helpers import on_cpu
from tests.trainers.helpers import Outcome, outcome

ACCUMULATION, STEPS = 2, 6
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-5}
BFLOAT16 = {"bf16": {"enabled": True}}
CONFIGS: dict[str, dict[str, Any]] = {
    "stage0-float32": {"zero_optimization": {"stage": 0}},
    "stage1-float32": {"zero_optimization": {"stage": 1}},
    "stage2-float32": {"zero_optimization": {"stage": 2}},
    "stage3-float32": {"zero_optimization": {"stage": 3}},
    "stage2-offload": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "stage0-bfloat16": {"zero_optimization": {"stage": 0}, **BFLOAT16},
    "stage1-bfloat16": {"zero_optimization": {"stage": 1}, **BFLOAT16},
    "stage2-bfloat16": {"zero_optimization": {"stage": 2}, **BFLOAT16},
}


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def make_engine(cls: type[torch.optim.AdamW], config: dict[str, Any], *, seed: int = 0, **options: Any) -> Any:
    model = make_model(seed)
    groups = [
        {"params": [param for param in model.parameters() if param.ndim > 1], "weight_decay": 0.1},
        {"params": [param for param in model.parameters() if param.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = cls(groups, **HYPER, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.5,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            **config,
        },
    )
    assert engine.basic_optimizer is optimizer
    return engine


def train(rank: int, engine: Any, steps: range = range(STEPS), save_at: int | None = None, folder: str = "") -> Outcome:
    """Train on batches of this rank's own; the state is of the rank's share of the params."""
    dtype = engine.get_data_types()[0]
    losses = []
    for step in steps:
        for batch in range(ACCUMULATION):
            generator = torch.Generator().manual_seed(100 * step + 10 * batch + rank)
            inputs = torch.randn(4, 6, generator=generator)
            targets = 0.5 * inputs[:, :3].square() + inputs[:, 3:]
            loss = nn.functional.mse_loss(engine(inputs.to(dtype)).float(), targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if step + 1 == save_at:
            engine.save_checkpoint(folder)
    params = list(engine.module.parameters())
    is_stage3 = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(params, enabled=is_stage3):
        whole = on_cpu(params)
    optimizer = engine.basic_optimizer
    owners = list(optimizer.state) if is_stage3 else None  # its groups are empty between steps
    if is_stage3:
        assert len(owners) == 2  # a flat tensor for each group
    return outcome(losses, whole, optimizer, owners)


def refusal(config: dict[str, Any]) -> str:
    """The words with which DeepSpeed refuses to make an engine."""
    try:
        make_engine(adamw_ext.AdamW, config)
    except (AssertionError, deepspeed.runtime.zero.utils.ZeRORuntimeException) as error:
        return str(error)
    raise AssertionError("was not refused")


def train_all(rank: int, folder: str) -> None:
    """Writes {name: outcomes or a text} to <folder>/<rank>.pt."""
    deepspeed.init_distributed(dist_backend="gloo")
    results: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        saved = str(Path(folder) / name)
        ours = train(rank, make_engine(adamw_ext.AdamW, config))
        theirs = train(rank, make_engine(torch.optim.AdamW, config))
        unbroken = train(rank, make_engine(adamw_ext.AdamW, config, amsgrad=True), save_at=2, folder=saved)
        engine = make_engine(adamw_ext.AdamW, config, amsgrad=True, seed=1)  # what is not loaded must show
        engine.load_checkpoint(saved)
        assert engine.global_steps == 2
        resumed = train(rank, engine, range(2, STEPS))
        results[name] = (ours, theirs, unbroken, resumed)
    results["untested"] = refusal({"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": False})
    results["offload"] = refusal(CONFIGS["stage2-offload"] | {"zero_force_ds_cpu_optimizer": True})
    torch.save(results, Path(folder) / f"{rank}.pt")
