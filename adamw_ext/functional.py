"""The functional form, with the meaning of :func:`torch.optim.adamw.adamw`."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from adamw_ext.memory import WHY_NOT_WRITTEN, may_go_into, may_read, may_write
from adamw_ext.sharded import is_sharded, part, placed_grad
from adamw_ext.state import describe, is_step, runs_in_kernel, to_float
from adamw_ext.torch_path import DTYPES, find_capturable_problem, is_read_elsewhere


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    amsgrad: bool,
    beta1: float | Tensor,
    beta2: float | Tensor,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
    capturable: bool = False,
    differentiable: bool = False,
) -> None:
    """Update ``params`` and their state in place by one AdamW step, all or none.

    Args:
        params: tensors to update, of any supported dtypes and strides, on devices that have kernels (others go through
            torch). DTensors too: of these and all that belongs to them, the parts in this process.
        grads, exp_avgs, exp_avg_sqs: one tensor per param, of its shape; gradients of its dtype, or any of
            float32, bfloat16 and float16 for a param of these; moments of its dtype, or float32 or bfloat16 for these;
            laid out in memory as the param.
        max_exp_avg_sqs: as exp_avgs if ``amsgrad``, else anything.
        state_steps: one 0-d float32 tensor per param: updates made before this one. Incremented. On the CPU, or, for
            CUDA params, on their device: then the host reads no number, so that the call can be captured in a CUDA
            graph, which keeps float hyperparameters as they are.
        lr: a number, or a 1-element tensor; a CUDA tensor is read on the device by a step that keeps its count there.
        grad_scale: 1 element; gradients are divided by it, in place too.
        found_inf: 1 element; anything but 0 makes this call do nothing.

    Raises:
        RuntimeError, ValueError: before anything has changed, naming the list and index.
    """
    if not isinstance(params, (list, tuple)):
        raise TypeError(f"params must be a list of tensors, but is {describe(params)}")
    for name, flag in (("amsgrad", amsgrad), ("maximize", maximize)):
        if isinstance(flag, Tensor):  # of which torch's messages would read the memory
            raise TypeError(f"{name} must be True or False, but is {describe(flag)}")
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "state_steps": state_steps}
    for name, tensors in {**lists, "max_exp_avg_sqs": max_exp_avg_sqs if amsgrad else []}.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, but is {describe(tensors)}")
    elsewhere = [index for index, param in enumerate(params) if not _is_for_kernel(param, index)]
    if elsewhere and len(elsewhere) < len(params):
        raise RuntimeError(
            f"params must all be on the CPU, or all on another device: params[{elsewhere[0]}] is "
            f"{torch.typename(params[elsewhere[0]])} on {params[elsewhere[0]].device}"
        )
    for name, value in (("lr", lr), ("beta1", beta1), ("beta2", beta2), ("weight_decay", weight_decay), ("eps", eps)):
        if not is_read_elsewhere(value) and to_float(value) is None:
            raise TypeError(f"{name} must be a number, but is {describe(value)}")
    if differentiable or elsewhere:
        _check_for_torch(params, {**lists, "max_exp_avg_sqs": max_exp_avg_sqs} if amsgrad else lists)
        if capturable and (problem := find_capturable_problem(params)):
            raise RuntimeError(problem)
        torch_adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            state_steps,
            capturable=capturable,
            differentiable=differentiable,
            fused=True if grad_scale is not None or found_inf is not None else None,
            grad_scale=grad_scale,
            found_inf=found_inf,
            has_complex=any(torch.is_complex(param) for param in params),
            amsgrad=amsgrad,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=maximize,
        )
        return
    if not params:
        return
    sharded = [param for param in params if is_sharded(param)]
    if sharded:
        pairs = enumerate(zip(params, grads, strict=True))
        grads = [part(placed_grad(param, grad, f"params[{i}]")) for i, (param, grad) in pairs]
        together = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else [])
        params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = ([part(tensor) for tensor in each] for each in together)
    operator = torch.ops.adamw_ext.adamw_
    (operator.tensor_lr if isinstance(lr, Tensor) else operator.default)(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs if amsgrad else [],
        state_steps,
        grad_scale,
        found_inf,
        lr=lr,
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=float(weight_decay),
        eps=float(eps),
        amsgrad=amsgrad,
        maximize=maximize,
    )
    if sharded:
        torch.autograd.graph.increment_version(sharded)


def _check_for_torch(params: list[Tensor], lists: dict[str, list[Tensor]]) -> None:
    """Raise ValueError where torch's functional AdamW would fail after the first writes."""
    for index, param in enumerate(params):
        if param.dtype not in DTYPES:
            raise ValueError(f"params[{index}] must be of a dtype that torch computes with, but is {describe(param)}")
        _check_is_writable(param, f"params[{index}]")
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must be a list of {len(params)} tensors, as params, but is {describe(tensors)}")
        for index, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if not isinstance(tensor, Tensor) or not may_read(part(tensor)):
                raise ValueError(f"{name}[{index}] must be a tensor with memory, but is {_describe_unread(tensor)}")
            fits = (tensor.shape, tensor.dtype, tensor.device) == (param.shape, param.dtype, param.device)
            if name != "grads":
                _check_is_writable(tensor, f"{name}[{index}]")
            if name == "state_steps":
                fits = tensor.numel() == 1 and is_step(part(tensor), part(param))
            fits = fits and may_go_into(part(tensor), part(param))
            if "exp_avg" in name:
                fits = fits and may_go_into(part(lists["grads"][index]), part(tensor))
            if not fits or tensor.layout != torch.strided:
                raise ValueError(f"{name}[{index}] does not fit {describe(param)}: it is {describe(tensor)}")


def _check_is_writable(tensor: Tensor, name: str) -> None:
    if not may_write(part(tensor)):
        raise ValueError(f"{name} cannot be updated: {WHY_NOT_WRITTEN}")
    if torch.is_grad_enabled() and tensor.requires_grad and tensor.is_leaf:
        raise RuntimeError(f"{name} is a leaf that requires grad: update it within torch.no_grad()")


def _describe_unread(value: object) -> str:
    """Without reading it."""
    return f"one of shape {tuple(value.shape)} without" if isinstance(value, Tensor) else describe(value)


def _is_for_kernel(param: Tensor, index: int) -> bool:
    if not isinstance(param, Tensor):
        raise TypeError(f"params[{index}] must be a tensor, but is {describe(param)}")
    if param.layout != torch.strided:
        raise RuntimeError(f"params[{index}] must be strided, but has layout {param.layout}")
    return runs_in_kernel(param)
