"""The precision modes under measurement: what each stores, by the constructor's arguments."""

from dataclasses import dataclass, field
from typing import Any

import torch

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Mode:
    name: str
    dtype: torch.dtype  # of the params and their gradients
    options: dict[str, Any] = field(default_factory=dict)


FLOAT32 = Mode("float32", FP32)
MODES = (
    FLOAT32,
    Mode("float32, bf16 moments, SR", FP32, {"moment_dtype": BF16, "stochastic_rounding": True}),
    Mode("bf16", BF16),
    Mode("bf16, fp32 moments", BF16, {"moment_dtype": FP32}),
    Mode("bf16, fp32 master, fp32 moments", BF16, {"master_weights": "fp32", "moment_dtype": FP32}),
    Mode("bf16, split master, fp32 moments", BF16, {"master_weights": "split", "moment_dtype": FP32}),
    Mode("bf16, split master", BF16, {"master_weights": "split"}),
    Mode("bf16, split master, SR", BF16, {"master_weights": "split", "stochastic_rounding": True}),
    Mode("bf16, SR, fp32 moments", BF16, {"stochastic_rounding": True, "moment_dtype": FP32}),
    Mode("bf16, SR", BF16, {"stochastic_rounding": True}),
)
