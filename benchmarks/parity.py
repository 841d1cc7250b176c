"""Trains small networks to the end of a cosine schedule in every precision mode: python -m benchmarks.parity

Writes parity.json and parity.md: the final losses against those of float32, and which of the bounds they keep.

What the modes differ in must be the only thing that the losses show, so the task is made of what keeps all else out:

- Three tokens of a synthetic language: the third is drawn from a distribution that a random teacher network gives for
  the first two. The final loss is the exact expectation over all pairs and tokens, without the noise of an evaluation
  set. Every seed has a teacher, a start and data of its own.
- Batches are small and drawn afresh, so that gradients are noisy and the last, small steps are what averages the noise
  out; these are the steps that plain bfloat16 weights lose. A weight near 0.1 has neighbours 5e-4 away, so a step below
  2.4e-4 is lost, and with a peak lr of 1e-3 and noisy gradients most steps are.
- All arithmetic but the optimizer's is float32: bfloat16 weights are widened before they are used. All modes start from
  the same bfloat16 numbers and see the same batches.
- One hidden layer, a warm-up and a peak lr well below where training becomes unstable: what nudges the start fades
  instead of growing. The mode "float32, start moved" shows how much of a difference means nothing: 0.002% of the mean
  and 0.01% of a single seed at most, at this lr, at a third of it and at four times it, where all bounds hold as well.
"""

import argparse
import json
import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

import adamw_ext
from benchmarks.precision import BF16, FLOAT32, MODES, Mode
from benchmarks.report import table

SEEDS = (0, 1, 2)
STEPS, WARM_UP_STEPS, BATCH = 1_000, 50, 128
LR, WEIGHT_DECAY = 1e-3, 0.1
TOKENS, EMBEDDING, HIDDEN = 32, 16, 64
TEACHER_SHARPNESS = 2.0  # the entropy of its tokens is then about 2.2; of even ones, 3.5

REFERENCE = "float32"
MOVED = "float32, start moved"
PLAIN_EXCESS = 0.01  # plain bfloat16 must be worse by more than this, or the others' closeness proves nothing

# The most by which the mean final loss may differ from the reference's, as a fraction of it. "bf16, split master" has
# no bound: its master loses nothing, but its moments are rounded to nearest, which costs more the longer the run is.
BOUNDS = {
    MOVED: 0.0002,
    "float32, bf16 moments, SR": 0.001,
    "bf16, fp32 master, fp32 moments": 0.001,
    "bf16, split master, fp32 moments": 0.001,
    "bf16, split master, SR": 0.001,
    "bf16, SR, fp32 moments": 0.002,
    "bf16, SR": 0.002,
}
MUST_FAIL = ("bf16", "bf16, fp32 moments")


@dataclass(frozen=True)
class Task:
    """What all modes learn: one row a seed in each tensor.

    ``likelihoods[seed, pair]`` is the distribution of the third token; ``pairs[step]`` and ``thirds[step]`` are the
    batches, of shape (seeds, BATCH).
    """

    likelihoods: Tensor
    pairs: Tensor
    thirds: Tensor
    start: list[Tensor]

    @property
    def entropy(self) -> float:
        """The least loss that there is."""
        return -(self.likelihoods * self.likelihoods.log()).sum(-1).mean().item()


def make_task(seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> Task:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    teachers = make_networks(generators)
    start = [tensor.to(BF16) for tensor in make_networks(generators)]
    logits = TEACHER_SHARPNESS * forward(teachers, all_pairs(len(seeds)))
    likelihoods = logits.softmax(-1)
    shape = (steps, BATCH)
    pairs = torch.stack([torch.randint(TOKENS**2, shape, generator=one) for one in generators], 1)
    chances = torch.stack([torch.rand(shape, generator=one) for one in generators], 1)
    cumulated = likelihoods.cumsum(-1)
    thirds = torch.empty_like(pairs)
    for step in range(steps):
        chosen = cumulated[torch.arange(len(seeds))[:, None], pairs[step]]
        thirds[step] = (chosen < chances[step, ..., None]).sum(-1).clamp_(max=TOKENS - 1)
    return Task(likelihoods, pairs, thirds, start)


def make_networks(generators: list[torch.Generator]) -> list[Tensor]:
    """Embeddings of the first and the second token, a hidden layer, and an output layer, for every seed."""

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return scale * torch.stack([torch.randn(rows, columns, generator=one) for one in generators])

    return [
        normal(2 * TOKENS, EMBEDDING, 1.0),
        normal(2 * EMBEDDING, HIDDEN, EMBEDDING**-0.5),
        torch.zeros(len(generators), 1, HIDDEN),
        normal(HIDDEN, TOKENS, HIDDEN**-0.5),
        torch.zeros(len(generators), 1, TOKENS),
    ]


def all_pairs(seeds: int) -> Tensor:
    return torch.arange(TOKENS**2).expand(seeds, -1)


def forward(network: list[Tensor], pairs: Tensor) -> Tensor:
    """Logits of the third token, (seeds, pairs, TOKENS), in float32."""
    embeddings, hidden, hidden_bias, output, output_bias = (tensor.float() for tensor in network)
    first_row = 2 * TOKENS * torch.arange(len(pairs))[:, None]
    rows = torch.stack([first_row + pairs // TOKENS, first_row + TOKENS + pairs % TOKENS], -1)
    embedded = F.embedding(rows, embeddings.flatten(0, 1)).flatten(-2)
    return torch.baddbmm(output_bias, torch.baddbmm(hidden_bias, embedded, hidden).relu(), output)


def train(mode: Mode, task: Task, *, moved: bool = False) -> list[float]:
    """The final loss of each seed. ``moved`` shifts every weight of the start by up to half a bfloat16 step."""
    params = [Parameter(tensor.to(mode.dtype, copy=True)) for tensor in task.start]
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in params:
                param.mul_(1 + 2**-8 * (torch.rand(param.shape, generator=generator) - 0.5))
    optimizer = adamw_ext.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **mode.options)
    steps = len(task.pairs)
    for step in range(steps):
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        optimizer.param_groups[0]["lr"] = LR * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
        logits = forward(params, task.pairs[step])
        loss = F.cross_entropy(logits.flatten(0, 1), task.thirds[step].flatten(), reduction="sum") / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return final_losses(params, task)


@torch.no_grad()
def final_losses(network: list[Tensor], task: Task) -> list[float]:
    """The exact expectation for each seed, of the weights that a user has: a mode's params, not its masters."""
    seeds = len(task.likelihoods)
    losses = -(task.likelihoods * forward(network, all_pairs(seeds)).log_softmax(-1)).sum(-1)
    return losses.double().mean(-1).tolist()


def measure(steps: int = STEPS) -> dict[str, Any]:
    """Losses of all modes, in the form that goes into the JSON; ``excess`` is that over the reference's mean loss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    try:
        task = make_task(steps=steps)
        runs = {mode.name: train(mode, task) for mode in MODES}
        runs[MOVED] = train(FLOAT32, task, moved=True)
        at_start = final_losses(task.start, task)
    finally:
        torch.set_num_threads(threads)
    reference = runs[REFERENCE]
    modes = {}
    for name in [REFERENCE, MOVED, *(mode.name for mode in MODES if mode is not FLOAT32)]:
        losses = runs[name]
        excesses = [loss / other - 1 for loss, other in zip(losses, reference, strict=True)]
        modes[name] = {
            "losses": losses,
            "loss": sum(losses) / len(losses),
            "excess": sum(losses) / sum(reference) - 1,
            "largest": max(excesses, key=abs),
        }
    return {"steps": steps, "seeds": SEEDS, "entropy": task.entropy, "loss_at_start": at_start, "modes": modes}


def verdict(name: str, excess: float) -> str:
    """What is asked of a mode, and whether this excess meets it."""
    if name in MUST_FAIL:
        return f"> +{PLAIN_EXCESS:.0%}: {'yes' if excess > PLAIN_EXCESS else 'NO'}"
    if name in BOUNDS:
        return f"<= {BOUNDS[name]:.2%}: {'yes' if abs(excess) <= BOUNDS[name] else 'NO'}"
    return ""


def markdown(result: dict[str, Any]) -> str:
    rows = []
    for name, mode in result["modes"].items():
        numbers = [f"{mode['loss']:.5f}", f"{mode['excess']:+.4%}", f"{mode['largest']:+.4%}"]
        rows.append([name, *numbers, verdict(name, mode["excess"])])
    start = sum(result["loss_at_start"]) / len(result["loss_at_start"])
    build = result["build"]
    facts = (
        f"{result['date']}: {result['steps']:,} steps of batches of {BATCH}, cosine schedule from lr {LR:g} to 0, "
        f"weight decay {WEIGHT_DECAY:g}, mean of {len(result['seeds'])} seeds. Loss before training {start:.3f}; the "
        f"least possible {result['entropy']:.3f}. SR: stochastic rounding. Moments of bf16 modes are bfloat16 unless "
        f"said otherwise, and rounded to nearest where SR is not said. torch {build['torch']}, adamw_ext "
        f"{build['adamw_ext']} ({build['isa']})."
    )
    header = ["mode", "final loss", "against float32", "of the seed furthest off", "asked for"]
    return f"# Final loss in every precision mode\n\n{facts}\n\n{table(header, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"modes-{date.today()}")
    parser.add_argument("--steps", type=int, default=STEPS, help="longer runs are stricter, not looser")
    args = parser.parse_args()
    result = {"date": str(date.today()), "build": adamw_ext.build_info(), **measure(args.steps)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "parity.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "parity.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
