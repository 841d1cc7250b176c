"""Compares every step of a job with the float64 textbook."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adamw_ext import _C, AdamW
from tests.bounds import Numbers, check_step, clip_coefficient, flat
from tests.helpers import assert_same_bits
from tests.jobs import MOMENTS, Job
from tests.reference import as_float64
from tests.scenarios import Step
from tests.ways import State


class Textbooks:
    """Watches an optimizer's steps. Params of one group, dtype and step count are compared together.

    ``checked``: how many numbers of params and moments were compared, ``total``: how many there were.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.lr_factor = 1.0
        self.checked = self.total = 0

    @contextmanager
    def watch(self, optimizer: AdamW, step: Step) -> Iterator[None]:
        """Around the step."""
        if step.lr_factor is not None:
            self.lr_factor = step.lr_factor
        batches = self._batches(step)
        before = [self._numbers(optimizer, members) for members in batches.values()]
        grads = [self._copies(members) for members in batches.values()]
        every_grad = [grad for grad in self.job.grads if grad is not None]
        unscale = 1.0 if step.grad_scale is None else 1.0 / torch.tensor(step.grad_scale).item()
        limits = {group.max_grad_norm for group in self.job.scenario.groups}
        coefficients = {limit: clip_coefficient(every_grad, unscale, limit) for limit in limits}
        yield
        for (number, dtype, made), members, old, grad in zip(batches, batches.values(), before, grads, strict=True):
            group = self.job.scenario.groups[number]
            master = self.job.master(members[0])
            checked, total = check_step(
                old,
                self._numbers(optimizer, members),
                grad,
                unscale * coefficients[group.max_grad_norm],
                group,
                group.lr * self.lr_factor,
                made + 1,
                torch.float32 if master else dtype.to_real(),
                self.job.moment_dtype(members[0]).to_real(),
            )
            self.checked += checked
            self.total += total
            for i in members:
                state = optimizer.state[self.job.params[i]]
                assert state["step"].item() == made + 1, f"step {made + 1} of param {i} is counted as {state['step']}"
                if master:
                    assert_shown(self.job.params[i].detach(), master_of(self.job.params[i], state))
            if step.grad_scale is not None:
                assert_unscaled([self.job.grads[i] for i in members], grad, unscale)

    def _batches(self, step: Step) -> dict[tuple[int, torch.dtype, int], list[int]]:
        """The params that the step updates, by group, dtype and number of steps made."""
        batches: dict[tuple[int, torch.dtype, int], list[int]] = defaultdict(list)
        for number, members in enumerate(self.job.scenario.members):
            for i in members:
                if self.job.grads[i] is not None and not step.is_skipped:
                    batches[number, self.job.specs[i].dtype, self.job.steps_made[i]].append(i)
        return batches

    def _copies(self, members: list[int]) -> Tensor:
        return flat([grad for i in members if (grad := self.job.grads[i]) is not None])

    def _numbers(self, optimizer: AdamW, members: list[int]) -> Numbers:
        params = [self.job.params[i] for i in members]
        states: list[State] = [optimizer.state.get(param, {}) for param in params]
        zeros = [torch.zeros_like(param) for param in params]
        moments = [flat([state.get(key, zero) for state, zero in zip(states, zeros, strict=True)]) for key in MOMENTS]
        return Numbers(flat([master_of(p, state) for p, state in zip(params, states, strict=True)]), *moments)


def master_of(param: Tensor, state: State) -> Tensor:
    """What the update runs on."""
    if "param_remainder" in state:
        return _C.join_master(param.detach(), state["param_remainder"])
    return state.get("master_param", param).detach()


def assert_shown(param: Tensor, master: Tensor) -> None:
    """The param is the nearest value; of bfloat16 and ties, the one away from zero."""
    shown = _C.split_master(master)[0] if param.dtype == torch.bfloat16 else master.to(param.dtype)
    assert_same_bits([param], [shown], "the param beside its master")


def assert_unscaled(grads: Sequence[Tensor | None], given: Tensor, unscale: float) -> None:
    """In place, rounded to their dtype; in between perhaps to float32."""
    values = (given * unscale).split([as_float64(grad).numel() for grad in grads if grad is not None])
    for grad, expected in zip(grads, values, strict=True):
        assert grad is not None
        info = torch.finfo(grad.dtype.to_real())
        tolerance = 2 * info.eps * expected.abs() + info.smallest_normal * info.eps
        ordinary = expected.abs() <= info.max / 2
        assert bool(((as_float64(grad).flatten() - expected).abs() <= tolerance)[ordinary].all()), (
            "gradients are not unscaled"
        )
