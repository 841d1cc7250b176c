"""How the examples compare two checkpoints, and publish what they found."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def differing(a: Any, b: Any, where: str) -> list[str]:
    """The places where two nested checkpoints are not the same bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differing(a[key], b[key], f"{where}[{key!r}]")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in differing(*pair, f"{where}[{i}]")]
    return [] if type(a) is type(b) and a == b else [where]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The L2 norm of the difference of all tensors of b from those of a, in units of the norm of a."""
    if {name: tensor.shape for name, tensor in a.items()} != {name: tensor.shape for name, tensor in b.items()}:
        raise ValueError(f"other names or shapes: {sorted(a)} and {sorted(b)}")
    apart = sum((b[name].double() - tensor.double()).square().sum().item() for name, tensor in a.items())
    return (apart / sum(tensor.double().square().sum().item() for tensor in a.values())) ** 0.5


def largest(numbers: Iterable[float]) -> float:
    """As max(), but NaN if one of them is."""
    return torch.tensor(list(numbers), dtype=torch.float64).max().item()


def markdown_table(rows: list[list[str]]) -> str:
    """Rows as a table, the first one as its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def publish(name: str, out: Path, result: dict[str, Any], text: str, *others: str) -> None:
    """Write out/NAME.json and .md and print the text; exit with 1 if the result has failures. ``others``: files that
    are there already."""
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / f"{name}.md").write_text(text)
    *files, last = (f"{name}.json", f"{name}.md", *others)
    print(f"\n{text}\nwritten: {', '.join(files)} and {last} in {out}")
    if result["failures"]:
        sys.exit(f"{name} FAILED: {'; '.join(result['failures'])}")
