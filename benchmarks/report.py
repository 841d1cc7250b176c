"""What comes out: the tables."""

from collections.abc import Iterable
from typing import Any

from benchmarks.clocks import Clock, clocks_on
from benchmarks.peers import OURS
from benchmarks.targets import spread

Result = dict[str, Any]  # what step_time.py measures and writes as JSON

METHOD = (
    "All peers step the same params and gradients in one process; each round times one step of each, in an order "
    "drawn anew. Times and ratios are medians over the rounds, with quartiles in brackets; a ratio is taken within "
    "its round."
)
FLOORS = {
    "cpu": (
        "The streaming floor moves the same bytes with the same threads and computes nothing. Of the peers that may be "
        "installed, DeepSpeed's CPUAdam keeps moments in the params' dtype; torchao's AdamW (compiled, a call a param) "
        "and bitsandbytes' (float32 moments, of bfloat16 params too) are measured after the others, each with ours and "
        "the floor, in fewer rounds."
    ),
    "cuda": (
        "Device time is what passes on the device between two events around a step, once the host has enqueued it all; "
        "host time is what passes until the call returns, on an idle device. Copy bandwidth is the time of "
        "device-to-device copies that read and write as many bytes as the step moves. apex and TransformerEngine keep "
        "float32 moments, of bfloat16 params too."
    ),
}


def markdown(result: Result) -> str:
    parts = ["# Time of one optimizer step", facts(result)]
    if "targets" in result:
        parts.append(targets_table(result["targets"]))
    else:
        parts.append("A quick run with small models: it shows that the benchmark works, and no speed.")
    for name, text in result.get("failures", {}).items():
        parts.append(f"**{name} could not be measured in full**: {text}.")
    for workload in result["workloads"].values():
        peers = peers_table(workload["peers"], clocks_on(result["device"]))
        parts += [f"## {workload['title']}", workload_summary(workload), peers]
    parts.append(f"{METHOD} {FLOORS[result['device']]}")
    return "\n\n".join(parts) + "\n"


def facts(result: Result) -> str:
    build = result["build"]
    host = f"{result['threads']} threads"
    if result["device"] == "cuda":
        gpu = result["gpu"]
        host = (
            f"compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB, CUDA {gpu['cuda']}, host {gpu['host']}"
        )
    return (
        f"{result['date']}, {result['device']}, {result['processor']}, {host}, "
        f"torch {build['torch']}, adamw_ext {build['adamw_ext']} ({build['isa']})"
        f"{''.join(f', {module} {version}' for module, version in result.get('rivals', {}).items())}. "
        f"Load average before the run: {result['load_average']:.2f}."
    )


def targets_table(targets: list[Result]) -> str:
    rows = [[target["work"], target["wanted"], target["measured"], verdict(target)] for target in targets]
    return table(["work", "target", "measured", "reached"], rows)


def verdict(target: Result) -> str:
    return ("yes" if target["reached"] else "no") + ("" if target["certain"] else ", within the noise")


def workload_summary(workload: Result) -> str:
    text = (
        f"{workload['tensors']:,} tensors, {workload['numel']:,} parameters, {workload['step_bytes'] / 1e6:,.1f} MB "
        f"a step, {workload['rounds']} rounds."
    )
    if "ours_over_floor" in workload:
        text += f" {OURS} takes {spread(workload['ours_over_floor'], '.2f')} times the floor."
    for name, peer in workload["peers"].items():
        if "against" in peer:
            against = peer["against"]
            text += f" {name} takes {spread(against['ratio'], '.2f')} times {against['peer']}'s time."
    for name, failure in workload.get("failures", {}).items():
        text += f" {name} could not be measured: {failure}."
    return text


def peers_table(peers: Result, clocks: list[Clock]) -> str:
    counts_kernels = any("kernels" in peer for peer in peers.values())
    header = [""]
    for clock in clocks:
        unit = clock.unit if len(clocks) == 1 else f"{clock.title}, {clock.unit}"
        header += [unit, f"{'time' if len(clocks) == 1 else clock.title} / {OURS}'s"]
    header += ["GB/s", *(["kernels"] if counts_kernels else []), "bytes allocated"]
    rows = []
    for name, peer in peers.items():
        cells = [name]
        for clock in clocks:
            cells += clock_cells(peer, clock)
        cells.append(f"{peer['gigabytes_per_second']:.2f}")
        if counts_kernels:
            cells.append(str(peer.get("kernels", "")))
        rows.append([*cells, f"{peer['allocated_bytes']:,}"])
    return table(header, rows)


def clock_cells(peer: Result, clock: Clock) -> list[str]:
    if clock.seconds not in peer:
        return ["", ""]
    scaled = {key: clock.per_second * seconds for key, seconds in peer[clock.seconds].items()}
    return [spread(scaled, f".{clock.digits}f"), spread(peer[clock.ratio], ".2f")]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
