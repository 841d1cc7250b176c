"""Many steps: the scalars of every one of them against 60 digits, and counts beyond what a float32 can hold."""

import decimal
from collections.abc import Iterable
from decimal import Decimal

import torch
from torch import Tensor

import adamw_ext
from benchmarks.limits_sizes import check
from tests.helpers import assert_same_bits

FAST_BETAS = (0.0, 0.5, 0.9, 0.95)  # their factors are soon 1
SLOW_BETAS = (0.999, 0.9999, 1 - 2.0**-20)
LAST_COUNT = 2**24  # the largest number of updates that a float32 step counts to
BATCH = 250  # tensors with counts of their own


def scalars_of_steps(steps: Iterable[int], betas: Iterable[float]) -> str:
    """The factors 1/(1 - beta**t) and sqrt(1 - beta**t) of each step, read out of real steps, against 60 digits.

    By repeated squaring the relative error of beta**t is below t*u (u = 2**-53, half a unit in the last place), so that
    of 1 - beta**t below u*(1 + t*beta**t/(1 - beta**t)); a quotient, a root and what reads them add 4*u at most. In
    float32, 1/(1 - beta**t) is that number rounded; the other factor is one over a rounded number, rounded: where it is
    just below 1, as much as a unit and a half in the last place.
    """
    steps, betas = list(steps), list(betas)
    worst = {torch.float64: 0.0, torch.float32: 0.0}
    for beta in betas:
        readers = [Reader(beta, dtype, capturable) for dtype in worst for capturable in (False, True)]
        for first in range(0, len(steps), 40 * BATCH):
            some = steps[first : first + 40 * BATCH]
            exact = ExactFactors(beta, some)
            for reader in readers:
                worst[reader.dtype] = max(worst[reader.dtype], exact.compare(reader.read(some), reader.dtype))
    return (
        f"{len(steps):,} steps for each of {len(betas)} betas from {min(betas)} to {max(betas)}: off by at most "
        f"{worst[torch.float64]:.2f} of the bound in float64 and by {worst[torch.float32]:.3f} units in the last place "
        "in float32, counted on the host and by the kernels"
    )


class ExactFactors:
    """Both factors of some steps, each as the sum of two float64 numbers, and what makes them hard to reckon."""

    def __init__(self, beta: float, steps: list[int]) -> None:
        rows = []
        with decimal.localcontext(decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)):
            base, at = Decimal(beta), steps[0]
            power = base**at if beta else Decimal(0)
            for step in steps:
                if step > at and beta:
                    power *= base ** (step - at)
                at = step
                rest = 1 - power
                row = [float(step * power / rest)]
                for factor in (1 / rest, rest.sqrt()):
                    high = float(factor)
                    row += [high, float(factor - Decimal(high))]
                rows.append(row)
        self.beta = beta
        self.conditioning, *self.factors = torch.tensor(rows, dtype=torch.float64).unbind(1)

    def compare(self, found: tuple[Tensor, Tensor], dtype: torch.dtype) -> float:
        """The largest error: for float64 as a part of the bound, for float32 in units in the last place beyond it."""
        largest = 0.0
        for value, high, low in zip(found, self.factors[::2], self.factors[1::2], strict=True):
            error = ((value - high) - low).abs()  # the first difference is exact, or far too large
            part = error / (high * 2.0**-53 * (5 + self.conditioning))
            allowed = 1.0
            if dtype == torch.float32:
                part = (error - error / part.clamp(min=1e-300)).clamp(min=0.0) / last_place(high)
                allowed = 1.5
            worst = int(part.argmax())
            check(part[worst] <= allowed, f"a factor for beta {self.beta}: {value[worst]!r} for {high[worst]!r}")
            largest = max(largest, float(part[worst]))
        return largest


def last_place(numbers: Tensor) -> Tensor:
    """The unit in the last place of float32 numbers of this size."""
    return torch.ldexp(torch.ones_like(numbers), torch.frexp(numbers).exponent - 24)


class Reader:
    """Reads both factors out of the updates of one-element params, each with a step count of its own.

    A gradient whose square underflows, and that the first moment equals already, makes the descent of a param of 0 a
    power of two times 1/(1 - beta**t), or divided by the root of the largest moment, 1, over sqrt(1 - beta**t).
    """

    def __init__(self, beta: float, dtype: torch.dtype, capturable: bool) -> None:
        self.dtype = dtype
        self.tiny = 2.0 ** (-600 if dtype == torch.float64 else -100)
        self.starts = {"param": 0.0, "grad": self.tiny, "exp_avg": self.tiny, "exp_avg_sq": 0.0, "max_exp_avg_sq": 1.0}
        self.roles = {role: torch.empty(BATCH, dtype=dtype) for role in self.starts}
        self.counts = torch.empty(BATCH)
        self.optimizers = []
        for betas, eps, amsgrad in (((beta, 0.0), 1.0, False), ((0.0, beta), 0.0, True)):
            params, grads, *moments = (list(role.unbind()) for role in self.roles.values())
            optimizer = adamw_ext.AdamW(
                [param.requires_grad_() for param in params],
                lr=1.0,
                betas=betas,
                eps=eps,
                weight_decay=0.0,
                amsgrad=amsgrad,
                capturable=capturable,
            )
            for param, grad, *state in zip(params, grads, self.counts.unbind(), *moments, strict=True):
                param.grad = grad
                names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
                optimizer.state[param] = dict(zip(names, state if amsgrad else state[:3], strict=amsgrad))
            self.optimizers.append(optimizer)

    def read(self, steps: list[int]) -> tuple[Tensor, Tensor]:
        batches = (steps[first : first + BATCH] for first in range(0, len(steps), BATCH))
        found = zip(*map(self.read_batch, batches), strict=True)
        first, second = (torch.cat(factors) for factors in found)
        return first, second

    @torch.no_grad()
    def read_batch(self, steps: list[int]) -> list[Tensor]:
        """What is over makes the last of them, too."""
        found = []
        for optimizer in self.optimizers:
            for role, start in self.starts.items():
                self.roles[role].fill_(start)
            counts = torch.tensor(steps + steps[-1:] * (BATCH - len(steps)), dtype=torch.float32)
            self.counts.copy_(counts - 1)
            optimizer.step()
            check(torch.equal(self.counts, counts), "a step was not counted")
            found.append(-self.roles["param"][: len(steps)].double() / self.tiny)
        return found


def sampled(last: int) -> list[int]:
    """Every step up to 20,000, by when the factors of a beta up to 0.998 are 1, and then one in 97."""
    return sorted({*range(1, min(last, 20_000) + 1), *range(20_000, last + 1, 97), last})


def steps_past_the_last_count(last_beta: float = 1 - 2.0**-20) -> str:
    """A float32 count stays at 2**24, and a larger one where it is. What is then wrong is a bias correction of
    1 - beta**(2**24) for one that is nearer to 1: by less than beta**(2**24)."""
    for first in (LAST_COUNT - 2, LAST_COUNT, LAST_COUNT + 2, 2**31, 2**40):
        for beta in (0.9, 0.999, 0.9999, last_beta):
            for flags in ({}, {"capturable": True}, {"fused": True}):
                check_steps_from(first, beta, flags)
    off = f"{last_beta**LAST_COUNT:.1e} here"
    return f"counts are float32 sums, as torch's, and stay; updates are off by at most beta**(2**24): {off}"


def check_steps_from(first: int, beta: float, flags: dict[str, bool]) -> None:
    expected, count = [], torch.tensor(float(first))
    for _ in range(4):
        count = count + 1.0
        expected.append(count.item())
    for kind, kind_flags in ((adamw_ext.AdamW, flags), (torch.optim.AdamW, {"foreach": False})):
        param = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = kind([param], betas=(beta, beta), **kind_flags)
        param.grad = torch.ones(1, dtype=torch.float64)
        moments = {key: torch.ones(1, dtype=torch.float64) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(float(first)), **moments}
        counts, descents = [], []
        for _ in range(4):
            before = param.item()
            optimizer.step()
            counts.append(optimizer.state[param]["step"].item())
            descents.append(before * (1 - 1e-3 * 1e-2) - param.item())
        check(counts == expected, f"counts from {first} are {counts}")
        # Both moments are 1, and what they are divided by is 1 but for beta**t and eps.
        bound = 1e-3 * (beta ** min(first, LAST_COUNT) + 2e-8) + 1e-12
        check(all(abs(descent - 1e-3) <= bound for descent in descents), f"updates from {first} are {descents}")


def rounding_past_the_last_count() -> str:
    """Random bits belong to a step's number: where that stays, so do they."""
    rounded = []
    for first in (LAST_COUNT - 3, LAST_COUNT):
        param = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
        optimizer = adamw_ext.AdamW([param], stochastic_rounding=True, moment_dtype=torch.bfloat16)
        optimizer.init_state()
        optimizer.state[param]["step"].fill_(first)
        for _ in range(2):
            with torch.no_grad():
                param.fill_(1.0)
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[param][key].fill_(1.0)
            param.grad = torch.full_like(param, 0.5)
            optimizer.step()
            rounded.append([param.detach().clone(), optimizer.state[param]["exp_avg_sq"].clone()])
    before, last, *after = rounded
    check(any(not torch.equal(a, b) for a, b in zip(before, last, strict=True)), "two steps have the same bits")
    assert_same_bits(after[0], after[1], "steps past the last count")
    return "stochastic rounding has the same random bits at every one of them"
