"""The demo's picture: both loss curves, their difference, and the optimizer's time per step."""

from pathlib import Path
from statistics import quantiles
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"torch": "#f2a65a", "adamw_ext": "#1f5f8b"}
WIDTHS = {"torch": 5.0, "adamw_ext": 1.4}  # thin on top of thick: equal curves show as one line inside the other


def draw(
    records: dict[str, dict[str, Any]], result: dict[str, Any], names: dict[str, str], tolerance: float, path: Path
) -> None:
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12, 6), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[2.4, 1], height_ratios=[2.2, 1])
        draw_losses(figure.add_subplot(grid[0, 0]), records, names)
        draw_differences(figure.add_subplot(grid[1, 0]), records, tolerance)
        draw_times(figure.add_subplot(grid[:, 1]), records, result, names)
        size = f"{result['parameters'] / 1e6:.1f} M parameters"
        figure.suptitle(f"A GPT of {size} trained on English text with both optimizers, {result['threads']} threads")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def curve(record: dict[str, Any], kind: str) -> tuple[list[int], list[float]]:
    return [int(step) for step in record[kind]], list(record[kind].values())


def draw_losses(axes: Any, records: dict[str, dict[str, Any]], names: dict[str, str]) -> None:
    for name, title in names.items():
        look = {"color": COLORS[name], "solid_capstyle": "round"}
        axes.plot(*curve(records[name], "train_losses"), lw=WIDTHS[name] * 0.6, alpha=0.4, **look)
        axes.plot(*curve(records[name], "held_out_losses"), lw=WIDTHS[name], label=title, **look)
    steps, losses = curve(records["adamw_ext"], "held_out_losses")
    end = (steps[-1], losses[-1])
    axes.annotate(f"{losses[-1]:.3f}", end, (8, 0), textcoords="offset points", va="center", color=COLORS["adamw_ext"])
    axes.set(ylabel="loss, nats per byte", title="Loss: held-out (strong) and train (faint)")
    axes.legend(frameon=False)


def draw_differences(axes: Any, records: dict[str, dict[str, Any]], tolerance: float) -> None:
    for kind, width, alpha in (("train_losses", 1.0, 0.4), ("held_out_losses", 1.6, 1.0)):
        steps, of_torch = curve(records["torch"], kind)
        differences = [abs(a - b) for a, b in zip(of_torch, curve(records["adamw_ext"], kind)[1], strict=True)]
        axes.plot(steps, differences, color="#444444", lw=width, alpha=alpha)
    axes.axhline(tolerance, color="#b03a2e", lw=1, ls="--")
    axes.annotate("tolerance", (0, tolerance), (0, 3), textcoords="offset points", color="#b03a2e")
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set(xlabel="step", ylabel="nats", ylim=(0, 10 * tolerance), title="Difference of the two losses")


def draw_times(axes: Any, records: dict[str, dict[str, Any]], result: dict[str, Any], names: dict[str, str]) -> None:
    for position, name in enumerate(names):
        first, _, third = quantiles([1e3 * seconds for seconds in records[name]["optimizer_seconds"]], n=4)
        height = result["optimizers"][name]["optimizer_ms"]
        whiskers = [[max(0.0, height - first)], [max(0.0, third - height)]]
        axes.bar(position, height, 0.6, color=COLORS[name], yerr=whiskers, capsize=5, ecolor="#444444")
        above = (position, max(height, third))
        axes.annotate(f"{height:.2f} ms", above, (0, 6), textcoords="offset points", ha="center", weight="bold")
    axes.set_xticks(range(len(names)), [title.replace("(", "\n(") for title in names.values()])
    axes.margins(y=0.1)
    axes.set(ylabel="ms", title="Optimizer time per step\n(median and quartiles)")
