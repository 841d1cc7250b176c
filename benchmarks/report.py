"""What comes out: the contract's targets judged by the data, and the tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import FLOOR, FUSED, OURS

Result = dict[str, Any]  # what step_time.py measures and writes as JSON


@dataclass(frozen=True)
class Target:
    """A bound on the time of ``peer`` relative to ours, or, for the floor, of ours relative to the floor."""

    workload: str
    peer: str
    bound: float

    @property
    def is_upper(self) -> bool:
        return self.peer == FLOOR

    @property
    def wanted(self) -> str:
        return f"<= {self.bound:.2f}x floor" if self.is_upper else f">= {self.bound:g}x {self.peer}"

    def ratio(self, workload: Result) -> dict[str, float]:
        return workload["ours_over_floor"] if self.is_upper else workload["peers"][self.peer]["ratio"]

    def reached(self, ratio: float) -> bool:
        return ratio <= self.bound if self.is_upper else ratio >= self.bound

    def judge(self, workload: Result) -> Result:
        ratio = self.ratio(workload)
        return {
            "work": workload["title"],
            "wanted": self.wanted,
            "measured": spread(ratio, ".2f"),
            "reached": self.reached(ratio["median"]),
            "certain": self.reached(ratio["q1"]) == self.reached(ratio["q3"]),
        }


TARGETS = {
    "cpu": [
        Target("gpt2-fp32", FUSED, 1.0),
        Target("gpt2-fp32", FLOOR, 1.10),
        Target("gpt2-bf16", FUSED, 2.0),
        Target("gpt2-bf16", FLOOR, 1.15),
        Target("small-tensors", FUSED, 100.0),
        Target("resnet50", FUSED, 1.3),
    ]
}
IMPORT_SECONDS = 0.2


def judge(result: Result) -> list[Result]:
    """The targets that this run can judge: what is wanted, what was measured, and whether it is reached.

    The median decides; the verdict is ``certain`` where both quartiles agree with it.
    """
    workloads = result["workloads"]
    rows = [
        target.judge(workloads[target.workload]) for target in TARGETS[result["device"]] if target.workload in workloads
    ]
    temporaries = max(workload["peers"][OURS]["allocated_bytes"] for workload in workloads.values())
    rows.append(
        {
            "work": "temporaries of a steady-state step",
            "wanted": "0 bytes",
            "measured": f"{temporaries} bytes",
            "reached": temporaries == 0,
            "certain": True,
        }
    )
    seconds = result["import_seconds"]["median"]
    rows.append(
        {
            "work": "import, beyond torch's own",
            "wanted": f"< {IMPORT_SECONDS} s",
            "measured": f"{seconds:.3f} s",
            "reached": seconds < IMPORT_SECONDS,
            "certain": True,
        }
    )
    return rows


def markdown(result: Result) -> str:
    build = result["build"]
    facts = (
        f"{result['date']}, {result['device']}, {result['processor']}, {result['threads']} threads, "
        f"torch {build['torch']}, adamw_ext {build['adamw_ext']} ({build['isa']}). "
        f"Load average before the run: {result['load_average']:.2f}."
    )
    parts = ["# Time of one optimizer step", facts]
    if "targets" in result:
        parts.append(targets_table(result["targets"]))
    else:
        parts.append("A quick run with small models: it shows that the benchmark works, and no speed.")
    for workload in result["workloads"].values():
        parts += [f"## {workload['title']}", workload_summary(workload), peers_table(workload["peers"])]
    parts.append(
        "All peers step the same params and gradients in one process; each round times one step of each, in an order "
        "drawn anew. Times and ratios are medians over the rounds, with quartiles in brackets; a ratio is taken within "
        "its round. The streaming floor moves the same bytes with the same threads and computes nothing."
    )
    return "\n\n".join(parts) + "\n"


def targets_table(targets: list[Result]) -> str:
    def verdict(target: Result) -> str:
        return ("yes" if target["reached"] else "no") + ("" if target["certain"] else ", within the noise")

    rows = [[target["work"], target["wanted"], target["measured"], verdict(target)] for target in targets]
    return table(["work", "target", "measured", "reached"], rows)


def workload_summary(workload: Result) -> str:
    text = (
        f"{workload['tensors']:,} tensors, {workload['numel']:,} parameters, {workload['step_bytes'] / 1e6:,.1f} MB "
        f"a step, {workload['rounds']} rounds."
    )
    if "ours_over_floor" in workload:
        text += f" {OURS} takes {spread(workload['ours_over_floor'], '.2f')} times the floor."
    return text


def peers_table(peers: Result) -> str:
    header = ["", "ms", f"time / {OURS}'s", "GB/s", "bytes allocated"]
    rows = [
        [
            name,
            spread({key: 1e3 * seconds for key, seconds in peer["seconds"].items()}, ".3f"),
            spread(peer["ratio"], ".2f"),
            f"{peer['gigabytes_per_second']:.2f}",
            f"{peer['allocated_bytes']:,}",
        ]
        for name, peer in peers.items()
    ]
    return table(header, rows)


def spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['q1']:{form}} to {values['q3']:{form}})"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
