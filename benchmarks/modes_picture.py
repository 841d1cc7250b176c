"""The picture of the precision modes' benchmark: bytes for each parameter against the time of a step."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.mode_peers import OTHER, OURS, TORCH

LOOKS = {
    OURS: {"marker": "o", "color": "#1f5f8b", "label": "adamw_ext"},
    TORCH: {"marker": "s", "color": "#f2a65a", "label": "torch"},
    OTHER: {"marker": "^", "color": "#8a8f98", "label": "others"},
}
FLOOR_COLOR = "#b8bec4"
LOGARITHMIC_FROM = 6.0  # times between the shortest and the longest
PLACES = [(side, up) for up in (0, 10, -10, 20, -20) for side in (8, -8)] + [(0, 13), (0, -13)]


def draw(result: dict[str, Any], path: Path) -> None:
    modes = result["modes"]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(9.5, 6.2), layout="constrained")
        for kind, look in LOOKS.items():
            of_kind = [mode for mode in modes.values() if mode["kind"] == kind]
            if of_kind:
                x, y = [mode["bytes_kept"] for mode in of_kind], [milliseconds(mode) for mode in of_kind]
                axes.scatter(x, y, s=55, zorder=3, **look)
        floors = [mode for mode in modes.values() if mode["kind"] == OURS and "floor_seconds" in mode]
        if floors:
            x, y = [mode["bytes_kept"] for mode in floors], [1e3 * mode["floor_seconds"]["median"] for mode in floors]
            axes.scatter(x, y, marker="_", s=160, linewidths=2.5, color=FLOOR_COLOR, label="floor of a mode", zorder=2)
        times = [milliseconds(mode) for mode in modes.values()]
        if max(times) > LOGARITHMIC_FROM * min(times):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.1 * max(times))
        axes.set_xlim(0, 1.12 * max(mode["bytes_kept"] for mode in modes.values()))
        axes.set(xlabel="param and state, bytes for each parameter (gradient apart)", ylabel="one step, ms (median)")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", frameon=False)
        axes.set_title(
            f"Bytes that a mode keeps and time of its step: {result['workload']}, {result['numel'] / 1e6:.0f}M params\n"
            f"{result['processor']}, {result['threads']} threads, torch {result['build']['torch']}, {result['date']}",
            fontsize=10,
        )
        name_dots(figure, axes, modes)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def milliseconds(mode: dict[str, Any]) -> float:
    return 1e3 * mode["seconds"]["median"]


def name_dots(figure: Any, axes: Any, modes: dict[str, Any]) -> None:
    """Each name beside its dot, in the first place where it meets no other name and no dot."""
    figure.canvas.draw()
    dots = {name: axes.transData.transform((mode["bytes_kept"], milliseconds(mode))) for name, mode in modes.items()}
    taken: list[Any] = []
    for name, mode in modes.items():
        for place in PLACES:
            label = axes.annotate(
                name,
                (mode["bytes_kept"], milliseconds(mode)),
                place,
                textcoords="offset points",
                ha={-1: "right", 0: "center", 1: "left"}[(place[0] > 0) - (place[0] < 0)],
                va="center",
                fontsize=8,
                fontweight="bold" if mode["kind"] == OURS else "normal",
            )
            box = label.get_window_extent()
            meets_dot = any(box.padded(4).contains(*dot) for other, dot in dots.items() if other != name)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            if inside and not meets_dot and not any(box.overlaps(other) for other in taken):
                break
            if place != PLACES[-1]:
                label.remove()
        taken.append(box)
