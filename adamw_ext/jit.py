"""The functional TorchScript optimizer, for the parts of torch that want one.

>>> import adamw_ext.jit  # from here on torch finds it where it is asked for adamw_ext.AdamW

These are ``torch.distributed.optim.DistributedOptimizer``, ``ZeroRedundancyOptimizer(overlap_with_ddp=True)``,
``torch.distributed.optim.as_functional_optim`` and DDP's fused optimizers. The import writes one entry into torch's map
of functional optimizers, unless it has one for :class:`adamw_ext.AdamW`; ``import adamw_ext`` alone writes none.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from adamw_ext.optimizer import AdamW

__all__ = ["FunctionalAdamW"]

_Class = TypeVar("_Class", bound=type)


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """TorchScript's own deprecation is no news to those who import this module, nor an error of theirs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning)
        yield


def _script(cls: _Class) -> _Class:
    """torch.jit.script: compiles the class for scripts; called from Python, it stays the Python class that it is."""
    with _without_deprecations():
        return torch.jit.script(cls)


@_script
class FunctionalAdamW:
    """AdamW for one group of params, which is handed its gradients instead of reading ``param.grad``.

    The interface of torch's functional optimizers (torch/distributed/optim/functional_adamw.py), and the bits of
    :class:`adamw_ext.AdamW`. In Python it is a class as any other; scripts can hold, make and call it. As with every
    scripted class, a script that is handed an instance by Python works on a copy, with the same params and state
    tensors, but without the state that later steps create on the other side.

    Attributes:
        param_group: ``{"params": params}``, the list that :meth:`step` updates. May be replaced.
        state: for each param that has been updated, ``step`` (0-d, float32, on the CPU) and, of the param's dtype,
            device and layout, ``exp_avg``, ``exp_avg_sq`` and, with ``amsgrad``, ``max_exp_avg_sq``.
        defaults: ``lr``, ``beta1``, ``beta2``, ``eps``, ``weight_decay``. Read at every step.

    Args:
        params: tensors that the operator takes: floating point or complex, on the CPU or on CUDA devices.
        lr, betas, eps, weight_decay, amsgrad, maximize: as for :class:`adamw_ext.AdamW`; floats, and bools.
        foreach, fused: accepted; the multi-tensor kernel is always used.
        _allow_empty_param_list: take an empty ``params``, for those who fill ``param_group`` later or call only
            :meth:`step_param`.

    Raises:
        ValueError: a hyperparameter is out of range, or ``params`` is empty. Raised in a script, errors reach Python as
            ``torch.jit.Error`` with the same text.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool = False,
        fused: bool = False,
        _allow_empty_param_list: bool = False,
    ):
        beta1, beta2 = betas
        for name, value, is_usable in [
            ("learning rate", lr, lr >= 0.0),
            ("epsilon value", eps, eps >= 0.0),
            ("beta parameter at index 0", beta1, 0.0 <= beta1 < 1.0),
            ("beta parameter at index 1", beta2, 0.0 <= beta2 < 1.0),
            ("weight_decay value", weight_decay, weight_decay >= 0.0),
        ]:
            if not is_usable:
                raise ValueError(f"Invalid {name}: {value}")
        for name, flag in [("amsgrad", amsgrad), ("maximize", maximize)]:
            if isinstance(flag, Tensor):  # in Python; torch's own messages would read its memory
                raise ValueError(f"{name} must be True or False, but is a tensor")
        if len(params) == 0 and not _allow_empty_param_list:
            raise ValueError("optimizer got an empty parameter list")
        self.defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        self.amsgrad = amsgrad
        self.maximize = maximize
        self.foreach = foreach
        self.fused = fused
        self.param_group = {"params": params}
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self, gradients: list[Tensor | None]) -> None:
        """Update the params in place, all or none; one whose gradient is None stays as it is.

        Args:
            gradients: for each param in order, None or a tensor of its shape and device; see :class:`adamw_ext.AdamW`
                for the dtypes.

        Raises:
            ValueError: another number of gradients than of params, or a hyperparameter is out of range.
            RuntimeError: params, gradients or state are not what the operator takes. Nothing has changed then.
        """
        all_params = self.param_group["params"]
        if len(all_params) != len(gradients):
            raise ValueError(
                "the gradients passed in does not equal to the size of the parameters!"
                + f"Params length: {len(all_params)}. Gradients length: {len(gradients)}"
            )
        self._update(all_params, gradients)

    def step_param(self, param: Tensor, grad: Tensor | None) -> None:
        """Update one param in place, be it among ``param_group["params"]`` or not; nothing if ``grad`` is None.

        Args and errors as of :meth:`step`.
        """
        self._update([param], [grad])

    def _update(self, all_params: list[Tensor], gradients: list[Tensor | None]) -> None:
        """One step of those params that have a gradient; their missing state is kept only if it succeeds."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        for param, grad in zip(all_params, gradients):  # noqa: B905  (TorchScript knows no strict)
            if grad is not None:
                params.append(param)
                grads.append(grad)
        states = [self._state_of(param) for param in params]
        max_exp_avg_sqs: list[Tensor] = []
        if self.amsgrad:
            max_exp_avg_sqs = [state["max_exp_avg_sq"] for state in states]
        torch.ops.adamw_ext.adamw_(
            [param.detach() for param in params],  # a script that raises may leave torch.no_grad() switched on
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs,
            [state["step"] for state in states],
            lr=self.defaults["lr"],
            beta1=self.defaults["beta1"],
            beta2=self.defaults["beta2"],
            weight_decay=self.defaults["weight_decay"],
            eps=self.defaults["eps"],
            amsgrad=self.amsgrad,
            maximize=self.maximize,
        )
        for param, state in zip(params, states):  # noqa: B905
            self.state[param] = state

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        """The param's state, or that of a first step."""
        if param in self.state:
            return self.state[param]
        if param.is_nested:
            raise RuntimeError("a nested tensor can have no state")
        state = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }
        if self.amsgrad:
            state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def _register() -> None:
    from torch.distributed.optim.utils import register_functional_optim

    register_functional_optim(AdamW, FunctionalAdamW)


if torch.distributed.is_available():
    with _without_deprecations():
        _register()
