"""Many elements, tensors, groups and step counts: each run checks every number that it makes."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import adamw_ext
from adamw_ext import functional
from tests.helpers import assert_same_bits

PERIOD = 1_000_003  # a prime: shares no factor with chunks, units or vectors
HYPER = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def check(holds: bool | Tensor, what: str) -> None:
    """Unlike assert, also in optimized Python."""
    if not holds:
        raise RuntimeError(f"wrong: {what}")


# --- Elements --------------------------------------------------------------------------------------------------------


def available_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def one_huge_tensor(elements: int) -> str:
    """Param, gradient and moments repeat the numbers of a small tensor, and so must what two steps make of them.

    What is made is compared piece by piece: nothing but these four takes memory.
    """
    needed = elements * 8 + (1 << 30)
    if needed > available_bytes():
        sys.exit(f"{elements:,} elements take {needed >> 20:,} MiB, but {available_bytes() >> 20:,} MiB are available.")
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(PERIOD, generator=generator).to(torch.bfloat16) for _ in range(2))
    small, large = (torch.empty(count, dtype=torch.bfloat16) for count in (PERIOD, elements))
    optimizers = []
    for param in (small, large):
        repeat(param, start)
        param.requires_grad_().grad = torch.empty_like(param)
        repeat(param.grad, grad)
        optimizers.append(adamw_ext.AdamW([param], max_grad_norm=math.inf, **HYPER))
        for _ in range(2):
            optimizers[-1].step()
    states = [optimizer.state[param] for optimizer, param in zip(optimizers, (small, large), strict=True)]
    pairs = [(small, large), (small.grad, large.grad), *((states[0][key], states[1][key]) for key in states[0])]
    for expected, actual in pairs:
        for piece in pieces(actual.detach().view(-1)):
            check(torch.equal(piece, expected.detach().view(-1)[: len(piece)]), "an element of the large tensor")
    check((small.detach() != start).float().mean() > 0.9, "the small tensor did not move")
    check(large.detach()[-1] != start[(elements - 1) % PERIOD], "the last element did not move")
    squares = grad.double().square()
    exact = math.sqrt(float(squares.sum()) * (elements // PERIOD) + float(squares[: elements % PERIOD].sum()))
    error = abs(optimizers[1].grad_norm.item() / exact - 1)
    check(error < 1e-12, f"the norm is off by {error}")
    return f"two steps have the bits of a small tensor in every element; the norm is off by {error:.0e}, relative"


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    return (tensor[begin : begin + PERIOD] for begin in range(0, tensor.numel(), PERIOD))


@torch.no_grad()
def repeat(tensor: Tensor, numbers: Tensor) -> None:
    for piece in pieces(tensor):
        piece.copy_(numbers[: len(piece)])


# --- Tensors, step counts, groups ------------------------------------------------------------------------------------


def milliseconds(step: Callable[[], object], steps: int) -> float:
    """The median time of a step, of so many steps, but for the first, which makes state."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times[1:])[(steps - 1) // 2]


def make_params(count: int) -> tuple[list[Tensor], Tensor]:
    """Tensors of 1 to 7 elements with gradients, and all of their elements as one tensor."""
    sizes = [1 + i % 7 for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(sum(sizes), generator=generator) for _ in range(2))
    params = [part.clone().requires_grad_() for part in start.split(sizes)]
    for param, part in zip(params, grad.split(sizes), strict=True):
        param.grad = part.clone()
    whole = start.clone().requires_grad_()
    whole.grad = grad
    return params, whole


def results(optimizer: adamw_ext.AdamW, params: list[Tensor]) -> list[Tensor]:
    """Params and moments, each role as one tensor."""
    states = [optimizer.state[param] for param in params]
    roles = [
        [param.detach() for param in params],
        *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
    ]
    return [torch.cat(role) for role in roles]


def counts_of(optimizer: adamw_ext.AdamW, params: list[Tensor]) -> Tensor:
    return torch.stack([optimizer.state[param]["step"] for param in params])


class Alone:
    """A tensor that the functional form updates by itself."""

    def __init__(self, param: Tensor, done: float = 0.0) -> None:
        self.param = param.detach().clone()
        self.grad = param.grad
        self.moments = [torch.zeros_like(self.param) for _ in range(2)]
        self.step = torch.tensor(done)

    def update(
        self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, steps: int
    ) -> list[Tensor]:
        lists = [[tensor] for tensor in (self.param, self.grad, *self.moments)]
        hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
        for _ in range(steps):
            functional.adamw(*lists, [], [self.step], amsgrad=False, maximize=False, **hyper)
        return [self.param, *self.moments]


def many_tensors(count: int, steps: int = 6) -> str:
    each = {}
    for number in (max(count // 100, 1), count):
        params, whole = make_params(number)
        many, one = (adamw_ext.AdamW(tensors, **HYPER) for tensors in (params, [whole]))
        each[number] = 1e3 * milliseconds(many.step, steps) / number
        for _ in range(steps):
            one.step()
        assert_same_bits(results(many, params), results(one, [whole]), f"{number} tensors")
        check((counts_of(many, params) == steps).all(), "a step count")
    few = min(each)
    return f"the bits of one tensor; {each[count]:.2f} us for each tensor of a step ({each[few]:.2f} with {few:,})"


def different_counts(counts: Iterable[int]) -> str:
    """Tensors of one group, each with a step count of its own, and so scalars of its own."""
    said = []
    for count in counts:
        times = {}
        for capturable in (False, True):
            params, whole = make_params(count)
            alone = [Alone(param, float(done)) for done, param in enumerate(params)]
            optimizer = adamw_ext.AdamW(params, capturable=capturable, **HYPER)
            optimizer.init_state()
            for done, param in enumerate(params):
                optimizer.state[param]["step"].fill_(done)
            times[capturable] = milliseconds(optimizer.step, 4)
            made = results(optimizer, params)
            expected = zip(*(each.update(**HYPER, steps=4) for each in alone), strict=True)
            assert_same_bits(made, [torch.cat(tensors) for tensors in expected], f"{count} step counts")
            check((counts_of(optimizer, params) == torch.arange(count) + 4.0).all(), "a step count")
            check_textbook(made[0], whole, [param.numel() for param in params])
        said.append(f"{count:,} in {times[False]:.1f} ms ({times[True]:.1f} capturable)")
    return f"the bits of a tensor alone, the textbook's numbers; a step of {', '.join(said)}"


def check_textbook(param: Tensor, whole: Tensor, sizes: list[int]) -> None:
    """Four steps in float64, the first of tensor i with i updates behind it."""
    done = torch.arange(len(sizes), dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    p, g = whole.detach().double(), whole.grad.double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
    for step in range(1, 5):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
        correction1, correction2 = (1 - beta ** (done + step) for beta in (beta1, beta2))
        p = p * (1 - lr * HYPER["weight_decay"]) - lr * m / correction1 / ((v / correction2).sqrt() + HYPER["eps"])
    # 4 steps of some roundings each, of numbers up to 8.
    check((param.double() - p).abs().max() < 4 * 2 * 2.0**-21, "a param is not the textbook's")


def many_groups(count: int, steps: int = 6) -> str:
    """Groups that differ in lr and weight decay; each has the bits of a tensor alone."""
    params, _ = make_params(count)
    alone = [Alone(param) for param in params]
    options = [{**HYPER, "lr": 1e-3 * (1 + i % 101), "weight_decay": 1e-2 * (i % 103)} for i in range(count)]
    groups = [{"params": [param], **each} for param, each in zip(params, options, strict=True)]
    optimizer = adamw_ext.AdamW(groups)
    spent = milliseconds(optimizer.step, steps)
    expected = zip(
        *(each.update(**hyper, steps=steps) for each, hyper in zip(alone, options, strict=True)), strict=True
    )
    assert_same_bits(results(optimizer, params), [torch.cat(tensors) for tensors in expected], "groups")
    check((counts_of(optimizer, params) == steps).all(), "a step count")
    return f"each with its own lr and weight decay, the bits of a tensor alone; {spent:.1f} ms a step"
