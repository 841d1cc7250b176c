"""What tests of threads and forks share: an optimizer over one large param, and functions called at once."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW

LARGE = 1 << 18  # long enough for a step to let other threads run meanwhile

# By name: the params' dtype, options.
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "clipped": (torch.float32, {"max_grad_norm": 0.3}),
    "capturable": (torch.float32, {"capturable": True, "amsgrad": True}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True, "master_weights": "split"}),
}


class Run:
    """One large param, which gets the same gradient in every step."""

    def __init__(self, seed: int = 0, mode: str = "float32", size: int = LARGE) -> None:
        dtype, options = MODES[mode]
        generator = torch.Generator().manual_seed(seed)
        self.param = torch.randn(size, generator=generator).to(dtype).requires_grad_()
        self.param.grad = torch.randn(size, generator=generator).to(dtype)
        self.optimizer = AdamW([self.param], lr=0.1, **options)

    def steps(self, count: int) -> "Run":
        for _ in range(count):
            self.optimizer.step()
        return self

    @property
    def steps_made(self) -> int:
        return int(self.optimizer.state[self.param]["step"])

    @property
    def tensors(self) -> list[Tensor]:
        return [self.param.detach(), *self.optimizer.state[self.param].values()]


def in_threads(*functions: Callable[[], object]) -> None:
    """Calls all at once, each in a thread of its own, and raises what one of them raised."""
    barrier = threading.Barrier(len(functions))
    failures: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            barrier.wait()
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]
