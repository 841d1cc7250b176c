"""A long training, 10,000 steps of the demo's GPT: does it stay right, flat in memory, and resumable at every step?

`python -m benchmarks.long_run` writes long-run-DATE.json, .md and .png. Runs are processes of one thread, as many at
once as there are cores. One trains on float64 params and gives the gradients of that run to every optimizer: what
their params are off by is rounding error of the optimizer alone. The others train freely, each with one optimizer, and
sample their memory. Two more runs of ours, whose starts were moved in the last bits, show how far apart losses end by
chance; one of them is left at random steps and resumed in fresh objects.
"""

import argparse
import multiprocessing
import os
import random
import secrets
import statistics
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.device import conditions, write_dated
from benchmarks.long_training import (
    FOREACH,
    FUSED,
    ONE_ROUNDING,
    OURS,
    STEPS_AFTER_RESUME,
    TEXTBOOK_STEPS,
    Plan,
    feed,
    follow,
)
from benchmarks.report import table
from examples.train import ENVIRONMENT

Result = dict[str, Any]

MOVED = {f"{OURS}, start moved up": 2.0**-23, f"{OURS}, start moved down": -(2.0**-23)}
RESUMED = next(iter(MOVED))
EXACT = "float64 params"

TEXTBOOK_TOLERANCE = 1e-13  # of float64 params near 1 after 100 steps, which round by 1e-16 each
WARM_UP = 0.2  # the part of the run after which memory must not grow
# A tensor of one element takes 0.5 kB with its storage: one left behind by each step would be 4 MB in 8,000 steps. Less
# than that must be allowed: the losses and times that a run records take 0.2 kB a step, and a huge page 2 MB.
RESIDENT_GROWTH = 4_000_000
APART = 3.0  # losses of other optimizers may be as far from ours as this many times the spread of ours, start moved
SHOWN_STEPS = (1, 10, 100, 1_000, 10_000)


def run_jobs(plan: Plan, seed: int, workers: int) -> Result:
    """Every job in a process of its own; ``seed`` chooses the steps to resume at."""
    at = random.Random(seed).sample(range(1, plan.steps - STEPS_AFTER_RESUME + 1), plan.resumes)
    os.environ.update(ENVIRONMENT)
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawning, max_tasks_per_child=1) as pool:
        fed = pool.submit(feed, plan)
        free: dict[str, Future[Result]] = {
            name: pool.submit(follow, OURS, plan, moved, tuple(at) if name == RESUMED else ())
            for name, moved in MOVED.items()
        }
        free |= {name: pool.submit(follow, name, plan) for name in (OURS, FUSED, FOREACH)}
        return {"fed": fed.result(), "free": {name: free[name].result() for name in (OURS, FUSED, FOREACH, *MOVED)}}


def growth(memory: dict[str, list[int]]) -> dict[str, int]:
    """What the process holds more at the end than after the warm-up.

    Resident memory goes up and down by megabytes from sample to sample: of it, the medians over a fifth of the run.
    """
    first = round(WARM_UP * len(memory["step"]))
    grown = {key: memory[key][-1] - memory[key][first] for key in ("objects", "tensors")}
    early, late = memory["resident_bytes"][first : 2 * first], memory["resident_bytes"][-first:]
    return {**grown, "resident_bytes": round(statistics.median(late) - statistics.median(early))}


def judge(result: Result, plan: Plan) -> list[str]:
    """What failed."""
    found = []
    fed, free = result["fed"], result["free"]
    if not fed["textbook_distance"] <= TEXTBOOK_TOLERANCE:
        found.append(f"torch in float64 is off the textbook by {fed['textbook_distance']:.1e}")
    last = fed["errors"][plan.steps]
    if not last[OURS]["all"]["rms"] <= last[FUSED]["all"]["rms"]:
        found.append("the error of adamw_ext is larger than that of torch fused")
    grown = growth(free[OURS]["memory"])
    if grown["objects"] or grown["tensors"]:
        found.append(f"a run left {grown['objects']} objects and {grown['tensors']} tensors behind")
    if not grown["resident_bytes"] <= RESIDENT_GROWTH:
        found.append(f"resident memory grew by {grown['resident_bytes']:,} bytes")
    resumes = free[RESUMED]["resumes"]
    found += resumes["differences"]
    if len(resumes["steps"]) != plan.resumes:
        found.append(f"only {len(resumes['steps'])} resumes were compared")
    for kind, spread in result["spread"].items():
        off = result["apart"][kind]
        if not max(off.values()) <= APART * spread:
            found.append(f"{kind} losses end further apart than chance: {off}, of ours with moved starts {spread:.1e}")
    return found


def final(losses: Result) -> dict[str, float]:
    return {"held-out": list(losses["held_out"].values())[-1], "train": losses["last_train"]}


def summarise(result: Result, plan: Plan) -> None:
    """Adds how far final losses are apart, and the failures."""
    ends = {name: final(run["losses"]) for name, run in result["free"].items()}
    ends[EXACT] = final(result["fed"]["losses"])
    result["final_losses"] = ends
    ours = [ends[name] for name in (OURS, *MOVED)]
    result["spread"] = {kind: max(e[kind] for e in ours) - min(e[kind] for e in ours) for kind in ours[0]}
    result["apart"] = {
        kind: {name: abs(ends[name][kind] - ends[OURS][kind]) for name in (FUSED, FOREACH, EXACT)} for kind in ours[0]
    }
    result["failures"] = judge(result, plan)


def markdown(result: Result) -> str:
    build, fed, free = result["build"], result["fed"], result["free"]
    config = Plan(**result["plan"]).config
    parts = [
        f"# {config.steps:,} steps of training",
        f"{result['date']}, {result['processor']}, one thread for each run, torch {build['torch']}, adamw_ext "
        f"{build['adamw_ext']} ({build['isa']}), {result['seconds']:.0f} s in all.",
        f"The demo's GPT and text: {config.model.layers} layers of width {config.model.width}, context "
        f"{config.model.context}, {fed['parameters']:,} params (the demo's short preset, made narrower so that 10,000 "
        f"steps of every run fit into minutes), batches of {config.batch}, gradients clipped to {config.max_norm:g}, "
        f"lr {config.lr:g} with {config.warmup} steps of warm-up and a cosine, weight decay {config.weight_decay:g} on "
        "matrices, betas (0.9, 0.95).",
        "**Failed**: " + "; ".join(result["failures"]) if result["failures"] else "All checks below hold.",
        "## Rounding error of the optimizer alone",
        "Float64 params, stepped by torch.optim.AdamW, train the model (on the float32 nearest to them); every "
        "optimizer gets the gradients of that run for float32 params of its own. Error: distance of its params from "
        "the float64 ones, root mean square (largest). One rounding: the float64 params rounded to float32 once, the "
        "least that there is. Matrices decay, biases and norms do not; the root mean square of all params is "
        f"{fed['params_rms']:.2g} at the end. torch's float64 params are off the textbook's (tests/reference.py) by "
        f"{fed['textbook_distance']:.1e} at most after {min(TEXTBOOK_STEPS, config.steps)} steps.",
        error_table(fed["errors"]),
        f"![growth of the error](long-run-{result['date']}.png)",
        "## Training freely",
        "Final losses in nats per byte: held-out, and the mean over the last tenth of the training steps. Two runs of "
        "adamw_ext had every weight of the start moved by one part in 2^23: what they differ by is chance. Others may "
        f"be {APART:g} times as far from ours.",
        loss_table(result),
        "## Memory",
        "Growth of the process from a fifth of the run to its end: Python objects (all that the collector knows), "
        "those of them that are tensors, and resident memory (medians over a fifth of the run), of which the losses "
        "and times that the run records take 0.2 kB a step. Asked of adamw_ext: no object, no tensor, less than "
        f"{RESIDENT_GROWTH / 1e6:g} MB.",
        memory_table(free),
        "## Resuming",
        resume_text(free[RESUMED]["resumes"], result["seed"]),
    ]
    return "\n\n".join(parts) + "\n"


def error_table(errors: dict[int, Any]) -> str:
    steps = [step for step in errors if step in SHOWN_STEPS or step == max(errors)]
    rows = []
    for part in ("all", "decayed", "not decayed"):
        for name in (OURS, FUSED, FOREACH, ONE_ROUNDING):
            cells = [errors[step][name][part] for step in steps]
            rows.append([part, name, *(f"{cell['rms']:.1e} ({cell['max']:.1e})" for cell in cells)])
    return table(["params", "", *(f"after {step:,}" for step in steps)], rows)


def loss_table(result: Result) -> str:
    ours = result["final_losses"][OURS]
    rows = []
    for name, ends in result["final_losses"].items():
        rows.append([name, *(f"{ends[kind]:.6f} ({ends[kind] - ours[kind]:+.1e})" for kind in ours)])
    return table(["optimizer", "held-out loss (against ours)", "train loss (against ours)"], rows)


def memory_table(free: Result) -> str:
    rows = []
    for name, run in free.items():
        if name != RESUMED:  # makes objects between its steps
            grown = growth(run["memory"])
            rows.append([name, *(f"{grown[key]:+,}" for key in ("objects", "tensors", "resident_bytes"))])
    return table(["run", "objects", "tensors", "resident memory, bytes"], rows)


def resume_text(resumes: Result, seed: int) -> str:
    verdict = f"{len(resumes['differences'])} DIFFERENCES" if resumes["differences"] else "the same bits every time"
    return (
        f"At {len(resumes['steps'])} random steps (seed {seed}) model, optimizer, scheduler and random state went "
        f"through torch.save and torch.load into fresh objects, which made {STEPS_AFTER_RESUME} steps. Losses and all "
        f"that is in the checkpoint then, against the run that never stopped: {verdict}."
    )


def measure(plan: Plan, seed: int, workers: int) -> Result:
    begin = time.perf_counter()
    result: Result = {**conditions(), "plan": vars(plan), "seed": seed, "workers": workers}
    result |= run_jobs(plan, seed, workers)
    summarise(result, plan)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="200 steps: shows that it runs, and no more")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the steps to resume at")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    plan = Plan(steps=200, width=32, resumes=5) if args.quick else Plan()
    result = measure(plan, args.seed, len(os.sched_getaffinity(0)))
    write_dated(args.out, "long-run", result, markdown(result))
    from benchmarks.long_run_picture import draw  # last, when all is written

    draw(result, args.out / f"long-run-{result['date']}.png")
    if result["failures"]:
        sys.exit(f"long run FAILED: {'; '.join(result['failures'])}")


if __name__ == "__main__":
    main()
