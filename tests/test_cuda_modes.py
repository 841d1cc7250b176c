"""Masters, stochastic rounding and clipping on CUDA have the bits of the CPU, captured or not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.helpers import DEVICES, MODES, assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [*range(70), 127, 128, 129, 1023, 4095, 4096, 4097, 20011]
STEPS = 4

# (param dtype, options): every combination of param, moments, master and rounding beyond torch's.
PRECISIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    *(
        (torch.bfloat16, {"master_weights": master, "moment_dtype": moments, "stochastic_rounding": at_random})
        for master in (None, "fp32", "split")
        for moments in (torch.float32, torch.bfloat16)
        for at_random in (False, True)
    ),
    (torch.float16, {"master_weights": "fp32"}),
    (torch.float16, {"master_weights": "fp32", "moment_dtype": torch.float32}),
    (torch.float16, {"master_weights": "fp32", "moment_dtype": torch.bfloat16}),
    (torch.float16, {"master_weights": "fp32", "moment_dtype": torch.bfloat16, "stochastic_rounding": True}),
    (torch.float32, {"moment_dtype": torch.bfloat16, "stochastic_rounding": True}),
]


def name_precision(value: object) -> str | None:
    if isinstance(value, dict):
        names = (str(option).removeprefix("torch.") for option in value.values() if option not in (None, False))
        return "-".join(names) or "plain"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make(device: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[AdamW, list[list[Tensor]]]:
    """An optimizer over params that begin at every alignment, and their gradients for each step."""
    generator = torch.Generator().manual_seed(0)
    params, grads = [], []
    for i, size in enumerate(SIZES):
        numbers = torch.randn(STEPS + 1, size, generator=generator).to(dtype)
        buffer = torch.full((i % 8 + size,), 7.0, dtype=dtype, device=device)
        param = buffer[i % 8 :].copy_(numbers[0])
        params.append(param.requires_grad_())
        grads.append([torch.cat([row[:0].new_zeros(i // 8 % 8), row]).to(device)[i // 8 % 8 :] for row in numbers[1:]])
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "seed": 7, **options}
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.1, "lr": 3e-3}]
    optimizer = AdamW(groups, **options)
    order = [*grads[::2], *grads[1::2]]
    return optimizer, [[of_param[step] for of_param in order] for step in range(STEPS)]


def hold(optimizer: AdamW, grads: list[Tensor]) -> None:
    for param, grad in zip((p for group in optimizer.param_groups for p in group["params"]), grads, strict=True):
        param.grad = grad


def results(optimizer: AdamW) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param][key] for param in params for key in sorted(optimizer.state[param])]
    norm = [optimizer.grad_norm] if optimizer.param_groups[0].get("max_grad_norm") is not None else []
    return [tensor.detach().cpu() for tensor in (*params, *states, *norm)]


def train(device: str, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    optimizer, grads = make(device, dtype, options)
    for of_step in grads:
        hold(optimizer, of_step)
        optimizer.step()
    return results(optimizer)


@pytest.mark.parametrize(("dtype", "options"), PRECISIONS, ids=name_precision)
@pytest.mark.parametrize(("amsgrad", "max_grad_norm"), [(False, None), (True, 1.0)], ids=["plain", "amsgrad-clipped"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_precision_has_the_bits_of_the_cpu(
    device: str, amsgrad: bool, max_grad_norm: float | None, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    options = {**options, "amsgrad": amsgrad, "max_grad_norm": max_grad_norm}
    expected = train("cpu", dtype, options)
    before = results(make("cpu", dtype, {"lr": 0.0})[0])[: len(SIZES)]
    assert not all(torch.equal(there, here) for there, here in zip(expected, before, strict=False))
    for mode, flags in MODES.items():
        assert_same_bits(train(device, dtype, {**options, **flags}), expected, mode)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "options"), PRECISIONS, ids=name_precision)
def test_every_precision_has_the_same_bits_captured(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Random bits depend on the step, which a replay counts on the device."""
    options = {**options, "max_grad_norm": 1.0, "capturable": True}
    expected = train("cpu", dtype, options)
    optimizer, grads = make("cuda", dtype, options)
    static = [grad.clone() for grad in grads[0]]
    hold(optimizer, static)
    optimizer.init_state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for of_step in grads:
        for held, grad in zip(static, of_step, strict=True):
            held.copy_(grad)
        graph.replay()
    assert_same_bits(results(optimizer), expected, "captured")
