"""Writes what the README says is measured, from the newest results: python -m benchmarks.readme

Everything between the two markers is made here, so a number in the README is the number of a dated run. A subject that
has no results is left out.
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.long_run import growth
from benchmarks.peers import DEEPSPEED, FLOOR, FOREACH, FUSED, OURS
from benchmarks.report import table

Result = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
DATED = re.compile(r"(.+)-(\d{4}-\d\d-\d\d)\.json")
RIVALS = (FUSED, FOREACH, DEEPSPEED)  # those that take no more than some times as long


def newest(subject: str, results: Path = RESULTS) -> Path | None:
    """The latest file SUBJECT-DATE.json."""
    names = [path for path in results.glob("*.json") if (match := DATED.fullmatch(path.name)) and match[1] == subject]
    return max(names, key=lambda path: path.name, default=None)


def section(results: Path = RESULTS) -> str:
    parts = []
    for subject, write in SUBJECTS.items():
        path = newest(subject, results)
        if path is not None:
            parts += write(json.loads(path.read_text()), f"benchmarks/results/{path.stem}")
    return "\n\n".join(part if part.startswith(("|", "!")) else wrapped(part) for part in parts)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def rewritten(text: str, results: Path = RESULTS) -> str:
    """The README with this section between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md has no {BEGIN} that is followed by {END}")
    return f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}"


def step_time(result: Result, stem: str) -> list[str]:
    build = result["build"]
    workloads = result["workloads"].values()
    rivals = [name for name in RIVALS if any(name in workload["peers"] for workload in workloads)]
    rows = [step_row(workload, rivals) for workload in workloads]
    rows += [memory_row(workload, rivals) for workload in list(workloads)[:1]]
    header = ["work", "params", "tensors", OURS, *(f"{name} / ours" for name in rivals), "ours / floor"]
    return [
        f"One optimizer step on {result['date']}: {result['threads']} threads of {result['processor']} "
        f"({build['isa']}), torch {build['torch']}. Every optimizer steps the same tensors in one process; medians of "
        "interleaved rounds. The *floor* is a loop in the same run that moves the same bytes and computes nothing. The "
        "machine's memory and caches are shared with others. "
        f"Load average before the run: {result['load_average']:.1f}.",
        table(header, rows),
        *targets(result, stem),
        f"![time of one optimizer step]({stem}.png)",
    ]


def step_row(workload: Result, rivals: list[str]) -> list[str]:
    peers = workload["peers"]
    ratios = [times(peers[name]["ratio"]["median"]) if name in peers else "" for name in rivals]
    sizes = [f"{workload['numel'] / 1e6:.3g}M", f"{workload['tensors']:,}"]
    seconds = peers[OURS]["seconds"]["median"]
    floor = times(workload["ours_over_floor"]["median"]) if FLOOR in peers else ""
    return [workload["title"], *sizes, milliseconds(seconds), *ratios, floor]


def memory_row(workload: Result, rivals: list[str]) -> list[str]:
    peers = workload["peers"]
    cells = [size(peers[name]["allocated_bytes"]) if name in peers else "" for name in (OURS, *rivals)]
    return [f"memory that a step allocates, {workload['title']}", "", "", *cells, ""]


def targets(result: Result, stem: str) -> list[str]:
    judged = result.get("targets", [])
    if not judged:
        return []
    missed = [target for target in judged if not target["reached"]]
    text = f"Of our {len(judged)} targets {len(judged) - len(missed)} are reached ([all of them]({stem}.md))"
    listed = "; ".join(f"{target['work']}, {target['wanted']}: {target['measured'].split(' ')[0]}" for target in missed)
    why = "[why](benchmarks/NOTES.md)"
    return [f"{text}. Missed, and {why}: {listed}." if missed else f"{text}."]


def accuracy(rows: list[Result], stem: str) -> list[str]:
    names = list(rows[0]["errors"])
    cells = [
        [
            f"{row['lr']:g}, {row['weight_decay']:g}, {tuple(row['betas'])}",
            *(f"{row['errors'][n]['rms']:.1e}" for n in names),
        ]
        for row in rows
    ]
    return [
        "Rounding error of the params after 1,000 float32 steps against float64, root mean square over elements of "
        f"size 1 ([largest too]({stem}.md)):",
        table(["lr, weight_decay, betas", *names], cells),
    ]


def long_run(result: Result, stem: str) -> list[str]:
    steps = result["plan"]["steps"]
    errors = result["fed"]["errors"][str(steps)]
    of_matrices = ", ".join(f"{name} {errors[name]['decayed']['rms']:.1e}" for name in (OURS, FUSED, FOREACH))
    losses = ", ".join(f"{name} {result['final_losses'][name]['train']:.3f}" for name in (OURS, FUSED, FOREACH))
    grown = growth(result["free"][OURS]["memory"])
    resumes = result["free"][next(name for name, run in result["free"].items() if "resumes" in run)]["resumes"]
    same = f"{len(resumes['steps'])} resumes at random steps " + (
        "DIFFER" if resumes["differences"] else "continue with the same bits"
    )
    return [
        f"[{steps:,} steps of training]({stem}.md) a small GPT on {result['date']}: root mean square error of its "
        f"matrices under the same gradients {of_matrices}; last train loss of free runs {losses}; {grown['objects']} "
        f"Python objects more than after the warm-up; {same}."
    ]


def growth_curves(result: Result, stem: str) -> list[str]:
    chosen = [point for point in result["by_tensors"] if point["tensors"] in (1, 100, 10_000, 100_000)]
    cells = [
        [
            f"{point['tensors']:,}",
            milliseconds(point["seconds"][OURS]["median"]),
            *(times(point["over_ours"][name]["median"]) for name in (FUSED, FOREACH)),
        ]
        for point in chosen
    ]
    folder, _, date = stem.rpartition("/growth-")
    return [
        f"With the number of tensors, of 64 float32 each ([all points, and growth with elements]({stem}.md)):",
        table(["tensors", OURS, f"{FUSED} / ours", f"{FOREACH} / ours"], cells),
        f"![time of a step against the number of tensors]({folder}/growth-tensors-{date}.png)",
    ]


SUBJECTS = {"cpu": step_time, "growth": growth_curves, "accuracy": accuracy, "long-run": long_run}


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms" if value >= 0.1 else f"{1e3 * value:.2g} µs"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"


def size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1_000_000 else f"{nbytes:,} bytes"


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    main()
