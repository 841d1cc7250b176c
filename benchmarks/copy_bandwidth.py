"""The least time that a step's memory traffic takes on a GPU: device-to-device copies of as many bytes."""

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_COPY = 4_000_000_000  # bytes read by one copy; a step that moves more takes several


def copy_sizes(step_bytes: int) -> list[int]:
    """Bytes of each copy: together they read half of the step's bytes and write the other half."""
    half = step_bytes // 2
    copies = max(1, -(-half // LARGEST_COPY))
    return [(index + 1) * half // copies - index * half // copies for index in range(copies)]


def copy_memory(step_bytes: int) -> int:
    return 2 * max(copy_sizes(step_bytes))


def copies(params: list[Tensor]) -> Callable[[], None]:
    """A function that copies as many bytes as a step over ``params``, their gradients and two moments moves."""
    sizes = copy_sizes(7 * sum(param.nbytes for param in params))
    words = torch.empty(-(-max(sizes) // 8), dtype=torch.int64, device=params[0].device).random_()
    source, target = words.view(torch.uint8), torch.empty_like(words).view(torch.uint8)
    views = [(target[:size], source[:size]) for size in sizes]

    def step() -> None:
        for to, what in views:
            to.copy_(what)

    return step
