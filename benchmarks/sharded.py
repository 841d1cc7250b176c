"""Time of a step over DTensors against the same step over plain tensors (`python -m benchmarks.sharded`).

One process, so that the DTensors have all of their elements and do the same work: what remains is what their class
costs. Interleaved rounds; writes sharded-DATE.json and .md.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import adamw_ext
from benchmarks.clocks import Step
from benchmarks.device import conditions, write_dated
from benchmarks.measure import interleaved, quartiles, ratios
from benchmarks.workloads import Shapes, gpt2_shapes

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_ext": adamw_ext.AdamW,
    "adamw_ext, max_grad_norm": lambda params: adamw_ext.AdamW(params, max_grad_norm=1.0),
    "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True),
}
# Title, shapes, steps in a sample, threads: the first two measure the host's work.
WORKS: tuple[tuple[str, Shapes, int, int], ...] = (
    ("148 tensors of 64 elements", ((64,),) * 148, 20, 1),
    ("1,000 tensors of 64 elements", ((64,),) * 1000, 5, 1),
    ("GPT-2 small, 148 tensors", gpt2_shapes(), 1, 2),
)
LIMIT = 1.5  # DTensors against plain tensors


def make_params(shapes: Shapes, mesh: DeviceMesh | None) -> list[torch.Tensor]:
    """With gradients that share their spec with the param, as FSDP2 makes them."""
    params = []
    for shape in shapes:
        values = torch.randn(shape), torch.randn(shape)
        if mesh:
            values = tuple(distribute_tensor(value, mesh, [Shard(0)]) for value in values)
            values[1]._spec = values[0]._spec
        params.append(values[0].requires_grad_())
        params[-1].grad = values[1]
    return params


def measure(shapes: Shapes, repeats: int, threads: int, mesh: DeviceMesh, budget: float) -> dict[str, Any]:
    """Seconds of each optimizer's step over plain tensors and DTensors, and the ratio within rounds."""
    torch.set_num_threads(threads)

    def seconds_of(step: Step) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - begin) / repeats

    steps: dict[str, Step] = {}
    for name, make in OPTIMIZERS.items():
        steps[name] = make(make_params(shapes, None)).step
        steps[f"{name}, DTensors"] = make(make_params(shapes, mesh)).step
    samples = interleaved(steps, seconds_of, budget)
    return {
        name: {
            "plain": quartiles(samples[name]),
            "dtensors": quartiles(samples[f"{name}, DTensors"]),
            "ratio": quartiles(ratios([samples], f"{name}, DTensors", name)),
        }
        for name in OPTIMIZERS
    }


def markdown(result: dict[str, Any]) -> str:
    build = result["build"]
    lines = [
        "# A step over DTensors",
        "",
        f"{result['date']}, {result['processor']}, torch {build['torch']}, adamw_ext {build['adamw_ext']} "
        f"({build['isa']}). Load average before the run: {result['load_average']:.2f}.",
        "",
        "Milliseconds of a step, medians of interleaved rounds; ratio: DTensors over plain tensors within a round, "
        "median and quartiles. One process has all elements. The lists of 64 elements are stepped by one thread.",
        "",
        "| work | optimizer | plain | DTensors | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, work in result["works"].items():
        for name, row in work.items():
            ratio = row["ratio"]
            lines.append(
                f"| {title} | {name} | {1e3 * row['plain']['median']:.3f} | {1e3 * row['dtensors']['median']:.3f} "
                f"| {ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}] |"
            )
    missed = [
        f"{name} over {title}: {work[name]['ratio']['median']:.2f}"
        for title, work in result["works"].items()
        for name in list(OPTIMIZERS)[:2]
        if work[name]["ratio"]["median"] > LIMIT
    ]
    lines += ["", f"Limit: {LIMIT}. " + (f"Missed by {'; '.join(missed)}." if missed else "Held."), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time for each work")
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    result = {
        **conditions(),
        "works": {
            title: measure(shapes, repeats, threads, mesh, args.seconds) for title, shapes, repeats, threads in WORKS
        },
    }
    write_dated(args.out, "sharded", result, markdown(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
