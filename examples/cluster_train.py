"""One worker of a sharded training of the small GPT, of which torchrun starts as many as it is told:

torchrun --standalone --nproc-per-node 2 -m examples.cluster_train --out DIR

The batches are the same for every number of workers. A worker goes on from the newest complete checkpoint in
DIR/checkpoints, else from --resume, else begins anew. Rank 0 adds a line to DIR/log.jsonl for every step, and writes
the whole params and optimizer state to DIR/final.pt.
"""

import argparse
import json
import os
import shutil
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import adamw_ext
from examples.gpt import GPT, GPTConfig, decay_groups
from examples.text import even_batch, load_text, random_batch
from examples.train import RunConfig, make_reproducible, warmup_then_cosine


@dataclass(frozen=True)
class ClusterConfig(RunConfig):
    checkpoint_every: int = 20


FULL = ClusterConfig(GPTConfig(layers=4, width=128, context=64), steps=80, batch=16, warmup=10)
SHORT = ClusterConfig(GPTConfig(layers=2, width=64, context=64), steps=20, batch=16, warmup=4, checkpoint_every=5)


class Training(Stateful):
    """Model, optimizer and scheduler of this worker, and how many steps they have made.

    torch.distributed.checkpoint saves and loads it, for any number of workers.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.step = 0
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.seed)  # every worker makes the whole model, and keeps its part
        self.model = GPT(config.model)
        mesh = init_device_mesh("cpu", (self.workers,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = adamw_ext.AdamW(
            decay_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=(0.9, 0.95),
            max_grad_norm=config.max_norm,
        )
        self.scheduler = warmup_then_cosine(self.optimizer, config)
        self.train_text, self.held_out_text = load_text()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model, optimizer = state_dict["model"], state_dict["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.step = state_dict["step"]

    def whole(self) -> dict[str, Any]:
        """What :meth:`state_dict` has, with whole tensors: on rank 0; on others empty."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of the next step's batch, which follows from the seed and the step alone."""
        generator = torch.Generator().manual_seed(self.config.seed + self.step)
        whole = random_batch(self.train_text, self.config.batch, self.config.model.context, generator)
        return self.part(*whole)

    def part(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.tensor_split(self.workers)[self.rank], targets.tensor_split(self.workers)[self.rank]

    def train_step(self) -> float:
        """The loss over the whole batch."""
        loss = self.model.loss(*self.batch())
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.mean(loss.detach())

    @torch.no_grad()
    def held_out_loss(self) -> float:
        windows = even_batch(self.held_out_text, self.config.held_out_windows, self.config.model.context)
        loss = self.model.loss(*self.part(*windows))
        self.model.reshard()  # as a backward would
        return self.mean(loss)

    def mean(self, loss: torch.Tensor) -> float:
        dist.all_reduce(loss)
        return loss.item() / self.workers


def save_checkpoint(content: Stateful, step: int, folder: Path) -> None:
    """Write folder/step-STEP, by all workers together.

    It has another name until it is complete, so that no kill at any time leaves a checkpoint that cannot be loaded.
    """
    partial = folder / f"partial-{step:06d}"
    dcp.save({"training": content}, checkpoint_id=partial)  # returns when all workers have written
    if dist.get_rank() == 0:
        partial.rename(folder / f"step-{step:06d}")
    dist.barrier()


def newest_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob("step-*"), default=None)


def remove_partial_checkpoints(folder: Path) -> None:
    for partial in folder.glob("partial-*"):
        shutil.rmtree(partial)


def run(training: Training, out: Path, log: TextIO | None, die_before_step: int | None) -> None:
    """Train to the end. ``log``: where rank 0 writes what happened, a line of JSON each."""

    def note(**happened: Any) -> None:
        if log:
            print(json.dumps(happened), file=log, flush=True)  # at once: this process may be killed

    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    note(life=life, from_step=training.step, workers=training.workers, pid=os.getpid())
    if training.step == 0:
        note(step=0, held_out_loss=training.held_out_loss())
    while training.step < training.config.steps:
        if life == 0 and training.rank == 0 and training.step + 1 == die_before_step:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = training.train_step()
        note(step=training.step, loss=loss)
        if training.step % training.config.checkpoint_every == 0:
            save_checkpoint(training, training.step, out / "checkpoints")
    note(step=training.step, held_out_loss=training.held_out_loss())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--short", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--die-before-step", type=int, metavar="STEP", help="rank 0 kills itself there, once")
    args = parser.parse_args()
    make_reproducible(threads=1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    training = Training(SHORT if args.short else FULL)
    checkpoints, log = args.out / "checkpoints", None
    if training.rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_partial_checkpoints(checkpoints)
        log = (args.out / "log.jsonl").open("a")
    dist.barrier()
    if checkpoint := newest_checkpoint(checkpoints) or args.resume:
        dcp.load({"training": training}, checkpoint_id=checkpoint)
    run(training, args.out, log, args.die_before_step)
    final = training.whole()
    if training.rank == 0:
        torch.save(final, args.out / "final.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
