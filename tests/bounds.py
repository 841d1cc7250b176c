"""How far one step may be from the float64 textbook: the roundings of its arithmetic, counted, and one of each store.

Every operation of the update is rounded once, by at most ``u``, half of eps of the type that it runs in, relative to
its result, and where that is subnormal by at most ``tiny``. An error of the second moment moves the descent by as much
as the division makes of it, so the descent is bounded by an interval: the largest and the smallest quotient.

Where a number comes near the largest one of the type, or the denominator can be zero, nothing is claimed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers import compute_dtype
from tests.reference import Textbook, as_float64
from tests.scenarios import Group


@dataclass
class Numbers:
    """Of some params with the same hyperparameters and step count, in float64: one after the other."""

    param: Tensor  # its master, where it has one
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([as_float64(tensor).flatten() for tensor in tensors])


def smallest(dtype: torch.dtype) -> float:
    """The smallest positive number."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def store_error(size: Tensor, dtype: torch.dtype, computed: torch.dtype, at_random: bool) -> Tensor:
    """The most that storing changes numbers up to this size: half a unit in the last place, at random a whole one."""
    if dtype == computed:
        return torch.zeros_like(size)
    units = 1.0 if at_random and dtype == torch.bfloat16 else 0.5
    return units * (size.abs() * torch.finfo(dtype).eps + smallest(dtype))


def claimed(numbers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Where all of them are finite and far from overflow."""
    limit = torch.finfo(dtype).max / 16
    return torch.stack([number.abs() <= limit for number in numbers]).all(dim=0)


def grad_error_of(clips: bool) -> float:
    """Of the factor that gradients are multiplied by: the norm's sum is in double, by pieces and pairs."""
    return 64 * torch.finfo(torch.float64).eps if clips else 0.0


def check_step(
    before: Numbers,
    after: Numbers,
    grad: Tensor,  # as given
    factor: float,  # 1/grad_scale and the clip coefficient
    group: Group,
    lr: float,
    step: int,  # the number of this update
    param_dtype: torch.dtype,  # real; of the master, where there is one
    moment_dtype: torch.dtype,
) -> tuple[int, int]:
    """Asserts the bounds. Returns how many numbers were checked, and how many there are."""
    computed = compute_dtype(param_dtype)
    at_random = bool(group.storage.get("stochastic_rounding"))
    # The textbook's own roundings, and those that gradients have on the way to it, count as much in float64.
    u = torch.finfo(computed).eps * (1.0 if computed == torch.float64 else 0.5)
    tiny = smallest(computed)
    beta1, beta2 = group.betas

    g = grad * factor
    hyper = {"lr": lr, "betas": group.betas, "eps": group.eps, "weight_decay": group.weight_decay}
    textbook = Textbook([before.param], **hyper, amsgrad=group.amsgrad, maximize=group.maximize)
    textbook.exp_avgs, textbook.exp_avg_sqs = [before.exp_avg], [before.exp_avg_sq]
    textbook.max_exp_avg_sqs, textbook.steps = [before.max_exp_avg_sq], [step - 1]
    textbook.step([g])
    m, v, p = textbook.exp_avgs[0], textbook.exp_avg_sqs[0], textbook.params[0]
    largest = textbook.max_exp_avg_sqs[0] if group.amsgrad else v

    # The factor's rounding, and the product's.
    g_error = (2 * u + grad_error_of(group.max_grad_norm is not None)) * g.abs() + tiny
    m_error = (1 - beta1) * (g_error + 4 * u * (g.abs() + before.exp_avg.abs())) + 2 * u * m.abs() + 2 * tiny
    v_error = 3 * u * beta2 * before.exp_avg_sq + (1 - beta2) * (4 * u * g**2 + 2 * g.abs() * g_error + g_error**2)
    v_error += u * v + 4 * tiny

    # beta**step by repeated squaring is off by up to `step` roundings of float64, relative; its distance from 1 by
    # 1 / (1 - beta) of them at most, whatever the step.
    slow1, slow2 = (torch.finfo(torch.float64).eps / (1 - beta) for beta in group.betas)
    correction1, correction2 = (1 - beta**step for beta in group.betas)
    denominators = [
        (((largest + side * v_error).clamp(min=0.0) / correction2).sqrt() + group.eps) * (1 + side * (5 * u + slow2))
        for side in (-1.0, 1.0)
    ]
    quotients = torch.stack([(m + side * m_error) / d for side in (-1.0, 1.0) for d in denominators])
    descents = lr / correction1 * torch.stack([quotients.amin(dim=0), quotients.amax(dim=0)])
    descent_size = descents.abs().amax(dim=0)
    decay = (lr * group.weight_decay * before.param).abs()
    rest = (4 * u + slow1) * descent_size + 3 * u * decay + 2 * u * p.abs() + (3 + lr / correction1) * tiny

    compute_fits = claimed([before.param, before.exp_avg, before.exp_avg_sq, grad, g, m, v, largest, g**2], computed)
    ordinary = compute_fits & claimed([m, v, largest], moment_dtype)
    checks = [
        ("exp_avg", after.exp_avg, m, m, m_error, ordinary),
        ("exp_avg_sq", after.exp_avg_sq, v, v, v_error, ordinary),
    ]
    if group.amsgrad:
        checks.append(("max_exp_avg_sq", after.max_exp_avg_sq, largest, largest, v_error, ordinary))
    count = 0
    for what, actual, low, high, error, where in checks:
        error = error + store_error(high.abs() + error, moment_dtype, computed, at_random)
        count += assert_between(what, actual, low - error, high + error, where)
    decayed = (1 - lr * group.weight_decay) * before.param
    low, high = decayed - descents[1], decayed - descents[0]
    rest = rest + store_error(p.abs() + (high - low) + rest, param_dtype, computed, at_random)
    fits = compute_fits & claimed([p, low, high, *quotients], computed) & claimed([p, low, high], param_dtype)
    count += assert_between("param", after.param, low - rest, high + rest, fits)
    return count, (len(checks) + 1) * len(p)


def assert_between(what: str, actual: Tensor, low: Tensor, high: Tensor, where: Tensor) -> int:
    """Everywhere, and no NaN. Returns how many numbers that were."""
    outside = (where & ~((low <= actual) & (actual <= high))).nonzero().flatten()
    if len(outside):
        i = int(outside[0])
        raise AssertionError(
            f"{len(outside)} of {int(where.sum())} numbers of {what} are not where the textbook has them, the first "
            f"number {i}: {float(actual[i])!r} is not between {float(low[i])!r} and {float(high[i])!r}"
        )
    return int(where.sum())


def clip_coefficient(grads: Sequence[Tensor], unscale: float, limit: float | None) -> float:
    """Of all gradients of a step, in float64; NaN or 0 where the norm is not finite."""
    if limit is None:
        return 1.0
    numbers = flat(grads) * unscale if grads else torch.zeros(0)
    norm = math.sqrt(math.fsum(numbers.square().tolist())) if bool(numbers.square().isfinite().all()) else math.nan
    return min(1.0, limit / (norm + 1e-6)) if norm == norm else math.nan
