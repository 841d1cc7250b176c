"""The textbook: AdamW as the paper writes it, in float64, one tensor at a time.

Loshchilov and Hutter 2017 (arXiv 1711.05101), algorithm 2, with their schedule multiplier and learning rate written as
the one factor lr. amsgrad is Reddi, Kale and Kumar 2018 (arXiv 1904.09237), with the maximum taken before the bias
correction, as torch does. Nothing here is shared with the package: what the tests compare against must not be wrong in
the same way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def as_float64(tensor: Tensor) -> Tensor:
    """A float64 copy. A complex tensor becomes its real view: one more dimension of 2, real and imaginary part."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float64, copy=True)


class Textbook:
    """AdamW over a list of tensors that share their hyperparameters (one param group).

    ``params``, ``exp_avgs``, ``exp_avg_sqs`` and ``max_exp_avg_sqs`` (zeros unless amsgrad) hold float64 tensors in the
    shapes of :func:`as_float64`; ``steps`` the number of updates made to each param. The hyperparameters are plain
    attributes and may be changed between steps.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        self.params = [as_float64(param) for param in params]
        self.exp_avgs = [torch.zeros_like(param) for param in self.params]
        self.exp_avg_sqs = [torch.zeros_like(param) for param in self.params]
        self.max_exp_avg_sqs = [torch.zeros_like(param) for param in self.params]
        self.steps = [0 for _ in self.params]
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.amsgrad = amsgrad
        self.maximize = maximize

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Update every param that has a gradient. The others keep their state and their step count."""
        for i, grad in enumerate(grads):
            if grad is not None:
                self._update(i, as_float64(grad))

    def _update(self, i: int, g: Tensor) -> None:
        beta1, beta2 = self.betas
        self.steps[i] += 1
        t = self.steps[i]
        if self.maximize:
            g = -g

        theta = self.params[i]
        m = self.exp_avgs[i] = beta1 * self.exp_avgs[i] + (1 - beta1) * g
        v = self.exp_avg_sqs[i] = beta2 * self.exp_avg_sqs[i] + (1 - beta2) * g**2
        if self.amsgrad:
            v = self.max_exp_avg_sqs[i] = torch.maximum(self.max_exp_avg_sqs[i], v)

        bias_correction1 = 1 - beta1**t
        bias_correction2 = 1 - beta2**t
        m_hat = m / bias_correction1
        v_hat = v / bias_correction2
        self.params[i] = (1 - self.lr * self.weight_decay) * theta - self.lr * m_hat / (v_hat.sqrt() + self.eps)
