"""One update, and many in a row, give what the paper says, in every dtype and at the edges of the hyperparameters."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import adamw_ext
from adamw_ext import functional
from tests.helpers import (
    COMBINATIONS,
    COMPLEX_COMBINATIONS,
    assert_same_bits,
    compute_dtype,
    name_of,
    spread,
)
from tests.reference import Textbook, as_float64


@dataclass(frozen=True)
class Hyper:
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-1
    amsgrad: bool = False
    maximize: bool = False


ORDINARY = Hyper()
EDGES = {
    "ordinary": ORDINARY,
    "lr=0": Hyper(lr=0.0),
    "lr=10": Hyper(lr=10.0),
    "beta1=0": Hyper(betas=(0.0, 0.999)),
    "beta2=0": Hyper(betas=(0.9, 0.0)),
    "betas=0": Hyper(betas=(0.0, 0.0)),
    "betas near 1": Hyper(betas=(0.9999, 0.999999)),
    "eps=0": Hyper(eps=0.0),
    "eps=1": Hyper(eps=1.0),
    "weight_decay=0": Hyper(weight_decay=0.0),
    "all decays": Hyper(lr=0.5, weight_decay=2.0),
    "more than all decays": Hyper(lr=1.0, weight_decay=3.0),
}
VARIANTS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "amsgrad and maximize": {"amsgrad": True, "maximize": True},
}


@dataclass
class State:
    """One param, its gradient and its state, with ``step`` updates behind it."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    step: Tensor


def random_state(param_dtype: torch.dtype, moment_dtype: torch.dtype, step: int, count: int = 1001) -> State:
    generator = torch.Generator().manual_seed(step)

    def numbers(dtype: torch.dtype, octaves: float = 6.0) -> Tensor:
        if not dtype.is_complex:
            return spread(count, dtype, generator, octaves=octaves)
        return torch.view_as_complex(spread(2 * count, dtype.to_real(), generator, octaves=octaves).view(count, 2))

    def squares() -> Tensor:
        tensor = numbers(moment_dtype)
        reals = torch.view_as_real(tensor) if moment_dtype.is_complex else tensor
        reals.copy_(reals * reals)
        return tensor

    return State(
        numbers(param_dtype),
        numbers(param_dtype),
        numbers(moment_dtype),
        squares(),
        squares(),
        torch.tensor(float(step)),
    )


def step_kernel(state: State, hyper: Hyper) -> None:
    beta1, beta2 = hyper.betas
    functional.adamw(
        [state.param],
        [state.grad],
        [state.exp_avg],
        [state.exp_avg_sq],
        [state.max_exp_avg_sq] if hyper.amsgrad else [],
        [state.step],
        lr=hyper.lr,
        beta1=beta1,
        beta2=beta2,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        amsgrad=hyper.amsgrad,
        maximize=hyper.maximize,
    )


def textbook_at(state: State, hyper: Hyper) -> Textbook:
    """The textbook in the place where the kernel stands."""
    textbook = Textbook([state.param], **vars(hyper))
    textbook.exp_avgs = [as_float64(state.exp_avg)]
    textbook.exp_avg_sqs = [as_float64(state.exp_avg_sq)]
    textbook.max_exp_avg_sqs = [as_float64(state.max_exp_avg_sq)]
    textbook.steps = [int(state.step)]
    return textbook


def half_unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding a number to this dtype can change it."""
    info = torch.finfo(dtype.to_real() if dtype.is_complex else dtype)
    return value.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    error = (as_float64(actual) - expected).abs()
    worst = int((error / tolerance).argmax())
    assert bool((error <= tolerance).all()), (
        f"{what}: off by {error.flatten()[worst].item():.3g} where {tolerance.flatten()[worst].item():.3g} is allowed; "
        f"expected {expected.flatten()[worst].item():.9g}"
    )


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("combination", COMBINATIONS + COMPLEX_COMBINATIONS, ids=name_of)
def test_one_update_is_the_textbooks_but_for_rounding(combination: tuple[torch.dtype, torch.dtype], edge: str) -> None:
    """From a state that earlier updates may have left, the error is one rounding to the storage dtype, and a few
    roundings of the dtype that the arithmetic runs in."""
    for step, variant in itertools.product((0, 1, 999), VARIANTS):
        hyper = Hyper(**{**vars(EDGES[edge]), **VARIANTS[variant]})
        check_one_update(random_state(*combination, step=step), hyper, f"{variant}, after {step} steps")


def check_one_update(state: State, hyper: Hyper, what: str) -> None:
    param_dtype, moment_dtype = state.param.dtype, state.exp_avg.dtype
    step = int(state.step)
    old = {name: as_float64(tensor) for name, tensor in vars(state).items()}
    textbook = textbook_at(state, hyper)
    textbook.step([state.grad])
    step_kernel(state, hyper)
    assert state.step.item() == step + 1

    eps = torch.finfo(compute_dtype(param_dtype)).eps
    exp_avg, exp_avg_sq = textbook.exp_avgs[0], textbook.exp_avg_sqs[0]
    first = old["exp_avg"].abs() + old["grad"].abs()  # exp_avg is a difference of these
    assert_within(state.exp_avg, exp_avg, half_unit(exp_avg, moment_dtype) + 4 * eps * first, f"exp_avg, {what}")
    tolerance = half_unit(exp_avg_sq, moment_dtype) + 8 * eps * exp_avg_sq
    assert_within(state.exp_avg_sq, exp_avg_sq, tolerance, f"exp_avg_sq, {what}")
    largest = exp_avg_sq
    if hyper.amsgrad:
        largest = textbook.max_exp_avg_sqs[0]
        tolerance = half_unit(largest, moment_dtype) + 8 * eps * largest
        assert_within(state.max_exp_avg_sq, largest, tolerance, f"max_exp_avg_sq, {what}")

    correction1, correction2 = (1 - beta ** (step + 1) for beta in hyper.betas)
    descent = hyper.lr / correction1 * first / ((largest / correction2).sqrt() + hyper.eps)
    decay = hyper.lr * hyper.weight_decay * old["param"].abs()
    # beta**step comes from multiplications in float64, so its error is up to `step` roundings; relative to
    # 1 - beta**step that is at most 1 / (1 - beta) roundings, whatever the step.
    slowness = sum(1 / (1 - beta) for beta in hyper.betas)
    eps_descent = 16 * eps + torch.finfo(torch.float64).eps * slowness
    param = textbook.params[0]
    tolerance = half_unit(param, param_dtype) + 4 * eps * (param.abs() + decay) + eps_descent * descent
    assert_within(state.param, param, tolerance, f"param, {what}")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_follows_the_textbook_for_200_steps(variant: str) -> None:
    """Groups with their own hyperparameters, params with their own step counts, real and complex, in any layout."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    starts = [
        [normal(3, 5), normal(7, 4).t(), normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)],
        [normal(), normal(11, dtype=torch.complex128), normal(65)],
        [normal(130)],
    ]
    hypers = [
        Hyper(lr=1e-2, **VARIANTS[variant]),
        Hyper(lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, **VARIANTS[variant]),
        Hyper(lr=1e-4, weight_decay=0.0, **VARIANTS[variant]),
    ]
    params = [[start.clone().requires_grad_() for start in group] for group in starts]
    groups = zip(params, hypers, strict=True)
    optimizer = adamw_ext.AdamW([{"params": group, **vars(hyper)} for group, hyper in groups])
    textbooks = [Textbook(group, **vars(hyper)) for group, hyper in zip(starts, hypers, strict=True)]
    every = [param for group in params for param in group]
    for step in range(200):
        for i, param in enumerate(every):
            idle = step % (i + 2) == i  # another rhythm for each param
            param.grad = None if idle else normal(*param.shape, dtype=param.dtype) * (1 + step % 5)
        optimizer.step()
        for group, textbook in zip(params, textbooks, strict=True):
            textbook.step([param.grad for param in group])
    for group, textbook in zip(params, textbooks, strict=True):
        for i, param in enumerate(group):
            state = optimizer.state[param]
            assert state["step"].item() == textbook.steps[i]
            torch.testing.assert_close(as_float64(param), textbook.params[i], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(as_float64(state["exp_avg"]), textbook.exp_avgs[i], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(as_float64(state["exp_avg_sq"]), textbook.exp_avg_sqs[i], rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize(
    ("lr", "weight_decay", "factor"),
    [(1e-3, 0.0, 1.02), (1e-5, 1e-2, 0.2), (1e-3, 1e-2, 0.2), (1e-2, 1e-1, 0.2)],
)
def test_error_after_1000_float32_steps_is_no_larger_than_torchs(
    lr: float, weight_decay: float, factor: float, amsgrad: bool
) -> None:
    """torch rounds the param twice a step, and 1 - lr*weight_decay to float32: where weights decay, its error is more
    than five times ours. Without decay the two do nearly the same."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1000, generator=generator)
    hyper = {"lr": lr, "weight_decay": weight_decay, "amsgrad": amsgrad}
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    optimizers = [adamw_ext.AdamW([ours], **hyper), torch.optim.AdamW([theirs], fused=True, **hyper)]
    textbook = Textbook([start], **hyper)
    for step in range(1000):
        grad = torch.randn(1000, generator=generator) * 1e-2 * (1 + step % 7)
        ours.grad = theirs.grad = grad
        for optimizer in optimizers:
            optimizer.step()
        textbook.step([grad])

    def error(param: Tensor) -> float:
        return (as_float64(param) - textbook.params[0]).square().mean().sqrt().item()

    assert error(ours) <= factor * error(theirs)
    assert error(ours) < 2e-6  # the walk of 1,000 roundings of numbers around 1


SPECIALS = [0.0, -0.0, 1.0, -1.5, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")]


def classes(tensor: Tensor) -> list[str]:
    """What is left of a number when its finite value does not matter."""
    return [
        "nan" if x != x else "inf" if x == torch.inf else "-inf" if x == -torch.inf else "finite"
        for x in tensor.tolist()
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
def test_infinities_and_nans_appear_where_torch_has_them(dtype: torch.dtype, variant: str) -> None:
    """Every special param meets every special gradient, and then two ordinary gradients."""
    pairs = torch.tensor(list(itertools.product(SPECIALS, SPECIALS)), dtype=torch.float64)
    start, first_grad = pairs[:, 0].to(dtype), pairs[:, 1].to(dtype)
    params = [start.clone().requires_grad_() for _ in range(2)]
    hyper = {"lr": 1e-2, "weight_decay": 0.1, **VARIANTS[variant]}
    optimizers = [adamw_ext.AdamW([params[0]], **hyper), torch.optim.AdamW([params[1]], foreach=False, **hyper)]
    for grad in (first_grad, torch.full_like(start, 0.5), torch.full_like(start, -0.25)):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        states = [
            [param, *optimizer.state[param].values()] for param, optimizer in zip(params, optimizers, strict=True)
        ]
        for ours, theirs in zip(*states, strict=True):
            if ours.dim():
                assert classes(ours) == classes(theirs)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_an_infinite_param_stays_infinite(combination: tuple[torch.dtype, torch.dtype]) -> None:
    state = random_state(*combination, step=3)
    state.param[::2] = torch.inf
    state.param[1::2] = -torch.inf
    start = state.param.clone()
    step_kernel(state, ORDINARY)
    assert_same_bits([state.param], [start])


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("old_is_nan", [False, True], ids=["new NaN", "old NaN"])
def test_the_largest_second_moment_keeps_a_nan(combination: tuple[torch.dtype, torch.dtype], old_is_nan: bool) -> None:
    """As torch.maximum: whichever of the two is NaN, so is the maximum, and with it the param."""
    state = random_state(*combination, step=3)
    (state.max_exp_avg_sq if old_is_nan else state.exp_avg_sq)[::3] = torch.nan
    step_kernel(state, Hyper(amsgrad=True))
    hit = torch.zeros(state.param.numel(), dtype=torch.bool)
    hit[::3] = True
    assert torch.equal(state.max_exp_avg_sq.isnan(), hit)
    assert torch.equal(state.param.isnan(), hit)


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_a_step_with_lr_0_and_zero_gradient_changes_no_param(
    dtype: torch.dtype, variant: str, capturable: bool
) -> None:
    """torch's capturable branch divides by lr there, and its params become NaN. Checkpoint loaders step that way."""
    param = spread(1001, dtype, torch.Generator().manual_seed(0))
    param[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.finfo(dtype).max])
    start = param.clone()
    param.requires_grad_().grad = torch.zeros_like(param)
    optimizer = adamw_ext.AdamW([param], lr=0.0, capturable=capturable, **VARIANTS[variant])
    for _ in range(3):
        optimizer.step()
    assert_same_bits([param], [start])
    assert optimizer.state[param]["step"].item() == 3


def test_large_gradients_do_not_overflow_where_their_second_moment_fits() -> None:
    """A float32 gradient of 1e20 has a square beyond float32, but (1 - beta2) times it is not."""
    param = torch.ones(100, requires_grad=True)
    param.grad = torch.full_like(param, 1e20)
    optimizer = adamw_ext.AdamW([param], lr=1e-2, weight_decay=0.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], torch.full((100,), 1e37))
    torch.testing.assert_close(param.detach(), torch.full((100,), 0.99))


def test_the_first_bias_corrections_of_a_slow_beta2_are_exact() -> None:
    """1 - beta2**step in float32 is off by 1e-4 at beta2 = 0.9999; in float64 nothing is lost."""
    param = torch.zeros(100, requires_grad=True)
    optimizer = adamw_ext.AdamW([param], lr=1.0, betas=(0.9, 0.9999), eps=0.0)
    textbook = Textbook([param], lr=1.0, betas=(0.9, 0.9999), eps=0.0)
    param.grad = torch.linspace(0.5, 2.0, 100)
    for _ in range(3):
        optimizer.step()
        textbook.step([param.grad])
    torch.testing.assert_close(as_float64(param), textbook.params[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, torch.nan])
def test_found_inf_skips_the_whole_update_whatever_its_value(found_inf: float) -> None:
    """It is a sum over devices: 2 must skip, as 1."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator, requires_grad=True) for n in (5, 70)]
    optimizer = adamw_ext.AdamW(params, fused=True)
    optimizer.init_state()
    tensors = params + [tensor for param in params for tensor in optimizer.state[param].values()]
    before = [tensor.detach().clone() for tensor in tensors]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) + 0.1
    optimizer.found_inf = torch.tensor(found_inf)
    optimizer.step()
    if found_inf:
        assert_same_bits(tensors, before)
    else:
        assert not any(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "channels_last"])
def test_a_gradient_with_other_strides_is_read_element_by_element(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 4, 4, generator=generator)
    grads = {
        "expanded": torch.randn(3, 1, 1, generator=generator).expand(2, 3, 4, 4),
        "transposed": values.mT,
        "strided": torch.randn(2, 3, 4, 8, generator=generator)[..., ::2],
        "channels_last": values.contiguous(memory_format=torch.channels_last),
    }
    params = [torch.ones(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    for param, grad in zip(params, (grads[layout], grads[layout].contiguous()), strict=True):
        param.grad = grad
        adamw_ext.AdamW([param], eps=1.0).step()
    assert params[0].grad.stride() != params[0].stride()
    assert_same_bits([params[0]], [params[1]])


@pytest.mark.parametrize("beta1", [0.0, 0.25, 0.4999])
def test_a_small_beta1_keeps_nothing_of_what_it_forgets(beta1):
    """m + (1 - beta1)*(g - m) would keep the rounding error of a large m after the gradient has become small."""
    param = torch.nn.Parameter(torch.zeros(8))
    optimizer = adamw_ext.AdamW([param], lr=0.0, betas=(beta1, 0.999))
    moment = torch.zeros(8, dtype=torch.float64)
    for step in range(60):
        param.grad = torch.full((8,), 1e-3 ** min(step, 3))
        optimizer.step()
        moment = beta1 * moment + (1 - beta1) * param.grad.double()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"].double(), moment, rtol=1e-6, atol=0.0)
