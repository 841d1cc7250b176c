"""Peak memory of training with every param stepped in backward against after it (`python -m benchmarks.in_backward`).

Each run is a process of its own, on Linux. Tensors are counted by torch's profiler, exactly; resident memory is what
the kernel says the process needed at most, beyond what it had before the model was made. The host time of a step is
the processor time of calls of ``step()`` over 1,000 params of 64 elements, in interleaved rounds.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import adamw_ext
from benchmarks.allocations import peak_bytes, status_bytes
from benchmarks.device import conditions, write_dated
from benchmarks.mode_bytes import stored_bytes
from examples.gpt import GPT, GPTConfig, decay_groups
from examples.in_backward import step_in_backward

WAYS = ("after backward", "in backward")
GPT2_SMALL = GPTConfig(vocabulary=50257, context=1024, layers=12, heads=12, width=768)
TOKENS = 128  # in a sequence
STEPS = 3
PARAMS, ELEMENTS, ROUNDS = 1_000, 64, 15


@dataclass(frozen=True)
class Work:
    title: str
    model: GPTConfig
    batch: int
    dtype: torch.dtype = torch.float32
    master_weights: str | None = None


GPT2_BLOCKS = replace(GPT2_SMALL, vocabulary=256)

WORKS = (
    Work("the demo's GPT, 8 sequences", GPTConfig(), 8),
    Work("the demo's GPT, 1 sequence", GPTConfig(), 1),
    Work("GPT-2 small, 1 sequence", GPT2_SMALL, 1),
    Work("the same with a vocabulary of 256", GPT2_BLOCKS, 1),
    Work('GPT-2 small, 1 sequence, bfloat16, master_weights="split"', GPT2_SMALL, 1, torch.bfloat16, "split"),
)


def measure(work: Work, way: str) -> dict[str, float]:
    """In a process of its own: bytes of training steps."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before = status_bytes("VmRSS")
    torch.manual_seed(0)
    model = GPT(work.model).to(work.dtype)
    groups, options = decay_groups(model, 0.1), {"lr": 1e-4, "master_weights": work.master_weights}
    in_backward = way == "in backward"
    optimizers = step_in_backward(groups, **options) if in_backward else [adamw_ext.AdamW(groups, **options)]
    tokens = torch.randint(work.model.vocabulary, (work.batch, TOKENS))

    def step() -> None:
        model.loss(tokens, tokens.roll(-1, dims=1)).backward()
        if not in_backward:
            optimizers[0].step()
            optimizers[0].zero_grad()

    for _ in range(STEPS):
        step()
    resident = status_bytes("VmHWM") - before
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    assert all(int(state["step"]) == STEPS for state in states)
    params = [param.detach() for param in model.parameters()]
    kept = stored_bytes([*params, *(value for state in states for value in state.values())])
    return {
        "params": sum(param.numel() for param in params),
        "gradient_bytes": sum(param.nbytes for param in params),
        "kept_bytes": kept,
        "peak_tensor_bytes": kept + peak_bytes(step),
        "peak_resident_bytes": resident,
    }


def seconds_of(work: Callable[[], object]) -> float:
    """Of this thread on a processor: what others do on the machine is left out."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def host_times() -> dict[str, dict[str, float]]:
    """Microseconds for each param of a step of all params, as median and quartiles."""
    torch.set_num_threads(1)
    makers: dict[str, Callable[[list[torch.Tensor]], Iterable[torch.optim.Optimizer]]] = {
        "adamw_ext, one optimizer": lambda params: [adamw_ext.AdamW(params)],
        "adamw_ext, one for each param": lambda params: [adamw_ext.AdamW([param]) for param in params],
        "torch fused, one for each param": lambda params: [torch.optim.AdamW([param], fused=True) for param in params],
        "torch, one for each param": lambda params: [torch.optim.AdamW([param]) for param in params],
    }
    steps = {}
    for name, make in makers.items():
        params = [torch.ones(ELEMENTS, requires_grad=True) for _ in range(PARAMS)]
        for param in params:
            param.grad = torch.ones(ELEMENTS)
        steps[name] = partial(step_all, list(make(params)))
        steps[name]()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name in random.sample(list(steps), len(steps)):
            samples[name].append(1e6 * seconds_of(steps[name]) / PARAMS)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in samples.items()}
    return {name: {"lower": low, "median": middle, "upper": high} for name, (low, middle, high) in quartiles.items()}


def step_all(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def in_process(function: Callable[..., Any], *args: object) -> Any:
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning) as pool:
        return pool.submit(function, *args).result()


def markdown(result: dict[str, Any]) -> str:
    build = result["build"]
    lines = [
        "# Stepping every param in backward",
        "",
        f"{result['date']}, {result['processor']}, {result['threads']} threads, torch {build['torch']}, adamw_ext "
        f"{build['adamw_ext']} ({build['isa']}). Load average before the run: {result['load_average']:.2f}.",
        "",
        f"Memory in MB (10^6 bytes), sequences of {TOKENS} tokens; peaks after backward → in backward. Kept: params "
        "and state, the same both ways. Tensors: the most that is alive at once in a training step, by torch's "
        "profiler. Resident: the most that the process had, beyond what it had before the model was made; it holds "
        "what the C library keeps for later, and varies between runs.",
        "",
        "| work | kept | gradients | peak of tensors | peak of resident memory |",
        "| --- " * 5 + "|",
    ]
    for row in result["works"]:
        after, within = (row[way] for way in WAYS)
        cells = [row["title"], *(f"{after[key] / 1e6:.0f}" for key in ("kept_bytes", "gradient_bytes"))]
        for key in ("peak_tensor_bytes", "peak_resident_bytes"):
            percent = round(100 * (within[key] / after[key] - 1))
            cells.append(f"{after[key] / 1e6:.0f} → {within[key] / 1e6:.0f} ({percent:+d}%)")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "With 8 sequences the peak lies at the end of the forward: activations make it, and freed gradients change "
        "nothing. The embedding of these models is their head too: at the end of backward both of its gradients and "
        "their sum are alive, three times 154 MB with GPT-2's 50,257 tokens in float32.",
        "",
        f"Host time (of the processor, one thread) of a step of {PARAMS:,} params of {ELEMENTS} float32 elements, "
        f"median of {ROUNDS} interleaved rounds, quartiles in brackets:",
        "",
        "| optimizers | µs for each param |",
        "| --- | --- |",
    ]
    for name, time_ in result["host_us_per_param"].items():
        lines.append(f"| {name} | {time_['median']:.2f} [{time_['lower']:.2f}, {time_['upper']:.2f}] |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="the demo's GPT alone")
    args = parser.parse_args()
    result = {
        **conditions(),
        "threads": len(os.sched_getaffinity(0)),
        "works": [
            {"title": work.title, **{way: in_process(measure, work, way) for way in WAYS}}
            for work in (WORKS[:2] if args.quick else WORKS)
        ],
        "host_us_per_param": in_process(host_times),
    }
    write_dated(args.out, "in-backward", result, markdown(result))


if __name__ == "__main__":
    main()
