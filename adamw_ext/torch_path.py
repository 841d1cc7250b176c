"""Params that the hand-written kernel does not take: torch's own functional AdamW updates them.

These are the params of differentiable groups, and tensors on devices or of classes that this build has no kernel for.
"""

from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.optimizer import _get_capturable_supported_devices

from adamw_ext.memory import WHY_NOT_WRITTEN, may_go_into, may_write
from adamw_ext.sharded import part
from adamw_ext.state import MOMENTS, describe, is_moment, is_step, new_state, to_float

# What torch's AdamW computes with; of dtypes that lack an operation it raises halfway.
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.complex128, torch.complex64, torch.complex32),
)


def find_problem(param: Tensor) -> str | None:
    """Why torch's functional AdamW could not update this param with the gradient it has; None if it could."""
    param, grad = part(param), part(param.grad)
    if grad is None:
        return None
    if param.is_nested or grad.is_nested:
        return "it or its gradient is a nested tensor"
    if param.layout != torch.strided or param.is_quantized or param.dtype not in DTYPES:
        return (
            "it must be a strided tensor of a floating point or complex dtype that torch computes with, "
            f"but has layout {param.layout} and dtype {param.dtype}"
        )
    if grad.layout != torch.strided:
        return (
            "Adam does not support sparse gradients, please consider SparseAdam instead; "
            f"its gradient has layout {grad.layout}"
        )
    if not may_write(param):
        return WHY_NOT_WRITTEN
    if not may_go_into(grad, param):
        return "its gradient alone belongs to a functorch transform"
    if (grad.shape, grad.dtype, grad.device) != (param.shape, param.dtype, param.device):
        return (
            f"its gradient must have shape {tuple(param.shape)} and dtype {param.dtype} on {param.device}, "
            f"but has shape {tuple(grad.shape)} and dtype {grad.dtype} on {grad.device}"
        )
    return None


def find_group_problem(group: dict[str, Any], params: list[Tensor], *, scales: bool) -> str | None:
    """Why torch's functional AdamW could not update these params of a group; None if it could. ``scales``: with numbers
    of a gradient scaler."""
    if scales and not group["fused"]:
        return "grad_scale and found_inf go with fused=True only"
    if group["differentiable"] and (group["fused"] or group["foreach"]):
        return "differentiable=True goes with neither fused nor foreach"
    if group["fused"] and group["foreach"]:
        return "fused and foreach cannot be True together"
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return f"betas must be a pair, but is {describe(betas)}"
    for key, value, end in (
        *((key, group.get(key), float("inf")) for key in ("lr", "eps", "weight_decay")),
        *(("betas", beta, 1.0) for beta in betas),
    ):
        if is_read_elsewhere(value):
            continue
        number = to_float(value)
        if number is None or not 0.0 <= number <= end or (key == "betas" and number == 1.0):
            return f"{key} must be a number in [0, {end:g}), but is {describe(value)}"
        if isinstance(value, Tensor) and group["foreach"] and not group["capturable"]:
            return f"a tensor {key} goes with foreach=True only where capturable=True"
    return find_capturable_problem(params) if group["capturable"] else None


def find_capturable_problem(params: list[Tensor]) -> str | None:
    """Why torch would not update these params with capturable=True; None if it would."""
    supported = _get_capturable_supported_devices()
    for param in params:
        if param.device.type not in supported and not torch.compiler.is_compiling():
            return f"capturable=True is for params on {', '.join(supported)}, but there is one on {param.device}"
    return None


def is_read_elsewhere(value: Any) -> bool:
    """Whether this is a number on a device, to be read there, if at all: a step may be captured."""
    return isinstance(value, Tensor) and value.device.type != "cpu" and value.numel() == 1


def find_state_problem(param: Tensor, state: Any, group: dict[str, Any]) -> str | None:
    """Why torch's functional AdamW could not go on with this state; None if it could, or makes it anew."""
    if part(param).grad is None and param.grad is None:
        return None
    if not isinstance(state, (dict, NoneType)):
        return f"its state must be a dict, but is {describe(state)}"
    if not state:
        return None
    if not isinstance(state.get("step"), Tensor) or not is_step(part(state["step"]), part(param)):
        return f"its state 'step' must be a tensor that holds a number of updates, but is {describe(state.get('step'))}"
    for key in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
        moment = part(state.get(key))
        fits = is_moment(moment, part(param)) and (moment.dtype, moment.device) == (param.dtype, param.device)
        if not fits or not may_write(moment):
            return f"its state {key!r} must be a tensor as the param, but is {describe(state.get(key))}"
        if not may_go_into(part(param.grad), moment):
            return f"its gradient belongs to a functorch transform, but its state {key!r} does not"
    return None


def step_group(
    group: dict[str, Any],
    params: list[Tensor],
    states: dict[Tensor, dict[str, Any]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update those of ``params`` (all of ``group``) that have a gradient, creating missing state."""
    active = [param for param in params if param.grad is not None]
    for param in active:
        if not states[param]:
            states[param].update(new_state(param, group))
    if not active:
        return
    of_key = {key: [states[p][key] for p in active] for key in ("exp_avg", "exp_avg_sq", "step")}
    beta1, beta2 = group["betas"]
    torch_adamw(
        active,
        [param.grad for param in active],  # type: ignore[misc]
        of_key["exp_avg"],
        of_key["exp_avg_sq"],
        [states[p]["max_exp_avg_sq"] for p in active] if group["amsgrad"] else [],
        of_key["step"],
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=group["fused"],
        grad_scale=grad_scale,
        found_inf=found_inf,
        has_complex=any(torch.is_complex(param) for param in active),
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
