"""One training run of the small GPT, in a process of its own: python -m examples.train adamw_ext --out DIR

Writes DIR/checkpoint.pt halfway, DIR/final.pt and DIR/record.json. ``--resume CHECKPOINT`` goes on from a checkpoint.
"""

import argparse
import json
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import adamw_ext
from examples.gpt import GPT, GPTConfig, decay_groups
from examples.text import even_batch, load_text, random_batch


@dataclass(frozen=True)
class RunConfig:
    model: GPTConfig = field(default_factory=GPTConfig)
    steps: int = 100
    warmup: int = 15
    batch: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.1
    max_norm: float = 1.0
    evaluate_every: int = 10
    held_out_windows: int = 32
    seed: int = 1711


FULL = RunConfig()
SHORT = RunConfig(GPTConfig(layers=2, width=128, context=64), steps=80, warmup=10)


def make_optimizer(name: str, groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    if name == "torch":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    return adamw_ext.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def warmup_then_cosine(optimizer: torch.optim.Optimizer, config: RunConfig) -> LambdaLR:
    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        return min((step + 1) / config.warmup, 0.1 + 0.9 * cosine)

    return LambdaLR(optimizer, factor)


class Run:
    """Model, optimizer, scheduler, text and what has been measured so far."""

    def __init__(self, optimizer: str, config: RunConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.step = 0
        self.model = GPT(config.model)
        self.optimizer = make_optimizer(optimizer, decay_groups(self.model, config.weight_decay), config)
        self.scheduler = warmup_then_cosine(self.optimizer, config)
        self.train_text, held_out_text = load_text()
        self.held_out = even_batch(held_out_text, config.held_out_windows, config.model.context)
        self.train_losses: dict[int, float] = {}
        self.held_out_losses: dict[int, float] = {}
        self.optimizer_seconds: list[float] = []

    def train_step(self) -> None:
        loss = self.model.loss(*random_batch(self.train_text, self.config.batch, self.config.model.context))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
        begin = time.perf_counter()
        self.optimizer.step()
        self.optimizer_seconds.append(time.perf_counter() - begin)
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.train_losses[self.step] = loss.item()

    @torch.no_grad()
    def evaluate(self) -> None:
        self.held_out_losses[self.step] = self.model.loss(*self.held_out).item()

    def save(self, path: Path) -> None:
        checkpoint = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "scheduler")}
        torch.save({**checkpoint, "step": self.step, "rng": torch.get_rng_state()}, path)

    def resume(self, path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        for part in ("model", "optimizer", "scheduler"):
            getattr(self, part).load_state_dict(checkpoint[part])
        self.step = checkpoint["step"]
        torch.set_rng_state(checkpoint["rng"])

    def record(self) -> dict[str, Any]:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train_losses": self.train_losses,
            "held_out_losses": self.held_out_losses,
            "optimizer_seconds": self.optimizer_seconds,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }


def train(run: Run, out: Path, label: str) -> None:
    config = run.config
    if run.step == 0:
        run.evaluate()
    with tqdm(total=config.steps, initial=run.step, desc=label, unit="step", disable=None) as bar:
        while run.step < config.steps:
            run.train_step()
            bar.update()
            if run.step == config.steps // 2:
                run.save(out / "checkpoint.pt")
            if run.step % config.evaluate_every == 0 or run.step == config.steps:
                run.evaluate()
                losses = {"train": run.train_losses[run.step], "held-out": run.held_out_losses[run.step]}
                bar.set_postfix(losses)
                if bar.disable:
                    text = ", ".join(f"{name} loss {loss:.3f}" for name, loss in losses.items())
                    print(f"{label}: step {run.step}/{config.steps}, {text}", flush=True)
    run.save(out / "final.pt")
    (out / "record.json").write_text(json.dumps(run.record()))


# What a process needs in its environment for the same.
ENVIRONMENT = {
    # The same matrix kernels in every process, whatever the moment's load.
    "MKL_CBWR": "AUTO",
    "MKL_DYNAMIC": "FALSE",
    # Waiting threads give their core away, so that other work on the machine costs little.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def make_reproducible(threads: int) -> None:
    """The model's own arithmetic gives the same bits in every process with the same thread count and ENVIRONMENT."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer", choices=["torch", "adamw_ext"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--short", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    make_reproducible(args.threads)
    run = Run(args.optimizer, SHORT if args.short else FULL)
    if args.resume:
        run.resume(args.resume)
    train(run, args.out, f"{args.optimizer}, resumed" if args.resume else args.optimizer)


if __name__ == "__main__":
    main()
