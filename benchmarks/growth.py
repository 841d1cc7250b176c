"""How the time of a step grows with the number of tensors, and with the size of one: python -m benchmarks.growth

Writes growth-DATE.json and .md, growth-tensors-DATE.png and growth-elements-DATE.png. Over many tensors of 64 elements
every optimizer has state of its own, as in step_time.py. Over one tensor all step the same param with the same state:
memory then allows for large ones.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import adamw_ext
from benchmarks.buffers_floor import buffers_floor
from benchmarks.clocks import Step, cpu_seconds
from benchmarks.device import conditions, write_dated
from benchmarks.measure import interleaved, quartiles, ratios
from benchmarks.mode_bytes import as_text
from benchmarks.peers import FLOOR, FOREACH, FUSED, HYPERPARAMETERS, OURS
from benchmarks.report import table
from benchmarks.streaming_floor import streaming_floor

Result = dict[str, Any]
Makers = dict[str, Callable[[list[Parameter]], Optimizer]]

SINGLE = "torch single"
MAKERS: Makers = {
    OURS: lambda params: adamw_ext.AdamW(params, **HYPERPARAMETERS),
    FUSED: lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, fused=True),
    FOREACH: lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, foreach=True),
    SINGLE: lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, foreach=False, fused=False),
}
SINGLE_TENSORS, SINGLE_ELEMENTS = 10_000, 100_000_000  # the most for which torch's loop takes no more than a second

ELEMENTS = 64  # of each of many tensors
TENSORS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
SIZES = tuple(factor * 10**power for power in range(3, 9) for factor in (1, 3)) + (10**9,)
LARGE_ELEMENTS = 10_000_000  # beyond, fewer rounds: they take seconds and vary little

PART_OF_MEMORY = 0.7  # of what is available when a point is begun
BUFFERS = 6  # param, gradient, two moments, and two temporaries of torch's
PATTERN = 1_000_000  # random numbers, which larger tensors repeat


@dataclass(frozen=True)
class Point:
    tensors: int
    elements: int
    dtype: torch.dtype = torch.float32

    @property
    def total(self) -> int:
        return self.tensors * self.elements

    @property
    def needed_bytes(self) -> int:
        return BUFFERS * self.total * self.dtype.itemsize

    @property
    def is_single_bearable(self) -> bool:
        return self.tensors <= SINGLE_TENSORS and self.total <= SINGLE_ELEMENTS


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])


def fitting(elements: int, most_bytes: float) -> Point | None:
    """One tensor: in float32, or, where that does not fit, in bfloat16, or not at all."""
    points = (Point(1, elements, dtype) for dtype in (torch.float32, torch.bfloat16))
    return next((point for point in points if point.needed_bytes <= most_bytes), None)


@torch.no_grad()
def make_params(point: Point) -> list[Parameter]:
    """Standard normal params with standard normal gradients."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(PATTERN, generator=generator).to(point.dtype)

    def make() -> Tensor:
        tensor = torch.empty(point.elements, dtype=point.dtype)
        at = int(torch.randint(PATTERN - min(PATTERN, point.elements) + 1, (), generator=generator))
        for piece in tensor.split(PATTERN):
            piece.copy_(pattern[at : at + len(piece)])
        return tensor

    params = [Parameter(make()) for _ in range(point.tensors)]
    for param in params:
        param.grad = make()
    return params


def own_state(params: list[Parameter], makers: Makers) -> dict[str, Step]:
    return {name: make(params).step for name, make in makers.items()} | {FLOOR: streaming_floor(params)}


def shared_state(params: list[Parameter], makers: Makers) -> dict[str, Step]:
    optimizers = {name: make(params) for name, make in makers.items()}
    optimizers[OURS].init_state()
    for optimizer in optimizers.values():
        for param in params:
            optimizer.state[param] = dict(optimizers[OURS].state[param])
    rows = []
    for param in params:
        state = optimizers[OURS].state[param]
        rows.append([(param, True), (param.grad, False), (state["exp_avg"], True), (state["exp_avg_sq"], True)])
    return {name: optimizer.step for name, optimizer in optimizers.items()} | {FLOOR: buffers_floor(rows)}


@torch.no_grad()
def check_moves(name: str, step: Step, params: list[Parameter]) -> None:
    """Raise unless a step moves every param, in some 1,000 places of each: time of work not done means nothing."""
    for param in params:
        param.zero_()
    step()
    for index, param in enumerate(params):
        places = slice(None, None, max(1, param.numel() // 1000))
        if bool(((param[places] == 0) & (param.grad[places] != 0)).any()):
            raise RuntimeError(f"a step of {name} left elements of tensor {index} of {len(params)} as they were")


def measure(point: Point, seconds: float) -> Result:
    params = make_params(point)
    starts = [param.detach().clone() for param in params] if point.total <= LARGE_ELEMENTS else []
    makers = {name: make for name, make in MAKERS.items() if name != SINGLE or point.is_single_bearable}
    steps = (own_state if point.tensors > 1 or point.elements == ELEMENTS else shared_state)(params, makers)
    for name in makers:
        check_moves(name, steps[name], params)
    with torch.no_grad():
        for param, start in zip(params, starts or [param.grad for param in params], strict=True):
            param.copy_(start)
    is_large = point.total > LARGE_ELEMENTS or point.tensors > SINGLE_TENSORS
    rounds = {"least_rounds": 5, "warm_up_steps": 1} if is_large else {}
    samples = interleaved(steps, cpu_seconds, seconds, **rounds)
    if not all(bool(param[:: max(1, param.numel() // 1000)].isfinite().all()) for param in params):
        raise RuntimeError("params are no longer finite: the times mean nothing")
    return {
        "tensors": point.tensors,
        "elements": point.elements,
        "dtype": as_text(point.dtype),
        "rounds": len(samples[OURS]),
        "seconds": {name: quartiles(taken) for name, taken in samples.items()},
        "over_ours": {name: quartiles(ratios([samples], name, OURS)) for name in samples},
        "over_floor": {name: quartiles(ratios([samples], name, FLOOR)) for name in samples},
    }


def measure_all(tensors: tuple[int, ...], sizes: tuple[int, ...], seconds: float, most_bytes: float) -> Result:
    """Both curves. What does not fit into memory is a line in ``left_out``."""
    result: Result = {"by_tensors": [], "by_elements": [], "left_out": []}
    for count in tensors:
        result["by_tensors"].append(measure(Point(count, ELEMENTS), seconds))
        print(line_of(result["by_tensors"][-1]), flush=True)
        gc.collect()
    for size in sizes:
        point = fitting(size, most_bytes)
        if point is None:
            result["left_out"].append(f"{size:,} elements: 70% of the available memory is {most_bytes / 1e9:.1f} GB")
            continue
        result["by_elements"].append(measure(point, seconds))
        print(line_of(result["by_elements"][-1]), flush=True)
        gc.collect()
    return result


def line_of(point: Result) -> str:
    times = ", ".join(f"{name} {duration(seconds['median'])}" for name, seconds in point["seconds"].items())
    return f"{point['tensors']:,} x {point['elements']:,} {point['dtype']}: {times}"


def duration(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{scale * seconds:.3g} {unit}"


def curve_table(points: list[Result], key: str, title: str) -> str:
    names = (OURS, FUSED, FOREACH, SINGLE, FLOOR)
    rows = []
    for point in points:
        seconds, over_ours = point["seconds"], point["over_ours"]
        cells = [f"{point[key]:,}" + ("" if point["dtype"] == "float32" else f", {point['dtype']}")]
        for name in names:
            if name not in seconds:
                cells.append("")
                continue
            cells.append(duration(seconds[name]["median"]))
            if name != OURS:
                cells[-1] += f" ({over_ours[name]['median']:.2f}x)"
        over = point["over_floor"][OURS]
        rows.append([*cells, f"{over['median']:.2f} ({over['q1']:.2f} to {over['q3']:.2f})", str(point["rounds"])])
    return table([title, *names, f"{OURS} / floor", "rounds"], rows)


def markdown(result: Result) -> str:
    build = result["build"]
    parts = [
        "# How the time of a step grows",
        f"{result['date']}, {result['processor']}, {result['threads']} threads, torch {build['torch']}, adamw_ext "
        f"{build['adamw_ext']} ({build['isa']}). Load average before the run: {result['load_average']:.2f}.",
        "Medians of interleaved rounds, in brackets times that of adamw_ext in the same round; a streaming floor moves "
        "the same bytes and computes nothing.",
        f"## With the number of tensors, of {ELEMENTS} float32 each",
        f"Every optimizer has state of its own. torch's single-tensor loop is left out beyond {SINGLE_TENSORS:,}.",
        curve_table(result["by_tensors"], "tensors", "tensors"),
        f"![time against tensors](growth-tensors-{result['date']}.png)",
        "## With the elements of one tensor",
        "All optimizers and the floor work on the same param, gradient and moments, float32 unless said otherwise. "
        f"torch's single-tensor loop is left out beyond {SINGLE_ELEMENTS:,}.",
        curve_table(result["by_elements"], "elements", "elements"),
        f"![time against elements](growth-elements-{result['date']}.png)",
    ]
    parts += [f"Left out: {text}." for text in result["left_out"]]
    if result["quick"]:
        parts.insert(1, "A quick run: it shows that the benchmark works, and no speed.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="small points and few rounds")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time for each point, at least")
    args = parser.parse_args()
    available = available_bytes()
    result = {
        **conditions(),
        "threads": torch.get_num_threads(),
        "quick": args.quick,
        "available_bytes": available,
        **measure_all(
            TENSORS[:5] if args.quick else TENSORS,
            SIZES[:5] if args.quick else SIZES,
            0.05 if args.quick else args.seconds,
            PART_OF_MEMORY * available,
        ),
    }
    write_dated(args.out, "growth", result, markdown(result))
    from benchmarks.growth_picture import draw  # last, when all is written

    draw(result, args.out)


if __name__ == "__main__":
    main()
