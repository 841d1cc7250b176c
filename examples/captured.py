"""Trains the demo's GPT with whole steps captured in a CUDA graph: python -m examples.captured

Forward, backward, clipping and the optimizer are one replay; the learning rate changes at every step. Then the same
training runs step by step, and must end with the same bits. Without a GPU a replay is a plain call of the step, so that
the loop can be read and run anywhere; it shows nothing about graphs then.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import adamw_ext
from examples.gpt import GPT, decay_groups
from examples.text import load_text, random_batch
from examples.train import FULL, SHORT, RunConfig, warmup_then_cosine


class Training:
    """The model, and its training step over tensors that stay where they are."""

    def __init__(self, config: RunConfig, device: str) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.text, _ = load_text()
        self.model = GPT(config.model).to(device)
        groups = decay_groups(self.model, config.weight_decay)
        self.optimizer = adamw_ext.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), capturable=True)
        self.scheduler = warmup_then_cosine(self.optimizer, config)
        shape = (config.batch, config.model.context)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.targets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

    def step(self) -> None:
        loss = self.model.loss(self.tokens, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss.copy_(loss.detach())

    def capture(self) -> Callable[[], None]:
        """The step as a graph, of which nothing has run yet."""
        self.optimizer.init_state()
        side = torch.cuda.Stream()  # warms up what a capture must not: libraries, autotuning
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.model.loss(self.tokens, self.targets).backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
                self.optimizer.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def run(self, step: Callable[[], None]) -> list[Tensor]:
        """Every loss."""
        losses = []
        for _ in range(self.config.steps):
            tokens, targets = random_batch(self.text, self.config.batch, self.config.model.context)
            self.tokens.copy_(tokens)
            self.targets.copy_(targets)
            step()
            losses.append(self.loss.clone())
            self.scheduler.step()
            self.optimizer.sync_hyperparameters()  # the scheduler has changed floats that the graph reads
        return losses


def train(config: RunConfig, device: str, *, captured: bool) -> tuple[list[float], list[Tensor], float]:
    """Losses, params at the end, and seconds of a step."""
    training = Training(config, device)
    step = training.capture() if captured and device == "cuda" else training.step
    begin = time.perf_counter()
    losses = torch.stack(training.run(step)).tolist()
    seconds = (time.perf_counter() - begin) / config.steps
    return losses, [param.detach().cpu() for param in training.model.parameters()], seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--short", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--steps", type=int, help="how many, if not as many as the demo")
    args = parser.parse_args()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what torch asks for with deterministic algorithms
    torch.use_deterministic_algorithms(True)
    config = SHORT if args.short else FULL
    config = replace(config, steps=args.steps or config.steps)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses, params, seconds = train(config, args.device, captured=True)
        eager_losses, eager_params, eager_seconds = train(config, args.device, captured=False)
    same = all(torch.equal(a, b) for a, b in zip(params, eager_params, strict=True)) and losses == eager_losses
    print(f"{config.steps} steps on {args.device}, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    print(f"replayed {1e3 * seconds:.2f} ms a step, step by step {1e3 * eager_seconds:.2f} ms")
    print("the same bits" if same else "FAILED: other bits")
    return 0 if same and losses[-1] < losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
