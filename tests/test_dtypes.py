"""bfloat16 and float16 storage: every bit pattern is read and written as torch reads and writes it.

The conversions are watched through the update itself, with hyperparameters under which the numbers of interest go
through it exactly or with one rounding, so that nothing here depends on the order of its operations.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from adamw_ext import functional
from tests.helpers import COMBINATIONS, ISA_LEVELS, assert_same_bits, name_of, running_on

HALVES = [torch.bfloat16, torch.float16]
HALF_COMBINATIONS = [(param, moment) for param, moment in COMBINATIONS if param in HALVES]

pytestmark = [
    pytest.mark.usefixtures("one_thread", "isa"),
    pytest.mark.parametrize("cut", ["whole", "shifted", "single"]),
]


@pytest.fixture(params=ISA_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with running_on(isa=request.param):
        yield


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def float32s_around(dtype: torch.dtype) -> Tensor:
    """Numbers that round differently from their neighbours: those of the dtype, the middles between them (and between
    the largest and infinity), and the float32 numbers just above and below all these; of both signs."""
    numbers = torch.arange(2**15).to(torch.int16).view(dtype).double()
    numbers = numbers[numbers.isfinite()]
    beyond = 2 * numbers[-1:] - numbers[-2:-1]
    middles = (numbers + torch.cat([numbers[1:], beyond])) / 2
    exact = torch.cat([numbers, middles, torch.tensor([torch.finfo(torch.float32).max, 65520.0, 1e5, 1e30])]).float()
    up, down = (torch.nextafter(exact, torch.tensor(towards)) for towards in (torch.inf, 0.0))
    positive = torch.cat([exact, up, down])
    positive = positive[positive.isfinite()]
    return torch.cat([positive, -positive])


class Elements:
    """State for one update per element, and how it is cut into tensors.

    Two 16-bit neighbours are updated as one word. ``whole`` is one tensor of pairs; ``shifted`` starts a tensor at each
    pair's second element, and another has an odd length; in ``single``, every element is a tensor of its own, and so
    what is left over after the pairs (a thousand of them, from all over).
    """

    def __init__(self, cut: str, dtype: torch.dtype, moment_dtype: torch.dtype, **roles: Tensor) -> None:
        count = next(iter(roles.values())).numel()
        step = count // 1000 | 1 if cut == "single" else 1
        count = (count + step - 1) // step
        self.sizes = {"whole": [count], "shifted": [1, count - 1], "single": [1] * count}[cut]
        dtypes = {"param": dtype, "grad": dtype, "exp_avg": moment_dtype, "exp_avg_sq": moment_dtype}
        dtypes["max_exp_avg_sq"] = moment_dtype
        self.start = {}
        for role, role_dtype in dtypes.items():
            values = roles.get(role)
            self.start[role] = torch.zeros(count, dtype=role_dtype) if values is None else values[::step].clone()
            assert self.start[role].dtype == role_dtype
        self.after = {role: tensor.clone() for role, tensor in self.start.items()}

    def update(
        self,
        *,
        lr: float = 0.0,
        betas: tuple[float, float] = (0.0, 0.0),
        amsgrad: bool = False,
        grad_scale: float | None = None,
    ) -> None:
        """One update, the first, with eps = 1 and without weight decay."""
        views: dict[str, Sequence[Tensor]] = {role: tensor.split(self.sizes) for role, tensor in self.after.items()}
        functional.adamw(
            list(views["param"]),
            list(views["grad"]),
            list(views["exp_avg"]),
            list(views["exp_avg_sq"]),
            list(views["max_exp_avg_sq"]) if amsgrad else [],
            list(torch.zeros(len(self.sizes)).unbind()),
            None if grad_scale is None else torch.tensor(grad_scale),
            amsgrad=amsgrad,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=1.0,
            maximize=False,
        )


@pytest.mark.parametrize("combination", HALF_COMBINATIONS, ids=name_of)
def test_a_step_of_lr_0_keeps_every_pattern_of_a_param(cut: str, combination: tuple[torch.dtype, torch.dtype]) -> None:
    """Negative zeros, subnormals, infinities; NaNs stay NaNs."""
    elements = Elements(cut, *combination, param=every_pattern(combination[0]))
    elements.update()
    assert_same_bits([elements.after["param"]], [elements.start["param"]])


@pytest.mark.parametrize("combination", HALF_COMBINATIONS, ids=name_of)
def test_moments_of_every_gradient_are_rounded_as_torch_rounds(
    cut: str, combination: tuple[torch.dtype, torch.dtype]
) -> None:
    """From zero moments, exp_avg is 0.1 times the gradient and exp_avg_sq its square, each with one rounding in float32
    and one to storage: among the results are subnormals, middles and overflows."""
    param_dtype, moment_dtype = combination
    elements = Elements(cut, *combination, grad=every_pattern(param_dtype))
    elements.update(betas=(0.9, 0.0), amsgrad=True)
    grad = elements.start["grad"].float()
    exp_avg = (0.0 + grad * torch.tensor(1 - 0.9)).to(moment_dtype)
    exp_avg_sq = (0.0 + grad * grad).to(moment_dtype)
    actual = [elements.after[role] for role in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
    assert_same_bits(actual, [exp_avg, exp_avg_sq, exp_avg_sq])
    assert_same_bits([elements.after["grad"]], [elements.start["grad"]])


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_every_pattern_of_a_second_moment_is_read_and_halved(cut: str, dtype: torch.dtype) -> None:
    """beta2 = 0.5 and a gradient of zero: exact, but for the smallest subnormals, and those are rounded to even."""
    patterns = every_pattern(dtype)
    elements = Elements(cut, dtype, dtype, exp_avg_sq=patterns, max_exp_avg_sq=patterns.flip(0))
    elements.update(betas=(0.0, 0.5), amsgrad=True)
    exp_avg_sq = elements.start["exp_avg_sq"].float() * 0.5 + 0.0
    largest = torch.maximum(exp_avg_sq, elements.start["max_exp_avg_sq"].float())
    assert_same_bits([elements.after["exp_avg_sq"]], [exp_avg_sq.to(dtype)])
    # Which zero is the larger is nobody's business.
    assert_same_bits([elements.after["max_exp_avg_sq"] + 0.0], [largest.to(dtype) + 0.0])


@pytest.mark.parametrize("lr", [1.0, 1 / 3, 3 * 2.0**-20])
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_multiples_of_every_first_moment_are_rounded_as_torch_rounds(cut: str, dtype: torch.dtype, lr: float) -> None:
    """beta1 = 0.5 and a gradient of zero: a param of zero becomes -lr * exp_avg."""
    elements = Elements(cut, dtype, dtype, exp_avg=every_pattern(dtype))
    elements.update(lr=lr, betas=(0.5, 0.0))
    exp_avg = elements.start["exp_avg"].float()
    exp_avg = exp_avg + 0.5 * (0.0 - exp_avg)  # infinity becomes NaN
    assert_same_bits([elements.after["exp_avg"]], [exp_avg.to(dtype)])
    assert_same_bits([elements.after["param"]], [(0.0 - torch.tensor(2 * lr) * exp_avg).to(dtype)])


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_every_float32_is_rounded_to_a_param_as_torch_rounds(cut: str, dtype: torch.dtype) -> None:
    """To nearest, ties to even, at every number of the dtype and between all of them, subnormals and overflow included.
    The float32 comes from float32 moments: a param of zero becomes -lr * exp_avg, without a rounding on the way."""
    numbers = float32s_around(dtype)
    small = numbers.abs() < 1.0
    for lr, part in ((1.0, numbers[~small]), (2.0**-32, numbers[small])):
        elements = Elements(cut, dtype, torch.float32, exp_avg=part / lr)
        elements.update(lr=lr, betas=(0.5, 0.0))
        exact = 0.0 - elements.start["exp_avg"] * lr
        assert_same_bits([elements.after["param"]], [exact.to(dtype)])


@pytest.mark.parametrize("scale", [3.0, 65536.0, 2.0**-4])
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_every_gradient_is_unscaled_as_torch_rounds(cut: str, dtype: torch.dtype, scale: float) -> None:
    """Written back divided by grad_scale; and the update sees the gradient before that is rounded."""
    elements = Elements(cut, dtype, torch.float32, grad=every_pattern(dtype))
    elements.update(grad_scale=scale)
    unscaled = elements.start["grad"].float() * torch.tensor(1 / scale)
    assert_same_bits([elements.after["grad"]], [unscaled.to(dtype)])
    assert_same_bits([elements.after["exp_avg"]], [unscaled + 0.0])


def test_float16_does_not_change_where_subnormal_floats_are_flushed_to_zero(cut: str) -> None:
    """float16's subnormals are normal in float32: torch.set_flush_denormal is not to touch them."""
    patterns = every_pattern(torch.float16)
    runs = []
    for flush in (False, True):
        elements = Elements(cut, torch.float16, torch.float16, param=patterns, grad=patterns.flip(0))
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush subnormals to zero")
        try:
            elements.update(betas=(0.9, 0.0))
        finally:
            torch.set_flush_denormal(False)
        runs.append([elements.after[role] for role in ("param", "exp_avg", "exp_avg_sq")])
    assert_same_bits(runs[1], runs[0])
