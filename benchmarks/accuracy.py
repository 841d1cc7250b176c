"""Rounding error of a float32 run against the float64 textbook, ours and torch's (`python -m benchmarks.accuracy`).

Every optimizer gets the same 1,000 gradients; the error is that of the params after the last step, as root mean square
and largest over 20,000 elements of standard normal size.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

import adamw_ext
from benchmarks.device import check_device
from tests.reference import Textbook

NAMES = ("adamw_ext", "torch fused", "torch foreach")
ELEMENTS, STEPS = 20_000, 1_000
SETTINGS = (
    {"lr": 1e-3, "weight_decay": 1e-2, "betas": (0.9, 0.999)},
    {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)},
    {"lr": 1e-4, "weight_decay": 1e-2, "betas": (0.9, 0.999)},
    {"lr": 1e-5, "weight_decay": 0.1, "betas": (0.9, 0.999)},
    {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999)},
    {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.0, 0.0)},
)


def measure(setting: dict[str, Any], device: str) -> dict[str, dict[str, float]]:
    """The errors by optimizer, as {"rms": ..., "max": ...}."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(ELEMENTS, generator=generator)
    params = {name: torch.nn.Parameter(start.to(device, copy=True)) for name in NAMES}
    optimizers = (
        adamw_ext.AdamW([params["adamw_ext"]], **setting),
        torch.optim.AdamW([params["torch fused"]], fused=True, **setting),
        torch.optim.AdamW([params["torch foreach"]], foreach=True, **setting),
    )
    textbook = Textbook([start], **setting)
    for _ in range(STEPS):
        grad = 0.1 * torch.randn(ELEMENTS, generator=generator)
        textbook.step([grad])
        for param in params.values():
            param.grad = grad.to(device, copy=True)
        for optimizer in optimizers:
            optimizer.step()
    errors = {name: param.detach().cpu().double() - textbook.params[0] for name, param in params.items()}
    return {name: {"rms": e.square().mean().sqrt().item(), "max": e.abs().max().item()} for name, e in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    out, device = args.out, args.device
    check_device(device)
    rows = [{**setting, "errors": measure(setting, device)} for setting in SETTINGS]
    names = list(rows[0]["errors"])
    table = [
        f"Error after {STEPS:,} float32 steps on {device} against float64, root mean square (largest), "
        f"torch {torch.__version__}.",
        "",
        f"| lr | weight_decay | betas | {' | '.join(names)} | torch fused / ours |",
        "| --- " * (len(names) + 4) + "|",
    ]
    for row in rows:
        cells = [f"{row['errors'][name]['rms']:.1e} ({row['errors'][name]['max']:.1e})" for name in names]
        ratio = row["errors"]["torch fused"]["rms"] / row["errors"]["adamw_ext"]["rms"]
        table.append(
            f"| {row['lr']:g} | {row['weight_decay']:g} | {row['betas']} | {' | '.join(cells)} | {ratio:.1f} |"
        )
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"accuracy-{'' if device == 'cpu' else f'{device}-'}{date.today()}"
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    stem.with_suffix(".md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
