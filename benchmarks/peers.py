"""Who is measured: each peer makes, from params with gradients, a function that does one step."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import adamw_ext
from benchmarks.clocks import Step
from benchmarks.copy_bandwidth import copies, copy_memory
from benchmarks.streaming_floor import streaming_floor
from benchmarks.workloads import Workload

OURS = "adamw_ext"
OURS_CAPTURABLE = "adamw_ext capturable"
OURS_CAPTURED = "adamw_ext captured"
FUSED = "torch fused"
FUSED_CAPTURED = "torch fused captured"
FOREACH = "torch foreach"
DEEPSPEED = "DeepSpeed CPUAdam"
TORCHAO = "torchao AdamW"
BITSANDBYTES = "bitsandbytes AdamW"
APEX = "apex FusedAdam"
TRANSFORMER_ENGINE = "TransformerEngine FusedAdam"
FLOOR = "streaming floor"
COPY = "copy bandwidth"

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
WARM_UP_STEPS = 3

RIVALS_ON_CPU = {DEEPSPEED: "deepspeed", TORCHAO: "torchao", BITSANDBYTES: "bitsandbytes"}  # if they are installed
SLOW_ON_CPU = (TORCHAO, BITSANDBYTES)


def moments(dtype: torch.dtype | None = None, temporaries: float = 0.0) -> Callable[[Workload], int]:
    """Bytes of two moments, in the param's dtype by default, and of temporaries as a multiple of the params."""

    def memory(workload: Workload) -> int:
        moment_bytes = (dtype or workload.dtype).itemsize
        return workload.numel * round(2 * moment_bytes + temporaries * workload.dtype.itemsize)

    return memory


TWO_MOMENTS = moments()


@dataclass(frozen=True)
class Peer:
    """``make_step`` makes the step; ``memory`` is what that takes on the device beside params and gradients, in bytes.

    ``against`` names the one of ours that runs in the same way. A floor moves bytes and computes nothing. A slow one,
    which takes many times as long as ours or compiles first, is measured for itself and in fewer rounds.
    """

    make_step: Callable[[list[Parameter]], Step]
    memory: Callable[[Workload], int] = TWO_MOMENTS
    against: str = OURS
    is_floor: bool = False
    is_slow: bool = False


def peers_on(device: str) -> dict[str, Peer]:
    peers = {
        OURS: Peer(lambda params: adamw_ext.AdamW(params, **HYPERPARAMETERS).step),
        FUSED: Peer(lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, fused=True).step),
        FOREACH: Peer(
            lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, foreach=True).step, moments(temporaries=1.0)
        ),
    }
    return peers | (cpu_peers() if device == "cpu" else cuda_peers())


def cpu_peers() -> dict[str, Peer]:
    rivals = {
        DEEPSPEED: Peer(deepspeed),
        TORCHAO: Peer(torchao, is_slow=True),
        BITSANDBYTES: Peer(bitsandbytes, is_slow=True),
    }
    present = {name: peer for name, peer in rivals.items() if find_spec(RIVALS_ON_CPU[name])}
    return {**present, FLOOR: Peer(streaming_floor, is_floor=True)}


def rival_versions() -> dict[str, str]:
    """Of the packages that bring the peers on the CPU."""
    return {module: metadata.version(module) for module in RIVALS_ON_CPU.values() if find_spec(module)}


def cuda_peers() -> dict[str, Peer]:
    peers = {
        OURS_CAPTURABLE: Peer(lambda params: adamw_ext.AdamW(params, **HYPERPARAMETERS, capturable=True).step),
        OURS_CAPTURED: Peer(lambda params: Captured(adamw_ext.AdamW(params, **HYPERPARAMETERS, capturable=True))),
        FUSED_CAPTURED: Peer(
            lambda params: Captured(torch.optim.AdamW(params, **HYPERPARAMETERS, fused=True, capturable=True)),
            against=OURS_CAPTURED,
        ),
    }
    for name, module in ((APEX, "apex.optimizers"), (TRANSFORMER_ENGINE, "transformer_engine.pytorch.optimizers")):
        if is_importable(module):
            # Both keep float32 moments, of bfloat16 params too.
            peers[name] = Peer(lambda params, module=module: fused_adam(module, params), moments(torch.float32))
    peers[COPY] = Peer(copies, lambda workload: copy_memory(workload.step_bytes), is_floor=True)
    return peers


class Captured:
    """A step captured into a CUDA graph; calling it replays the graph. Keeps the optimizer's state alive."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        if hasattr(optimizer, "init_state"):
            optimizer.init_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            optimizer.step()

    def __call__(self) -> None:
        self.graph.replay()


def deepspeed(params: list[Parameter]) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # Moments in the params' dtype, as the others have them.
    return DeepSpeedCPUAdam(params, **HYPERPARAMETERS, fp32_optimizer_states=params[0].dtype == torch.float32).step


def torchao(params: list[Parameter]) -> Step:
    # Without stochastic rounding, which its public classes of fewer bits have: the update of torch's AdamW, compiled.
    return import_module("torchao.optim")._AdamW(params, **HYPERPARAMETERS).step


def bitsandbytes(params: list[Parameter]) -> Step:
    return import_module("bitsandbytes.optim").AdamW(params, **HYPERPARAMETERS).step


def fused_adam(module: str, params: list[Parameter]) -> Step:
    """apex's and TransformerEngine's class have these arguments in common."""
    return import_module(module).FusedAdam(params, **HYPERPARAMETERS, bias_correction=True, adam_w_mode=True).step


def is_importable(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # a package built for another torch fails in many ways
        return False
    return True
