"""Params that the hand-written kernel does not take: torch's own functional AdamW updates them.

These are the params of differentiable groups, and tensors on devices or of classes that this build has no kernel for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from adamw_ext.sharded import part
from adamw_ext.state import new_state


def find_problem(param: Tensor) -> str | None:
    """Why torch's functional AdamW could not update this param with the gradient it has; None if it could."""
    param, grad = part(param), part(param.grad)
    if grad is None:
        return None
    if param.layout != torch.strided or param.is_quantized or not (param.is_floating_point() or param.is_complex()):
        return (
            "it must be a strided tensor of a floating point or complex dtype, "
            f"but has layout {param.layout} and dtype {param.dtype}"
        )
    if grad.layout != torch.strided:
        return (
            "Adam does not support sparse gradients, please consider SparseAdam instead; "
            f"its gradient has layout {grad.layout}"
        )
    if (grad.shape, grad.device) != (param.shape, param.device):
        return (
            f"its gradient must have shape {tuple(param.shape)} on {param.device}, "
            f"but has shape {tuple(grad.shape)} on {grad.device}"
        )
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
