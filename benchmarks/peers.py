"""Who is measured: each peer makes, from params with gradients, a function that does one step."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn import Parameter

import adamw_ext
from benchmarks.streaming_floor import streaming_floor

Step = Callable[[], object]
MakeStep = Callable[[list[Parameter]], Step]

OURS = "adamw_ext"
FUSED = "torch fused"
FOREACH = "torch foreach"
DEEPSPEED = "DeepSpeed CPUAdam"
FLOOR = "streaming floor"

HYPERPARAMETERS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def deepspeed(params: list[Parameter]) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # Moments in the params' dtype, as the others have them.
    return DeepSpeedCPUAdam(params, **HYPERPARAMETERS, fp32_optimizer_states=params[0].dtype == torch.float32).step


def peers_on(device: str) -> dict[str, MakeStep]:
    peers: dict[str, MakeStep] = {
        OURS: lambda params: adamw_ext.AdamW(params, **HYPERPARAMETERS).step,
        FUSED: lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, fused=True).step,
        FOREACH: lambda params: torch.optim.AdamW(params, **HYPERPARAMETERS, foreach=True).step,
    }
    if device == "cpu":
        if find_spec("deepspeed"):
            peers[DEEPSPEED] = deepspeed
        peers[FLOOR] = streaming_floor
    return peers
