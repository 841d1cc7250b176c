"""How many kernels a step launches: one for 500 tensors, and one more for the scalars where steps are on the device.

`python -m tests.test_cuda_launches` prints the names of the kernels, memory copies and fills of a step in each mode, as
JSON. The tests read that from another process: after a profiler has been at work, CUDA graphs are not to be trusted.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adamw_ext
from tests.helpers import MODES, Captured

ROOT = Path(__file__).parent.parent
COUNT = 500
MARKER = "spin_kernel"  # what torch.cuda._sleep launches


def make_optimizer(dtypes: tuple[torch.dtype, ...], device: str = "cuda", **flags: object) -> adamw_ext.AdamW:
    """Over 500 tensors of these dtypes in turn, with gradients and one step made."""
    params = []
    for i in range(COUNT):
        params.append(torch.nn.Parameter(torch.ones(1 + i % 100, device=device, dtype=dtypes[i % len(dtypes)])))
        params[-1].grad = torch.ones_like(params[-1])
    optimizer = adamw_ext.AdamW([{"params": params[: COUNT // 2]}, {"params": params[COUNT // 2 :]}], **flags)
    optimizer.step()
    return optimizer


def device_work(step: Callable[[], object], steps: int = 3) -> list[str] | None:
    """Names of what the device did in one of several equal steps; None if the profiler does not see the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            torch.cuda._sleep(1)
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    return per_step(trace, steps)


def per_step(trace: dict[str, list[dict[str, object]]], steps: int) -> list[str] | None:
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    names = sorted(str(event["name"]) for event in trace["traceEvents"] if event.get("cat") in kinds)
    markers = [name for name in names if MARKER in name]
    if len(markers) != steps:
        return None
    others = [name for name in names if MARKER not in name]
    if others != [name for name in others[::steps] for _ in range(steps)]:
        raise RuntimeError(f"equal steps did different work: {others}")
    return others[::steps]


def graph_nodes(step: Callable[[], object]) -> list[int]:
    """The types of the nodes of the graph that captures step: 0 is a kernel (CUgraphNodeType in cuda.h)."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        step()
    driver = ctypes.CDLL("libcuda.so.1")
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    if driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) != 0:
        raise RuntimeError("cuGraphGetNodes failed")
    nodes = (ctypes.c_void_p * count.value)()
    types = []
    if count.value and driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) != 0:
        raise RuntimeError("cuGraphGetNodes failed")
    for node in nodes:
        kind = ctypes.c_int()
        if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) != 0:
            raise RuntimeError("cuGraphNodeGetType failed")
        types.append(kind.value)
    return types


def measure() -> dict[str, list[object] | None]:
    float32, two = (torch.float32,), (torch.float32, torch.bfloat16)
    measured: dict[str, list[object] | None] = {
        "graph": list(graph_nodes(make_optimizer(float32, capturable=True).step))
    }
    captured = Captured(make_optimizer(float32, capturable=True).step, "cuda")
    device_work(lambda: None)  # the first profile of a process may miss what happens early
    for mode, flags in MODES.items():
        measured[mode] = device_work(make_optimizer(float32, **flags).step)
        measured[f"two dtypes, {mode}"] = device_work(make_optimizer(two, **flags).step)
    scaled = make_optimizer(float32, capturable=True, lr=torch.tensor(0.1, device="cuda"))
    scaled.grad_scale, scaled.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    measured["scaled"] = device_work(scaled.step)
    measured["replayed"] = device_work(captured.replay)
    return measured


@pytest.fixture(scope="module")
def work_of() -> Callable[[str], list[object]]:
    """What the device does in a step, by case."""
    command = [sys.executable, "-m", __name__]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    measured = json.loads(answer.stdout.splitlines()[-1])

    def work_of(case: str) -> list[object]:
        if measured[case] is None:
            pytest.skip("torch.profiler does not see this device's kernels")
        return measured[case]

    return work_of


@pytest.mark.cuda
@pytest.mark.parametrize(("mode", "kernels"), [("host_steps", 1), ("capturable", 2), ("fused", 2)])
def test_a_step_of_500_tensors_is_one_kernel_and_one_for_scalars_on_the_device(
    work_of: Callable[[str], list[object]], mode: str, kernels: int
) -> None:
    assert len(work_of(mode)) == kernels, work_of(mode)


@pytest.mark.cuda
def test_a_tensor_lr_and_a_scalers_tensors_cost_no_kernel(work_of: Callable[[str], list[object]]) -> None:
    assert len(work_of("scaled")) == 2, work_of("scaled")


@pytest.mark.cuda
@pytest.mark.parametrize(("mode", "kernels"), [("host_steps", 2), ("capturable", 3), ("fused", 3)])
def test_each_dtype_takes_an_update_kernel(work_of: Callable[[str], list[object]], mode: str, kernels: int) -> None:
    work = work_of(f"two dtypes, {mode}")
    assert len(work) == kernels, work


@pytest.mark.cuda
def test_a_captured_step_is_two_kernels_and_nothing_else(work_of: Callable[[str], list[object]]) -> None:
    assert work_of("graph") == [0, 0]


@pytest.mark.cuda
def test_a_replay_is_two_kernels(work_of: Callable[[str], list[object]]) -> None:
    assert len(work_of("replayed")) == 2, work_of("replayed")


def test_kernels_copies_and_fills_are_counted_and_markers_are_not() -> None:
    """The reading of a profile, on a made-up one."""

    def trace(*events: tuple[str, str]) -> dict[str, list[dict[str, object]]]:
        return {"traceEvents": [{"name": name, "cat": category} for category, name in events] + [{"name": "meta"}]}

    step = [("kernel", "a::spin_kernel(long)"), ("kernel", "update"), ("gpu_memset", "Memset (Device)")]
    annotation = ("gpu_user_annotation", "Optimizer.step#AdamW.step")
    assert per_step(trace(*step, *step, annotation, ("cpu_op", "aten::ones")), 2) == ["Memset (Device)", "update"]
    assert per_step(trace(("kernel", "update")), 1) is None
    with pytest.raises(RuntimeError, match="different work"):
        per_step(trace(*step, *step, ("kernel", "update")), 2)


if __name__ == "__main__":
    print(json.dumps(measure()))
