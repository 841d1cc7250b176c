"""How messages show a value that is not what was asked for."""

import enum
import numbers
from collections.abc import Iterable
from itertools import islice
from types import EllipsisType, NoneType
from typing import Any

import torch

_PLAIN = (
    *(numbers.Number, str, bytes, NoneType, EllipsisType, type, enum.Enum, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_BRACKETS: dict[type, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}"), frozenset: ("{", "}")}
_MOST_ITEMS, _MOST_LETTERS = 6, 120


def show(value: Any, depth: int = 4) -> str:
    """Of plain values what they are, of containers what they hold, of all else the type.

    So no tensor is read, of which the process would die if its memory was freed; and little code of the caller's runs.
    """
    kind = type(value)
    if isinstance(value, dict):
        items = (f"{show(key, depth - 1)}: {show(item, depth - 1)}" for key, item in dict.items(value))
        return ("" if kind is dict else kind.__name__) + _listed(items, "{", "}", depth)
    if kind in _BRACKETS:
        return _listed((show(item, depth - 1) for item in value), *_BRACKETS[kind], depth)
    if isinstance(value, _PLAIN):
        try:
            text = repr(value)
            return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."
        except Exception:  # an int of more digits than Python writes, or a class of the caller's
            pass
    return f"<{kind.__qualname__}>" if kind.__module__ == "builtins" else f"<{kind.__module__}.{kind.__qualname__}>"


def _listed(items: Iterable[str], opening: str, closing: str, depth: int) -> str:
    shown = list(islice(items, _MOST_ITEMS + 1)) if depth > 0 else ["..."]
    return opening + ", ".join(shown[:_MOST_ITEMS] + ["..."] * (len(shown) > _MOST_ITEMS)) + closing
