"""Steps every param within backward and frees its gradient at once: python -m examples.in_backward

The gradients of a whole model are then never in memory together. Trains the demo's GPT so and with the usual loop: both
end with the same bits, and the peaks of tensor memory are printed.

A param is stepped before the gradients of others are known, so this cannot clip to a norm over all gradients (neither
max_grad_norm nor clip_grad_norm_), leave a step out because one gradient has overflowed (GradScaler), or add up the
gradients of several backwards. Under DistributedDataParallel the hook would run before gradients are averaged.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW
from benchmarks.allocations import peak_bytes
from examples.gpt import GPT, decay_groups
from examples.text import load_text, random_batch
from examples.train import FULL, SHORT, RunConfig


def step_in_backward(groups: Iterable[dict[str, Any]], **options: Any) -> list[AdamW]:
    """From now on, backward steps every param of the groups once its gradient is complete, and frees the gradient.

    Args:
        groups: param groups, as AdamW takes them.
        options: AdamW's.

    Returns:
        An optimizer for each param, in the order of the groups. Schedules change the ``lr`` of each; checkpoints hold
        the state dict of each, or ``torch.distributed.checkpoint.state_dict`` makes one of them that a usual optimizer
        loads. Each one counts its params from 0; as stochastic rounding draws by that count, each has its own seed.
    """
    optimizers: list[AdamW] = []
    for group in groups:
        own = {**options, **group}
        for param in group["params"]:
            seed = {"seed": own.get("seed", 0) + len(optimizers)} if own.get("stochastic_rounding") else {}
            optimizer = AdamW([{**group, **seed, "params": [param]}], **options)
            optimizer.init_state()  # made in backward, it would lie scattered among what backward frees
            param.register_post_accumulate_grad_hook(partial(step_and_free, optimizer))
            optimizers.append(optimizer)
    return optimizers


def step_and_free(optimizer: AdamW, param: Tensor) -> None:
    optimizer.step()
    param.grad = None


class Training:
    """Of the demo's GPT, without clipping."""

    def __init__(self, config: RunConfig, *, in_backward: bool) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.text, _ = load_text()
        self.model = GPT(config.model)
        groups = decay_groups(self.model, config.weight_decay)
        options: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.95)}
        self.in_backward = in_backward
        self.optimizers = step_in_backward(groups, **options) if in_backward else [AdamW(groups, **options)]

    def step(self, number: int) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * min(1.0, (number + 1) / self.config.warmup)
        tokens, targets = random_batch(self.text, self.config.batch, self.config.model.context)
        self.model.loss(tokens, targets).backward()
        if not self.in_backward:
            self.optimizers[0].step()
            self.optimizers[0].zero_grad()

    def kept_bytes(self) -> int:
        """Of params and state."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = [*self.model.parameters(), *(value for state in states for value in state.values())]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def train(config: RunConfig, *, in_backward: bool) -> tuple[list[Tensor], int, float]:
    """Params at the end, the peak bytes of a step with what is kept between steps, and a step's median seconds."""
    training = Training(config, in_backward=in_backward)
    seconds = []
    for number in range(config.steps - 1):
        begin = time.perf_counter()
        training.step(number)
        seconds.append(time.perf_counter() - begin)
    peak = training.kept_bytes() + peak_bytes(partial(training.step, config.steps - 1))
    return list(training.model.parameters()), peak, sorted(seconds)[len(seconds) // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a smaller model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, help="sequences in a batch, if not as many as in the demo")
    args = parser.parse_args()
    config = SHORT if args.short else FULL
    config = RunConfig(config.model, args.steps, config.warmup, args.batch or config.batch)
    ends = {}
    for name, in_backward in (("after backward", False), ("in backward", True)):
        ends[name], peak, seconds = train(config, in_backward=in_backward)
        print(f"stepped {name:14}: peak {peak / 1e6:7.1f} MB of tensors, {1e3 * seconds:.1f} ms a training step")
    same = all(torch.equal(a, b) for a, b in zip(*ends.values(), strict=True))
    print("the same bits" if same else "FAILED: other bits")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
