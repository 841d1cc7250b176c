"""Real English text that every Python ships: the language reference behind ``help()``, as bytes."""

from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY = 256  # byte level
HELD_OUT = 0.1


def load_text() -> tuple[Tensor, Tensor]:
    """The text in two parts, to train on and to hold out: 1-d int64 tensors of byte values.

    Topics quote each other; each paragraph is kept once, so that nothing held out has been trained on.
    """
    paragraphs = dict.fromkeys(paragraph for _, topic in sorted(topics.items()) for paragraph in topic.split("\n\n"))
    text = torch.tensor(list("\n\n".join(paragraphs).encode()))
    train_bytes = int(len(text) * (1 - HELD_OUT))
    return text[:train_bytes], text[train_bytes:]


def random_batch(
    text: Tensor, batch: int, context: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``batch`` windows from random places: inputs and next bytes, each (batch, context).

    ``generator``: what chooses the places; None: torch's global one.
    """
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def even_batch(text: Tensor, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """As :func:`random_batch`, but from evenly spread places, the same at every call."""
    starts = torch.linspace(0, len(text) - context - 1, batch).long().unsqueeze(1)
    windows = text[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]
