"""The benchmark's picture: one panel a workload, one bar a peer."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.peers import FLOOR, OURS

COLORS = {OURS: "#1f5f8b", FLOOR: "#b8bec4"}
OTHER_COLOR = "#f2a65a"
WEIGHTS = {OURS: "bold"}


def draw(result: dict[str, Any], path: Path) -> None:
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    workloads = list(result["workloads"].values())
    columns = min(2, len(workloads))
    rows = -(-len(workloads) // columns)
    with plt.rc_context(style):
        figure, panels = plt.subplots(
            rows, columns, figsize=(6.8 * columns, 0.9 + 2.3 * rows), squeeze=False, layout="constrained"
        )
        for panel, workload in zip(panels.flat, workloads, strict=False):
            draw_workload(panel, workload)
        for panel in panels.flat[len(workloads) :]:
            panel.set_axis_off()
        figure.suptitle(
            f"Time of one optimizer step: median, quartiles, and times {OURS}'s\n"
            f"{result['processor']}, {result['threads']} threads, torch {result['build']['torch']}, {result['date']}"
        )
        figure.get_layout_engine().set(wspace=0.08, hspace=0.06)
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)


def draw_workload(axes: Any, workload: dict[str, Any]) -> None:
    peers = workload["peers"]
    longest = 1e3 * max(peer["seconds"]["median"] for peer in peers.values())
    for position, (name, peer) in enumerate(peers.items()):
        median, first, third = (1e3 * peer["seconds"][key] for key in ("median", "q1", "q3"))
        look = {"color": COLORS.get(name, OTHER_COLOR), "ecolor": "#444444", "capsize": 3}
        axes.barh(position, median, 0.65, xerr=[[median - first], [third - median]], **look)
        for place, text in ((1.19, milliseconds(median)), (1.35, f"{peer['ratio']['median']:.2f}x")):
            where = axes.get_yaxis_transform()
            axes.text(place, position, text, transform=where, ha="right", va="center", weight=WEIGHTS.get(name))
    axes.set_yticks(range(len(peers)), list(peers))
    axes.invert_yaxis()
    axes.set(xlabel="ms", xlim=(0, 1.15 * longest), title=workload["title"])


def milliseconds(value: float) -> str:
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f} ms"
