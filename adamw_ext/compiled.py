"""``AdamW.step`` in a graph of ``torch.compile``: one operator, ``adamw_ext::compiled_step_``.

A graph tells the operator which optimizer steps and which of its params have gradients, and gives it those params and
gradients. The operator takes the step that an uncompiled call would take, with the same bits and errors: it reads the
hyperparameters and creates missing state when the graph runs, so that no graph is made anew for them. State, masters,
norms and counts belong to the optimizer and are no inputs of the graph.

A backend hands over the memory of the params (inductor), or copies that it writes back later (aot_eager; inductor where
the old value of a param is still needed). A copy is updated in the place of its param, which is left alone.

Imported by the first step that is traced: torch's compiler takes seconds to import.
"""

import itertools
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamw_ext import _C
from adamw_ext.numbered import numbered
from adamw_ext.sharded import is_sharded
from adamw_ext.state import runs_in_kernel

if TYPE_CHECKING:
    from adamw_ext.optimizer import AdamW

_trace_count = itertools.count()


class Given:
    """What a graph gives to one step, by the param's number in the optimizer.

    Attributes:
        grads: one entry for each param of the optimizer, None where there is no gradient.
        stand_ins: copies that are updated in the place of their params.
    """

    def __init__(self, own: list[Tensor], params: list[Tensor], grads: list[Tensor], numbers: list[int]) -> None:
        self.grads: list[Tensor | None] = [None] * len(own)
        for number, grad in zip(numbers, grads, strict=True):
            self.grads[number] = grad
        in_place = _C.same_memory([own[number] for number in numbers], params)
        self.stand_ins: dict[int, Tensor] = {} if in_place else dict(zip(numbers, params, strict=True))


def trace_step(optimizer: "AdamW", grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """What dynamo traces for a step. It never reads ``param_groups``, on whose every value dynamo would guard."""
    if not look_at_params(optimizer._number):
        step_outside_the_graph(optimizer, grad_scale, found_inf)
        return
    params, grads, numbers = [], [], []
    for number, param in enumerate(optimizer._traced_params or ()):
        # Guards on the param's identity: else a graph in which it is also an input under another name (a module's
        # attribute) would take what that name means by then.
        id(param)
        if param.grad is not None:
            params.append(param)
            grads.append(param.grad)
            numbers.append(number)
    # What writes to nothing is deleted from graphs, but a step without gradients still has numbers to check.
    written = params or (optimizer._traced_params or [])[:1]
    if not written:
        return
    # Not torch.no_grad(): where the operator raises, a graph would leave that switched on.
    written = [param.detach() for param in written]
    if grad_scale is None:
        torch.ops.adamw_ext.compiled_step_.default(written, grads, found_inf, numbers, optimizer._trace)
    else:
        torch.ops.adamw_ext.compiled_step_.unscaling(written, grads, grad_scale, found_inf, numbers, optimizer._trace)


@torch.compiler.assume_constant_result  # type: ignore[misc]
def look_at_params(number: str) -> bool:
    """Runs while a step is traced. Whether the hand-written kernel updates all params, so that a graph can."""
    optimizer = numbered[number]
    params = flat_params(optimizer)
    if not are_same(params, optimizer._traced_params):
        optimizer._traced_params = params
        optimizer._trace = f"{number}.{next(_trace_count)}"
    return not any(group.get("differentiable") for group in optimizer.param_groups) and all(
        runs_in_kernel(param) and not is_sharded(param) for param in params
    )


@torch.compiler.disable(  # type: ignore[misc]
    reason="params of differentiable groups, of tensor subclasses and on other devices are left to torch"
)
def step_outside_the_graph(optimizer: "AdamW", grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    optimizer._update(grad_scale, found_inf)


def run_step(
    params: list[Tensor], grads: list[Tensor], found_inf: Tensor | None, numbers: list[int], trace: str
) -> None:
    run_unscaling_step(params, grads, None, found_inf, numbers, trace)


def run_unscaling_step(
    params: list[Tensor],
    grads: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    numbers: list[int],
    trace: str,
) -> None:
    """The operator.

    Args:
        params, grads: of those params that have a gradient; a further param is not updated.
        numbers: their places among all params of the optimizer.
        trace: the optimizer's ``_trace`` when the step was traced: its number, and that of its list of params.

    Raises:
        RuntimeError: the params were exchanged, or left to torch, since the step was traced. Nothing has changed, and
            the next call is traced anew. All else: as ``AdamW.step``.
    """
    optimizer = numbered.get(trace.split(".")[0])
    if optimizer is None:
        raise RuntimeError("the optimizer of this compiled step no longer exists")
    with optimizer._turn:
        own = flat_params(optimizer)
        if trace != optimizer._trace or not are_same(own, optimizer._traced_params):
            optimizer._traced_params = None  # fails the guards of all graphs
            raise RuntimeError("the params of the optimizer were exchanged since this step was compiled: call it again")
        try:
            optimizer._update(grad_scale, found_inf, Given(own, params[: len(numbers)], grads, numbers))
        finally:
            if optimizer._elsewhere:
                optimizer._traced_params = None


def flat_params(optimizer: "AdamW") -> list[Tensor]:
    """All params, in the order of the groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def are_same(params: list[Tensor], others: list[Tensor] | None) -> bool:
    return others is not None and len(params) == len(others) and all(map(operator.is_, params, others))


# In a list that is not marked as written, gradients need not be copied by a backend that works on copies. The schemas
# name no set of aliases of their own, as those of the functional form; captured by inductor's CUDA graphs, floats and
# state would be frozen, so it leaves these calls out of them.
_WHICH = "Tensor? found_inf, int[] numbers, str trace) -> ()"
_library = torch.library.Library("adamw_ext", "FRAGMENT")
for name, arguments, run in (
    ("compiled_step_", f"Tensor(*!)[] params, Tensor[] grads, {_WHICH}", run_step),
    (
        "compiled_step_.unscaling",
        f"Tensor(*!)[] params, Tensor(*!)[] grads, Tensor grad_scale, {_WHICH}",
        run_unscaling_step,
    ),
):
    _library.define(f"{name}({arguments}", tags=(torch.Tag.cudagraph_unsafe,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, lambda *arguments: None, "Meta")
