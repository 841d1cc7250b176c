"""The growth benchmark's pictures: time of a step, and how many times the streaming floor that is, against size."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.growth import ELEMENTS, SINGLE
from benchmarks.peers import FLOOR, FOREACH, FUSED, OURS

COLORS = {OURS: "#1f5f8b", FUSED: "#f2a65a", FOREACH: "#b86fa0", SINGLE: "#6a9a58", FLOOR: "#9aa2aa"}


def draw(result: dict[str, Any], out: Path) -> None:
    """Write growth-tensors-DATE.png and growth-elements-DATE.png."""
    for name, title in (
        ("tensors", f"Time of a step against the number of tensors, of {ELEMENTS} float32 each"),
        ("elements", "Time of a step against the size of one tensor"),
    ):
        draw_curve(result, name, title, out / f"growth-{name}-{result['date']}.png")


def draw_curve(result: dict[str, Any], key: str, title: str, path: Path) -> None:
    points = result[f"by_{key}"]
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (times, factors) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        for name in COLORS:
            draw_line(times, points, key, "seconds", name)
            if name != FLOOR:
                draw_line(factors, points, key, "over_floor", name)
        factors.axhline(1, color=COLORS[FLOOR], lw=1.2)
        times.set(ylabel="seconds (band: quartiles)", xlabel=key)
        factors.set(ylabel="times the streaming floor", xlabel=key)
        for axes in (times, factors):
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.25)
        times.legend(frameon=False)
        if any(point["dtype"] != "float32" for point in points):
            times.annotate("circles: bfloat16", (0.98, 0.02), xycoords="axes fraction", ha="right")
        build = result["build"]
        figure.suptitle(
            f"{title}\n{result['processor']}, {result['threads']} threads, torch {build['torch']}, {result['date']}"
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_line(axes: Any, points: list[dict[str, Any]], key: str, what: str, name: str) -> None:
    """The median with its quartiles; a point in another dtype than float32 is a circle on its own."""
    for dtype in dict.fromkeys(point["dtype"] for point in points):
        chosen = [point for point in points if name in point[what] and point["dtype"] == dtype]
        places = [point[key] for point in chosen]
        medians, lower, upper = ([point[what][name][at] for point in chosen] for at in ("median", "q1", "q3"))
        if dtype == "float32":
            axes.plot(places, medians, color=COLORS[name], lw=2, marker=".", label=name)
            axes.fill_between(places, lower, upper, color=COLORS[name], alpha=0.25, lw=0)
        else:
            axes.plot(places, medians, "o", color=COLORS[name], mfc="none", ms=8)
