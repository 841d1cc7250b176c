"""The long run's picture: how the rounding error grows, and how far apart the losses are."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.long_run import EXACT, FOREACH, FUSED, MOVED, ONE_ROUNDING, OURS

# Thin on top of thick: equal curves show as one line inside the other.
LOOKS: dict[str, dict[str, Any]] = {
    FOREACH: {"color": "#c9b8d8", "lw": 5.0},
    FUSED: {"color": "#f2a65a", "lw": 3.0},
    OURS: {"color": "#1f5f8b", "lw": 1.6},
    ONE_ROUNDING: {"color": "#b8bec4", "lw": 1.6},
    EXACT: {"color": "#444444", "lw": 1.4, "ls": ":"},
    **{name: {"color": "#7fb2d6", "lw": 1.2, "ls": "--"} for name in MOVED},
}


def draw(result: dict[str, Any], path: Path) -> None:
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with plt.rc_context(style):
        figure, places = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
        draw_errors(places[0], result["fed"]["errors"], "decayed", "Matrices (with weight decay)")
        draw_errors(places[1], result["fed"]["errors"], "not decayed", "Biases and norms (without)")
        draw_losses(places[2], result)
        build = result["build"]
        figure.suptitle(
            f"{result['plan']['steps']:,} steps of training: rounding error under the same gradients, and free runs\n"
            f"{result['fed']['parameters']:,} params, {result['processor']}, torch {build['torch']}, {result['date']}"
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_errors(axes: Any, errors: dict[Any, Any], part: str, title: str) -> None:
    steps = [int(step) for step in errors]
    for name in (FOREACH, FUSED, OURS, ONE_ROUNDING):
        axes.plot(steps, [at[name][part]["rms"] for at in errors.values()], label=name, **LOOKS[name])
    for name in (FUSED, OURS):
        look = {**LOOKS[name], "ls": ":", "alpha": 0.7}
        axes.plot(steps, [at[name][part]["max"] for at in errors.values()], label=f"{name}, largest", **look)
    axes.set(xscale="log", yscale="log", xlabel="step", title=f"{title}: error against float64")
    axes.set_ylabel("root mean square (largest: dotted)")
    axes.legend(frameon=False, fontsize=8)


def draw_losses(axes: Any, result: dict[str, Any]) -> None:
    curves = {name: run["losses"]["held_out"] for name, run in result["free"].items()}
    curves[EXACT] = result["fed"]["losses"]["held_out"]
    for name in (FOREACH, FUSED, *MOVED, EXACT, OURS):
        curve = curves[name]
        axes.plot([int(step) for step in curve], list(curve.values()), label=name, **LOOKS[name])
    axes.set(xlabel="step", ylabel="nats per byte", title="Held-out loss, training freely")
    axes.legend(frameon=False, fontsize=8)
