"""The benchmark's picture: one panel a workload and clock, one bar a peer."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.clocks import HOST, Clock, clocks_on
from benchmarks.peers import COPY, FLOOR, OURS, OURS_CAPTURABLE, OURS_CAPTURED, SLOW_ON_CPU

COLORS = {OURS: "#1f5f8b", OURS_CAPTURABLE: "#4d8fb8", OURS_CAPTURED: "#4d8fb8", FLOOR: "#b8bec4", COPY: "#b8bec4"}
OTHER_COLOR = "#f2a65a"
WEIGHTS = {OURS: "bold"}


def draw(result: dict[str, Any], path: Path) -> None:
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    clocks = clocks_on(result["device"])
    panels = [(workload, clock) for workload in result["workloads"].values() for clock in clocks]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    bars = max(len(workload["peers"]) for workload, _ in panels)
    height = max(2.3, 0.7 + 0.36 * bars)
    with plt.rc_context(style):
        figure, places = plt.subplots(
            rows, columns, figsize=(6.8 * columns, 0.9 + height * rows), squeeze=False, layout="constrained"
        )
        for place, (workload, clock) in zip(places.flat, panels, strict=False):
            draw_panel(place, workload, clock, with_clock=len(clocks) > 1)
        for place in places.flat[len(panels) :]:
            place.set_axis_off()
        threads = f"{result['threads']} threads, " if result["device"] == "cpu" else ""
        figure.suptitle(
            f"Time of one optimizer step: median, quartiles, and times {OURS}'s\n"
            f"{result['processor']}, {threads}torch {result['build']['torch']}, {result['date']}"
        )
        figure.get_layout_engine().set(wspace=0.08, hspace=0.06)
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)


def draw_panel(axes: Any, workload: dict[str, Any], clock: Clock, with_clock: bool) -> None:
    peers = {name: peer for name, peer in workload["peers"].items() if clock.seconds in peer}
    # Bars of the slowest end at the frame: their numbers stand beside them.
    longest = max(peer[clock.seconds]["median"] for name, peer in peers.items() if name not in SLOW_ON_CPU)
    unit, scale = ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    for position, (name, peer) in enumerate(peers.items()):
        median, first, third = (scale * peer[clock.seconds][key] for key in ("median", "q1", "q3"))
        look = {"color": COLORS.get(name, OTHER_COLOR), "ecolor": "#444444", "capsize": 3}
        axes.barh(position, median, 0.65, xerr=[[median - first], [third - median]], **look)
        for place, text in ((1.19, duration(median / scale)), (1.35, factor(peer[clock.ratio]["median"]))):
            where = axes.get_yaxis_transform()
            axes.text(place, position, text, transform=where, ha="right", va="center", weight=WEIGHTS.get(name))
    axes.set_yticks(range(len(peers)), list(peers))
    axes.invert_yaxis()
    title = f"{workload['title']}: {clock.title}" if with_clock else workload["title"]
    axes.set(xlabel=unit, xlim=(0, 1.15 * scale * longest), title=title)
    if clock.prefix == HOST:  # from microseconds to tens of milliseconds
        shortest = min(peer[clock.seconds]["median"] for peer in peers.values())
        axes.set(xscale="log", xlim=(0.5 * scale * shortest, 1.5 * scale * longest), xlabel=f"{unit}, logarithmic")


def duration(seconds: float) -> str:
    unit, scale = ("ms", 1e3) if seconds >= 1e-4 else ("µs", 1e6)
    value = scale * seconds
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"
