"""A few steps of everything that has a kernel, small enough for compute-sanitizer: python -m benchmarks.sanitized_run

Odd sizes, misaligned views, an empty tensor, every dtype combination, each way of running, found_inf and a replayed
graph. The params must end with the bits of the same run on the CPU.
"""

import argparse
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_ext import _C, AdamW

SIZES = (1, 0, 3, 127, 1021, 4099, 66_001)
MODES: dict[str, dict[str, Any]] = {
    "host": {},
    "host, amsgrad, maximize": {"amsgrad": True, "maximize": True},
    "capturable": {"capturable": True},
    "fused": {"fused": True},
    "fused, capturable, amsgrad": {"fused": True, "capturable": True, "amsgrad": True},
}
COMBINATIONS = [
    *((getattr(torch, param), getattr(torch, moments)) for param, moments in {c[:2] for c in _C.combinations()}),
    (torch.complex64, torch.complex64),
]
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32 master, clipped": {"master_weights": "fp32", "max_grad_norm": 1.0},
    "split master, random moments": {"master_weights": "split", "stochastic_rounding": True},
    "random params and moments, amsgrad, clipped": {"stochastic_rounding": True, "amsgrad": True, "max_grad_norm": 1.0},
    "split master, capturable, clipped": {"master_weights": "split", "capturable": True, "max_grad_norm": 1.0},
}
STEPS = 3


def make_optimizer(device: str, dtypes: tuple[torch.dtype, torch.dtype], mode: dict[str, Any]) -> AdamW:
    """Over params that begin at every offset modulo 4 elements, and gradients that begin at others."""
    dtype, moment_dtype = dtypes
    generator = torch.Generator().manual_seed(0)
    params = []
    for index, size in enumerate(SIZES):
        values, grads = torch.randn(2, size, generator=generator).to(dtype)
        param = Parameter(misaligned(values, index % 4, device))
        param.grad = misaligned(grads, (index + index // 4) % 4, device)
        params.append(param)
    optimizer = AdamW(params, lr=1e-2, **mode)
    optimizer.init_state()
    if moment_dtype != dtype:
        loaded = optimizer.state_dict()
        loaded["state"] = {
            index: {key: value if key == "step" else value.to(moment_dtype) for key, value in state.items()}
            for index, state in loaded["state"].items()
        }
        optimizer.load_state_dict(loaded)
    return optimizer


def misaligned(values: Tensor, offset: int, device: str) -> Tensor:
    """A copy that begins ``offset`` elements into its memory and ends with it: beyond the end, a checker notices."""
    memory = torch.empty(offset + values.numel(), dtype=values.dtype, device=device)
    return memory[offset:].copy_(values)


def step_with_scaler(optimizer: AdamW, device: str) -> None:
    """Steps with a scale, of which the second overflows and is skipped."""
    for found_inf in (0.0, 1.0, 0.0):
        optimizer.grad_scale = torch.full((), 4.0, device=device)
        optimizer.found_inf = torch.full((), found_inf, device=device)
        optimizer.step()


def step_plainly(optimizer: AdamW, device: str) -> None:
    for _ in range(STEPS):
        optimizer.step()


def step_captured(optimizer: AdamW, device: str) -> None:
    """As many steps as ``step_plainly``: the first one eagerly, the others by replaying a graph."""
    if device == "cpu":
        step_plainly(optimizer, device)
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(STEPS - 1):
        graph.replay()
    torch.cuda.synchronize()


def compare(
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    mode: str,
    run: Callable[[AdamW, str], None],
) -> None:
    results = []
    for place in (device, "cpu"):
        optimizer = make_optimizer(place, dtypes, {**MODES, **PRECISIONS}[mode])
        run(optimizer, place)
        params = optimizer.param_groups[0]["params"]
        moments = [value for param in params for key, value in optimizer.state[param].items() if key != "step"]
        results.append([tensor.detach().cpu() for tensor in (*params, *moments)])
    for here, there in zip(*results, strict=True):
        if not torch.equal(here, there):
            raise SystemExit(f"{dtypes}, {mode}, {run.__name__}: {device} and cpu differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    gc.disable()  # a collection within a capture might free memory, which the device forbids then
    for dtypes in COMBINATIONS:
        for mode, options in MODES.items():
            compare(device, dtypes, mode, step_with_scaler if options.get("fused") else step_plainly)
        if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:  # without torch's allocator nothing can be captured
            compare(device, dtypes, "capturable", step_captured)
    for mode in PRECISIONS:
        compare(device, (torch.bfloat16, torch.bfloat16), mode, step_plainly)
    print(
        f"{len(COMBINATIONS)} dtype combinations, {len(MODES)} modes and graphs, {len(PRECISIONS)} precisions of "
        "bfloat16: the bits of the CPU"
    )


if __name__ == "__main__":
    main()
