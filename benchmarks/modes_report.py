"""The tables of the precision modes' benchmark."""

from typing import Any

from benchmarks.mode_bytes import number
from benchmarks.mode_peers import FUSED, OURS
from benchmarks.mode_timing import CLIPPED, TORCH_AFTER
from benchmarks.report import table
from benchmarks.targets import CLIPPING, spread

Result = dict[str, Any]  # what modes.py measures and writes as JSON


METHOD = (
    "Bytes are those of the storages, for each parameter; SR is stochastic rounding. What a step must move: everything "
    "read once, and all but the gradient written once; others may move more. The modes of a group step the same params "
    "and gradients in one process, interleaved with a floor for each, which goes through the very memory that the step "
    "goes through, with as many threads, and computes nothing, and with torch's fused AdamW over float32 and over bf16 "
    "params; each round times one step of each, in an order drawn anew. Times and ratios are medians over the rounds, "
    "with quartiles in brackets; a ratio is taken within its round."
)


def markdown(result: Result) -> str:
    parts = ["# Bytes and time of the precision modes", facts(result)]
    if modes := result["modes"]:
        counted = [[name, f"{mode['formula']} = {number(mode['bytes_moved'])}"] for name, mode in modes.items()]
        parts += [modes_table(modes), "What a step must move, in bytes for each parameter:", table(["", ""], counted)]
    if result["clipping"]:
        parts += ["## Clipping", *(clipping_part(entry) for entry in result["clipping"].values())]
    if result["failures"]:
        lines = [f"- {name}: {text}." for name, text in result["failures"].items()]
        parts += ["## Not measured", "\n".join(lines)]
    return "\n\n".join([*parts, METHOD]) + "\n"


def facts(result: Result) -> str:
    build = result["build"]
    is_busy = result["load_average"] > result["threads"]
    warning = " **Other work was running: times mean little.**" if is_busy else ""
    others = "".join(f", {name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['date']}, {result['processor']}, {result['threads']} threads, torch {build['torch']}, adamw_ext "
        f"{build['adamw_ext']} ({build['isa']}){others}. {result['workload']}: {result['tensors']} tensors, "
        f"{result['numel']:,} parameters. Load average before the run: {result['load_average']:.2f}."
        f"{warning}"
    )


def modes_table(modes: Result) -> str:
    header = ["", "param + state, bytes", "gradient, bytes", "moved, bytes", "ms", "time / its floor's"]
    header += [f"time of {name} / its" for name in FUSED.values()] + ["GB/s", "bytes allocated"]
    return table(header, [mode_row(name, mode) for name, mode in modes.items()])


def mode_row(name: str, mode: Result) -> list[str]:
    is_interleaved = "over_floor" in mode
    cells = [
        f"**{name}**" if mode["kind"] == OURS else name,
        number(mode["bytes_kept"]),
        number(mode["bytes"]["grad"]),
        number(mode["bytes_moved"]),
    ]
    if is_interleaved:
        cells += [milliseconds(mode["seconds"]), spread(mode["over_floor"], ".2f")]
        cells += [spread(mode["fused_over_it"][fused], ".2f") for fused in FUSED.values()]
    else:
        cells += [f"{1e3 * mode['seconds']['median']:,.0f}: {mode['rounds']} steps, too slow to interleave", "", "", ""]
    allocated = f"{mode['allocated_bytes']:,}" if "allocated_bytes" in mode else ""
    return [*cells, f"{mode['gigabytes_per_second']:.1f}", allocated]


def milliseconds(seconds: dict[str, float]) -> str:
    return spread({key: 1e3 * value for key, value in seconds.items()}, ".1f")


def clipping_part(entry: Result) -> str:
    ratio = entry["over_it"][TORCH_AFTER]
    verdict = "reached" if ratio["median"] >= CLIPPING else "not reached"
    text = (
        f"{entry['dtype']}, {entry['rounds']} rounds. {CLIPPED} must move {number(entry['bytes_moved'])} bytes for "
        f"each parameter ({entry['formula']}) and takes {spread(entry['over_floor'], '.2f')} times the floor. Target: "
        f"{TORCH_AFTER}, takes >= {CLIPPING}x its time. Measured: {spread(ratio, '.2f')}, {verdict}."
    )
    rows = []
    for name, seconds in entry["seconds"].items():
        allocated = entry["allocated_bytes"].get(name)
        cells = [milliseconds(seconds), spread(entry["over_it"][name], ".2f")]
        rows.append([name, *cells, "" if allocated is None else f"{allocated:,}"])
    return f"{text}\n\n{table(['', 'ms', f'time / that of {CLIPPED}', 'bytes allocated'], rows)}"
