"""`max_grad_norm`: clips as torch.nn.utils.clip_grad_norm_, with one norm for all groups, the same on every path.

The bits of the norm are predicted by a second text of the order that core/norm.h documents, those of a clipped step by
a step without clipping whose gradients have been multiplied beforehand.
"""

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_ext import AdamW
from tests.helpers import DEVICES, ISA_LEVELS, MODES, Captured, assert_same_bits, name_of, on_cpu, spread
from tests.test_bits import Path, stepping_on
from tests.test_cuda_steady_state import STEPS, WARM, Loop, allocations, synchronising_is_an_error

pytestmark = pytest.mark.usefixtures("one_thread")

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)

# Around a row, a unit and a piece, and with many small ones more pieces than the 1,024 accumulators of the total. Two
# threads share the step that has them all.
EDGES = (0, 1, 63, 64, 65, 0, 255, 256, 257, 4095, 4096, 4097)
SIZES = (*EDGES, 100_003, *(1 + i % 9 for i in range(1000)), 0)
FEW_SIZES = (3, 0, 65, 4097, 300)

PATHS = [
    *(Path(isa, threads) for isa, threads in itertools.product(ISA_LEVELS, (1, 2))),
    *(Path(ISA_LEVELS[-1], 2, units) for units in (1, 7)),
    *(Path(ISA_LEVELS[-1], threads, capturable=True) for threads in (1, 2)),
    *(Path(units_per_chunk=u, emulated_arguments=a) for u, a in itertools.product((0, 7), (4096, 32764))),
    *(Path(capturable=True, emulated_arguments=a) for a in (4096, 32764)),
]
CAPACITIES = {4096: 169, 32764: 1363}  # tensors in a launch of the norm kernel, by the bytes of its arguments


def numbers(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random ones that every dtype can hold, some of which have squares far below others."""
    width = 2 if dtype.is_complex else 1
    real = spread(width * count, torch.float64, generator, octaves=6).to(dtype.to_real())
    return torch.view_as_complex(real.view(-1, 2)) if dtype.is_complex else real


def cut(sizes: Sequence[int], dtype: torch.dtype, device: str, *, seed: int, offset: int = 0) -> list[Tensor]:
    """Views of one tensor, each of them `offset` elements behind an address that is a multiple of 16."""
    begins = list(itertools.accumulate((-(-size // 8) * 8 + 8 for size in sizes), initial=offset))
    memory = numbers(begins[-1], dtype, torch.Generator().manual_seed(seed)).to(device)
    return [memory[begin : begin + size] for begin, size in zip(begins, sizes, strict=False)]


def make_params(sizes: Sequence[int], dtype: torch.dtype, device: str = "cpu", *, offset: int = 0) -> list[Tensor]:
    """With gradients, which begin at that offset."""
    params: list[Tensor] = [Parameter(view) for view in cut(sizes, dtype, device, seed=1)]
    give_gradients(params, 2, offset=offset)
    return params


def give_gradients(params: Sequence[Tensor], seed: int, *, offset: int = 0) -> None:
    if params:
        dtype, device = params[0].dtype, str(params[0].device)
        grads = cut([param.numel() for param in params], dtype, device, seed=seed, offset=offset)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


def without_clipping(optimizer: AdamW) -> AdamW:
    """A copy, with params and gradients of its own."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        group["max_grad_norm"] = None
    for param, original in zip(params_of(twin), params_of(optimizer), strict=True):
        param.grad = None if original.grad is None else original.grad.clone()
    return twin


def emulate(optimizer: AdamW, arguments: int) -> AdamW:
    """Its CPU params take the CUDA path, with so many bytes of arguments a launch; 0: they do not."""
    optimizer.init_state()
    optimizer._stepper = optimizer._make_stepper([])
    optimizer._stepper.emulated_arguments = arguments
    return optimizer


def params_of(optimizer: AdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def results_of(optimizer: AdamW) -> list[Tensor]:
    """Params, then their state."""
    params = params_of(optimizer)
    return on_cpu([*params, *(value for p in params if p in optimizer.state for value in optimizer.state[p].values())])


def first_moments(optimizer: AdamW) -> list[Tensor]:
    return on_cpu(optimizer.state[param]["exp_avg"] for param in params_of(optimizer))


def grads_of_params(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def grads_of(optimizer: AdamW) -> list[Tensor]:
    return grads_of_params(params_of(optimizer))


def added_up(rows: np.ndarray) -> np.ndarray:
    """Over the last two dimensions: rows onto one of accumulators, in order; then their upper half onto the lower."""
    accumulators = np.zeros((*rows.shape[:-2], rows.shape[-1]))
    for row in range(rows.shape[-2]):
        accumulators = accumulators + rows[..., row, :]
    while accumulators.shape[-1] > 1:
        half = accumulators.shape[-1] // 2
        accumulators = accumulators[..., :half] + accumulators[..., half:]
    return accumulators[..., 0]


def predicted_sum(grads: Iterable[Tensor]) -> float:
    """The sum of the squares of gradients that lie in memory in the order of their elements."""
    pieces = []
    for grad in grads:
        real = torch.view_as_real(grad) if grad.is_complex() else grad
        squares = np.square(real.detach().cpu().double().flatten().numpy())
        pieces += [squares[begin : begin + 4096] for begin in range(0, len(squares), 4096)]
    rows = np.zeros((len(pieces), 16, 256))
    for row, piece in zip(rows, pieces, strict=True):
        row.flat[: len(piece)] = piece
    sums = np.append(added_up(rows), np.zeros(-len(pieces) % 1024))
    return float(added_up(sums.reshape(-1, 1024)))


def predicted_norm(grads: Iterable[Tensor]) -> float:
    return math.sqrt(predicted_sum(grads))


def coefficient(norm: float, limit: float) -> float:
    return min(1.0, limit / (norm + 1e-6))


def multiplied(grad: Tensor, factor: float) -> Tensor:
    """As the kernel's arithmetic does it: in float64, or in float32."""
    if grad.is_complex():
        return torch.view_as_complex(multiplied(torch.view_as_real(grad), factor))
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.to(dtype) * torch.tensor(factor, dtype=dtype, device=grad.device)


def replace_gradients(params: Iterable[Tensor], factor: float) -> None:
    """By their multiples, with all the bits that these have."""
    for param in params:
        if param.grad is not None:
            grad = multiplied(param.grad, factor)
            param.grad = None
            if not grad.is_complex():
                param.grad_dtype = None  # any
            param.grad = grad


# --- Meaning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.3, 2.0, 0.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_equals_clip_grad_norm_and_a_step(device: str, dtype: torch.dtype, fraction: float) -> None:
    """Of several groups, with params that have no gradient. The limit is this fraction of the norm, below it or above.
    torch rounds the norm, and each clipped gradient, to the gradients' dtype: where nothing is rounded away, to 1 or 0,
    the bits are the same."""
    params = make_params(FEW_SIZES * 3, dtype, device)
    for param in params[1::4]:
        param.grad = None
    limit = fraction * predicted_norm(grads_of_params(params))
    groups = [{"params": params[:7]}, {"params": params[7:], "lr": 0.1, "maximize": True}]
    optimizer = AdamW(groups, max_grad_norm=limit, **HYPER)
    reference = without_clipping(optimizer)
    tolerance = (8 if torch.finfo(dtype).bits == 16 else 64) * torch.finfo(dtype).eps
    for step in range(3):
        given = [grad.clone() for grad in grads_of(optimizer)]
        norm = torch.nn.utils.clip_grad_norm_(params_of(reference), limit)
        reference.step()
        optimizer.step()
        assert_same_bits(grads_of(optimizer), given, "gradients are left as they were")
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=tolerance)
        if fraction == 0.3:
            for ours, theirs in zip(results_of(optimizer), results_of(reference), strict=True):
                largest = theirs.abs().max().item() if theirs.numel() else 0.0
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * largest)
        else:
            assert_same_bits(results_of(optimizer), results_of(reference), step)
        assert optimizer.state[params[0]]["step"].item() == step + 1
        for optimized in (optimizer, reference):
            with_gradients = [param for param in params_of(optimized) if param.grad is not None]
            give_gradients(with_gradients, 10 + step)


@pytest.mark.parametrize("scale", [None, 1024.0, 1536.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_clipped_step_has_the_bits_of_one_whose_gradients_were_multiplied(
    device: str, mode: str, dtype: torch.dtype, scale: float | None
) -> None:
    """By the coefficient, in the precision of the arithmetic and not of the gradients. Where there is a grad_scale,
    gradients are written back unscaled and not clipped."""
    unscale = 1.0 if scale is None else 1.0 / float(np.float32(scale))
    for maximize in (False, True):
        params = make_params(FEW_SIZES, dtype, device)
        optimizer = AdamW(params, max_grad_norm=1.5, maximize=maximize, **MODES[mode], **HYPER)
        reference = without_clipping(optimizer)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=device)
        for step in range(2):
            give_gradients(params_of(optimizer), step)
            give_gradients(params_of(reference), step)
            norm = math.sqrt(predicted_sum(grads_of(optimizer)) * unscale * unscale)
            unscaled = [multiplied(grad, unscale).to(dtype) for grad in grads_of(optimizer)]
            assert norm > 0.0
            replace_gradients(params_of(reference), unscale * coefficient(norm, 1.5))
            optimizer.step()
            reference.step()
            assert optimizer.grad_norm.item() == norm
            assert_same_bits(results_of(optimizer), results_of(reference), (maximize, step))
            assert_same_bits(grads_of(optimizer), unscaled)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_grad_norm_is_a_float64_on_the_device_and_0_before_the_first_step(device: str, mode: str) -> None:
    optimizer = AdamW(make_params(FEW_SIZES, torch.bfloat16, device), max_grad_norm=1.0, **MODES[mode])
    norm = optimizer.grad_norm
    assert (norm.dtype, norm.shape, norm.device.type, norm.item()) == (torch.float64, (), device, 0.0)
    optimizer.step()
    after = optimizer.grad_norm
    assert (after.dtype, after.shape, after.device.type) == (torch.float64, (), device)
    assert after.item() == predicted_norm(grads_of(optimizer))
    assert norm.item() == 0.0  # a tensor of its own


# --- The norm's bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_has_the_bits_of_the_documented_order(device: str, dtype: torch.dtype) -> None:
    """Pieces of 4,096 elements, in the order of the groups' params; a complex element is two numbers."""
    params = make_params(SIZES, dtype, device)
    groups = [{"params": params[::2]}, {"params": params[1::2]}]
    expected = predicted_sum(param.grad for group in groups for param in group["params"])
    orders = (params, params[::-1], params[5:] + params[:5], sorted(params, key=len))
    if torch.finfo(dtype).bits > 16:  # else the squares are so short that all sums are exact
        assert {expected} != {predicted_sum(param.grad for param in order) for order in orders}  # the order shows
    for flags in MODES.values():
        optimizer = AdamW([dict(group) for group in groups], max_grad_norm=1.0, **flags)
        optimizer.step()
        assert optimizer._sums_of_squares.on(str(params[0].device)).item() == expected, flags
        assert optimizer.grad_norm.item() == math.sqrt(expected), flags


def test_a_tensor_of_more_pieces_than_the_total_has_accumulators_has_one_norm() -> None:
    (param,) = make_params((1025 * 4096 + 1,), torch.float32)
    expected = predicted_norm([param.grad])
    for path in (Path(), Path(ISA_LEVELS[-1], 2), Path(emulated_arguments=4096)):
        optimizer = AdamW([param], max_grad_norm=1.0)
        with stepping_on(optimizer, path):
            optimizer.step()
        assert optimizer.grad_norm.item() == expected, path


@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_is_the_correctly_rounded_root(device: str) -> None:
    """Which torch.sqrt of a float64 is not on every CPU."""
    (param,) = make_params((2,), torch.float64, device)
    optimizer = AdamW([param], max_grad_norm=1.0)
    for seed in range(1000):
        give_gradients([param], seed)
        optimizer.step()
        assert optimizer.grad_norm.item() == predicted_norm([param.grad])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_path_changes_the_bits_of_norm_or_params(dtype: torch.dtype, offset: int) -> None:
    """Nor do gradients that begin at an odd address."""
    params = make_params(SIZES, dtype, offset=offset)
    start = torch.cat(params).detach()
    norm = predicted_norm(param.grad for param in params)
    optimizers = {c: AdamW(params, max_grad_norm=1.0, capturable=c, **HYPER) for c in (False, True)}
    expected: list[Tensor] = []
    for path in PATHS if offset == 1 else PATHS[::3]:
        optimizer = optimizers[path.capturable]
        if optimizer._stepper is not None and optimizer._stepper.isa != path.isa:
            optimizer._stepper = None
        with torch.no_grad():
            torch._foreach_copy_(params, start.split(SIZES))
            if optimizer.state:
                torch._foreach_zero_([value for state in optimizer.state.values() for value in state.values()])
        with stepping_on(optimizer, path):
            optimizer.step()
        assert optimizer.grad_norm.item() == norm, path
        results = [torch.cat(params)]
        expected = expected or results
        assert_same_bits(results, expected, path)
    assert not torch.equal(expected[0], start)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_several_dtypes_count_in_one_norm(device: str, param_dtype: torch.dtype) -> None:
    """In one step over params of one dtype and of others."""
    params = [*make_params(EDGES, param_dtype, device), *make_params(FEW_SIZES, torch.float64, device)]
    for param, dtype in zip(params[: len(EDGES)], itertools.cycle((torch.float32, torch.bfloat16, torch.float16))):
        grad = param.grad
        param.grad = None
        param.grad_dtype = dtype
        param.grad = grad.to(dtype)
    for flags in MODES.values():
        optimizer = AdamW(params, max_grad_norm=1.0, **flags)
        optimizer.step()
        assert optimizer.grad_norm.item() == predicted_norm(grads_of(optimizer)), flags


@pytest.mark.parametrize("arguments", CAPACITIES)
def test_any_number_of_tensors_around_the_limits_of_a_launch_has_one_norm(arguments: int) -> None:
    """Empty ones, and such without gradient, at the boundaries among them."""
    counts = {launches * c + d for c in CAPACITIES.values() for launches in (1, 2) for d in (-1, 0, 1)}
    for count in (count for count in counts if count <= 2 * CAPACITIES[arguments] + 1):
        sizes = [1 + i % 2 for i in range(count)]
        for boundary in CAPACITIES.values():
            sizes[(boundary - 1) % count] = 0
        params = make_params(sizes, torch.float32)
        for i in {0, CAPACITIES[arguments], count - 1}:
            params[i % count].grad = None
        expected = predicted_norm(grads_of_params(params))
        path = Path(capturable=count % 2 == 0, emulated_arguments=arguments)
        optimizer = AdamW(params, max_grad_norm=1.0, capturable=path.capturable)
        with stepping_on(optimizer, path):
            optimizer.step()
        assert optimizer.grad_norm.item() == expected, path


def strided_case(name: str) -> tuple[Tensor, Tensor]:
    """A param and its gradient, of 113 x 37 elements."""
    generator = torch.Generator().manual_seed(0)
    rows = numbers(113 * 37, torch.float32, generator).view(113, 37)
    columns = numbers(113 * 37, torch.float32, generator).view(37, 113).t()
    wide = numbers(113 * 74, torch.float32, generator).view(113, 74)
    return {
        "transposed gradient": (rows, columns),
        "transposed param": (columns, rows),
        "expanded gradient": (rows, columns[:, :1].expand(113, 37)),
        "gradient of one number": (rows, torch.tensor(0.3).expand(113, 37)),
        "gradient with gaps": (rows, wide[:, ::2]),
        "param with gaps": (wide[:, 1::2], columns),
    }[name]


STRIDED = (
    "transposed gradient",
    "transposed param",
    "expanded gradient",
    "gradient of one number",
    "gradient with gaps",
    "param with gaps",
)


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_of_other_strides_counts_in_the_order_of_the_state(device: str, name: str) -> None:
    """Whatever its own strides are, the bits are those of a gradient that has the state's. It is left as it was."""
    results = []
    for is_laid_out in (False, True):
        for path in [None] if device == "cuda" else [Path(), Path(emulated_arguments=4096)]:
            value, grad = strided_case(name)
            param = value.to(device).detach()
            grad = grad.to(device)
            optimizer = AdamW([Parameter(param)], max_grad_norm=1.0)
            (param,) = params_of(optimizer)
            optimizer.init_state()
            laid_out = torch.empty_like(optimizer.state[param]["exp_avg"]).copy_(grad)
            param.grad = laid_out if is_laid_out else grad
            before = param.grad.clone()
            if path is None:
                optimizer.step()
            else:
                with stepping_on(optimizer, path):
                    optimizer.step()
            in_memory = laid_out.as_strided((laid_out.numel(),), (1,))
            assert optimizer.grad_norm.item() == predicted_norm([in_memory])
            assert torch.equal(param.grad, before)
            results.append([param.detach().cpu(), optimizer.state[param]["exp_avg"].cpu()])
            assert_same_bits(results[-1], results[0], path)


# --- Magnitudes ------------------------------------------------------------------------------------------------------

MAGNITUDES: dict[str, Callable[[Tensor], Tensor]] = {
    "1e-30": lambda ones: ones * 1e-30,
    "1e30": lambda ones: ones * 1e30,
    "denormal": lambda ones: ones * 1e-40,
    "largest": lambda ones: ones.sign() * torch.finfo(torch.float32).max,
    "1e-30 and 1e30": lambda ones: ones * torch.where(torch.arange(len(ones)) % 2 == 0, 1e-30, 1e30),
    "one large": lambda ones: ones * torch.where(torch.arange(len(ones)) == 7, 1e30, 1e-30),
}


@pytest.mark.parametrize("mode", ["host_steps", "capturable"])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("device", DEVICES)
def test_neither_small_nor_large_magnitudes_leave_the_norms_range(device: str, magnitude: str, mode: str) -> None:
    """float32 gradients whose squares no float32 can hold. Expected is the rounded sum of exact squares. Large ones are
    clipped to the limit."""
    params = make_params((5000, 65, 1), torch.float32, device)
    for param in params:
        param.grad.copy_(MAGNITUDES[magnitude](param.grad.cpu()))
    exact = math.sqrt(math.fsum(x * x for grad in grads_of_params(params) for x in grad.double().flatten().tolist()))
    for limit in (1.0, 1e-20):
        optimizer = AdamW(params, max_grad_norm=limit, **MODES[mode], **HYPER)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-12)
        assert all(bool(tensor.isfinite().all()) for tensor in results_of(optimizer))
        if exact > limit == 1.0:
            moments = torch.cat(first_moments(optimizer)).double()
            assert moments.norm().item() == pytest.approx(1.0 - HYPER["betas"][0], rel=1e-4)


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_zeros_have_norm_0_and_the_step_of_zeros(device: str, limit: float) -> None:
    params = make_params(FEW_SIZES, torch.float32, device)
    for param in params:
        param.grad.zero_()
    optimizer = AdamW(params, max_grad_norm=limit, **HYPER)
    reference = without_clipping(optimizer)
    optimizer.step()
    reference.step()
    assert optimizer.grad_norm.item() == 0.0
    assert_same_bits(results_of(optimizer), results_of(reference))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_gradients_have_norm_0(device: str) -> None:
    for flags in MODES.values():
        params = make_params((0, 0), torch.float32, device)
        optimizer = AdamW(params, max_grad_norm=1.0, **flags)
        optimizer.step()
        assert optimizer.grad_norm.item() == 0.0


NOT_FINITE = {
    "inf": (math.inf,),
    "-inf": (-math.inf,),
    "nan": (math.nan,),
    "two infs": (math.inf, -math.inf),
    "inf and nan": (math.inf, math.nan),
}


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=name_of)
@pytest.mark.parametrize("values", NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_that_is_not_finite_does_as_clip_grad_norm_and_a_step(
    device: str, values: Sequence[float], dtype: torch.dtype
) -> None:
    """An infinite norm makes 0 of finite gradients and NaN of infinite ones, a NaN makes NaN of all."""
    emulated = (0, 4096) if device == "cpu" else (0,)
    for limit, flags, arguments in itertools.product((1.0, math.inf), MODES.values(), emulated):
        params = make_params(FEW_SIZES, dtype, device)
        for i, value in enumerate(values):
            params[2].grad[7 + 40 * i] = value
        optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=limit, **flags, **HYPER)
        reference = without_clipping(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params_of(reference), limit)
        reference.step()
        emulate(optimizer, arguments).step()
        found = optimizer.grad_norm.item()
        assert (math.isnan(found), math.isinf(found)) == (bool(norm.isnan()), bool(norm.isinf()))
        assert_same_bits(results_of(optimizer), results_of(reference), (limit, flags, arguments))


# --- Gradient scaling ------------------------------------------------------------------------------------------------


def step_with(optimizer: AdamW, *, scale: float | None = None, found: float | None = None) -> None:
    """As GradScaler hands its numbers to an optimizer that is AMP-aware."""
    device = params_of(optimizer)[0].device
    optimizer.grad_scale = None if scale is None else torch.tensor(scale, device=device)
    optimizer.found_inf = None if found is None else torch.tensor(found, device=device)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("emulated", [0, 4096, 32764])
@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_leaves_the_norm_of_the_last_one_that_ran(mode: str, emulated: int) -> None:
    check_skipped_steps("cpu", mode, emulated)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_a_step_skipped_on_the_device_leaves_the_norm_of_the_last_one_that_ran(mode: str) -> None:
    check_skipped_steps("cuda", mode, 0)


def check_skipped_steps(device: str, mode: str, emulated: int) -> None:
    optimizer = AdamW(make_params(SIZES[:20], torch.float32, device), max_grad_norm=1.0, **MODES[mode], **HYPER)
    emulate(optimizer, emulated)
    norm = 0.0
    for step, found in enumerate((1.0, 0.0, 2.0, math.nan, 0.0, 0.0, 1.0)):
        give_gradients(params_of(optimizer), step)
        given = [grad.clone() for grad in grads_of(optimizer)]
        before = results_of(optimizer)
        if found == 0.0:
            norm = math.sqrt(predicted_sum(given) * 0.25 * 0.25)
        step_with(optimizer, scale=4.0 if found == 0.0 else 8.0, found=found)  # as after a growth that was too much
        assert optimizer.grad_norm.item() == norm, step
        if found != 0.0:
            assert_same_bits(results_of(optimizer), before, step)
            assert_same_bits(grads_of(optimizer), given, step)
        else:
            assert_same_bits(grads_of(optimizer), [grad / 4 for grad in given], step)
    assert norm > 0.0


@pytest.mark.parametrize("unscales", [False, True], ids=["step", "unscale_ and step"])
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"fused": True, "capturable": True}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_with_a_grad_scaler_the_norm_is_that_of_the_unscaled_gradients(
    device: str, flags: dict[str, bool], unscales: bool
) -> None:
    """Whoever unscales them, and the scale may change. Afterwards the gradients are unscaled, and not clipped."""
    weights = make_params((5, 300), torch.float32, device)
    optimizer = AdamW(weights, max_grad_norm=0.5, **flags, **HYPER)
    plain = copy.deepcopy(optimizer)
    plain_weights = params_of(plain)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    norms = []
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        slopes = [numbers(len(weight), torch.float32, generator).to(device) for weight in weights]
        optimizer.zero_grad()
        loss = sum((weight * slope).sum() for weight, slope in zip(weights, slopes, strict=True))
        scaler.scale(loss * (math.inf if step in (0, 3) else 1.0)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step not in (0, 3):
            assert_same_bits(grads_of(optimizer), slopes)
            for weight, slope in zip(plain_weights, slopes, strict=True):
                weight.grad = slope.clone()
            plain.step()
            norms.append(predicted_norm(slopes))
        assert optimizer.grad_norm.item() == (norms[-1] if norms else 0.0)
        assert_same_bits(on_cpu(weights), on_cpu(plain_weights), step)
    assert len(set(norms)) == 4
    assert min(norms) > 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_lie_in_memory_at_odd_places_are_unscaled_there(device: str) -> None:
    """Each element once, whether or not it is clipped."""
    for flags in MODES.values():
        params = make_params(EDGES, torch.float32, device, offset=3)
        optimizer = AdamW(params, max_grad_norm=1e-3, **flags)
        expected = [grad / 8 for grad in grads_of(optimizer)]
        step_with(optimizer, scale=8.0)
        assert_same_bits(grads_of(optimizer), expected)
        assert optimizer.grad_norm.item() == predicted_norm(expected)


# --- Groups ----------------------------------------------------------------------------------------------------------


def assert_clipped(optimizer: AdamW, limits: Sequence[float | None]) -> None:
    """After its first step, each group was clipped to its limit by the norm of all gradients."""
    norm = optimizer.grad_norm.item()
    for group, limit in zip(optimizer.param_groups, limits, strict=True):
        factor = 1.0 if limit is None else coefficient(norm, limit)
        for param in group["params"]:
            expected = multiplied(param.grad, factor) * torch.tensor(1.0 - group["betas"][0], dtype=torch.float32)
            assert_same_bits([optimizer.state[param]["exp_avg"]], [expected], (limit, factor))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_each_group_has_its_own_limit_of_the_norm_of_all(device: str, mode: str) -> None:
    """A group without one counts in the norm, and is not clipped."""
    limits = (None, 1.0, 0.25, 1e9)
    params = make_params(FEW_SIZES * 4, torch.float32, device)
    groups: list[dict[str, Any]] = [{"params": params[5 * i :][:5], "max_grad_norm": x} for i, x in enumerate(limits)]
    optimizer = AdamW(groups, **MODES[mode], **HYPER)
    optimizer.step()
    assert optimizer.grad_norm.item() == predicted_norm(grads_of(optimizer))
    assert_clipped(optimizer, limits)


def test_a_group_takes_the_constructors_limit_unless_it_has_one() -> None:
    def group(**options: object) -> dict[str, object]:
        return {"params": make_params((3,), torch.float32), **options}

    optimizer = AdamW([group(), group(max_grad_norm=None), group(max_grad_norm=3)], max_grad_norm=0.5, **HYPER)
    optimizer.step()
    optimizer.add_param_group(group())
    copied = pickle.loads(pickle.dumps(optimizer))
    copied.add_param_group(group())
    assert [g["max_grad_norm"] for g in copied.param_groups] == [0.5, None, 3, 0.5, 0.5]
    fresh = AdamW(optimizer.param_groups, **HYPER)
    fresh.step()
    assert_clipped(fresh, [0.5, None, 3, 0.5])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_limit_is_read_at_every_step(device: str, mode: str) -> None:
    """None among them. While no group has one there is no norm, and the last one that was measured stays."""
    optimizer = AdamW(make_params(FEW_SIZES, torch.float32, device), max_grad_norm=1.0, **MODES[mode], **HYPER)
    reference = without_clipping(optimizer)
    norm = 0.0
    for step, limit in enumerate((1.0, 0.1, None, 5, None, 1e9, 0)):
        give_gradients(params_of(optimizer), step)
        give_gradients(params_of(reference), step)
        optimizer.param_groups[0]["max_grad_norm"] = limit
        factor = 1.0
        if limit is not None:
            norm = predicted_norm(grads_of(optimizer))
            factor = coefficient(norm, limit)
        replace_gradients(params_of(reference), factor)
        optimizer.step()
        reference.step()
        assert_same_bits(results_of(optimizer), results_of(reference), (step, limit))
        optimizer.param_groups[0]["max_grad_norm"] = 1.0
        assert optimizer.grad_norm.item() == norm


@pytest.mark.parametrize("device", DEVICES)
def test_host_counted_and_capturable_groups_share_one_norm(device: str) -> None:
    """Each kind has a sum of its own, and both are clipped by the sum of both; also where one has no gradients."""
    params = make_params(FEW_SIZES * 2, torch.float32, device)
    groups = [{"params": params[:5]}, {"params": params[5:], "capturable": True}]
    optimizer = AdamW(groups, max_grad_norm=0.75, **HYPER)
    optimizer.step()
    by_group = [predicted_sum(param.grad for param in group["params"]) for group in groups]
    exact = math.sqrt(math.fsum(x * x for grad in grads_of(optimizer) for x in grad.double().flatten().tolist()))
    assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-12)
    assert optimizer.grad_norm.item() == math.sqrt(by_group[0] + by_group[1])
    assert_clipped(optimizer, [0.75, 0.75])
    for without in (0, 1):
        give_gradients(params, 5)
        for param in groups[without]["params"]:
            param.grad = None
        optimizer.step()
        assert optimizer.grad_norm.item() == predicted_norm(grads_of(optimizer))
    give_gradients(params, 6)
    before = optimizer.grad_norm.item()
    step_with(optimizer, found=1.0)
    assert optimizer.grad_norm.item() == before
    step_with(optimizer, found=0.0)
    assert optimizer.grad_norm.item() != before


def make_split(**options: object) -> tuple[AdamW, list[Tensor], list[Tensor]]:
    """An optimizer of params on the CPU and of others on the GPU, and both."""
    on_host, on_gpu = (make_params(FEW_SIZES, torch.float32, device) for device in ("cpu", "cuda"))
    return AdamW([{"params": on_host}, {"params": on_gpu}], max_grad_norm=0.75, **options, **HYPER), on_host, on_gpu


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_params_on_two_devices_share_one_norm(mode: str) -> None:
    """It shows on the first param's device, whichever has gradients."""
    optimizer, on_host, on_gpu = make_split(**MODES[mode])
    optimizer.step()
    assert optimizer.grad_norm.item() == math.sqrt(2 * predicted_sum(grads_of_params(on_host)))
    assert_clipped(optimizer, [0.75, 0.75])
    for with_gradients, without in ((on_host, on_gpu), (on_gpu, on_host)):
        give_gradients(with_gradients, 5)
        for param in without:
            param.grad = None
        optimizer.step()
        assert optimizer.grad_norm.device.type == "cpu"
        assert optimizer.grad_norm.item() == predicted_norm(grads_of_params(with_gradients))


@pytest.mark.cuda
def test_a_step_skipped_on_two_devices_leaves_the_norm_of_the_last_one_that_ran() -> None:
    """Also where that had gradients on one of them."""
    optimizer, on_host, on_gpu = make_split(capturable=True)
    step_with(optimizer, found=0.0)
    give_gradients(on_host, 5)
    for param in on_gpu:
        param.grad = None
    step_with(optimizer, found=0.0)
    norm = optimizer.grad_norm.item()
    assert norm == predicted_norm(grads_of_params(on_host))
    give_gradients(on_gpu, 6)
    step_with(optimizer, found=1.0)
    assert optimizer.grad_norm.item() == norm


# --- State dicts and copies ------------------------------------------------------------------------------------------


def train(optimizer: AdamW, steps: Iterable[int]) -> AdamW:
    for step in steps:
        give_gradients(params_of(optimizer), step)
        optimizer.step()
    return optimizer


def make_optimizer(**options: object) -> AdamW:
    params = make_params(FEW_SIZES, torch.float32)
    return AdamW([{"params": params[:2]}, {"params": params[2:]}], **{**HYPER, **options})


def test_the_limit_is_saved_and_restored() -> None:
    """Into an optimizer that has another one, or none: which then goes on with the same bits."""
    optimizer = make_optimizer(max_grad_norm=0.5)
    optimizer.param_groups[1]["max_grad_norm"] = 0.25
    train(optimizer, range(3))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [param.detach() for param in params_of(optimizer)]], file)
    train(optimizer, range(3, 5))
    for options in ({}, {"max_grad_norm": 7.0}, {"capturable": True}):
        file.seek(0)
        state_dict, values = torch.load(file, weights_only=True)
        other = make_optimizer(**options)
        other.load_state_dict(state_dict)
        for param, value in zip(params_of(other), values, strict=True):
            param.data.copy_(value)
        assert [group["max_grad_norm"] for group in other.param_groups] == [0.5, 0.25]
        train(other, range(3, 5))
        assert_same_bits(results_of(other), results_of(optimizer), options)
        assert other.grad_norm.item() == optimizer.grad_norm.item()


def test_the_limit_stays_where_a_dict_of_torch_is_loaded_and_does_not_trouble_torch() -> None:
    theirs = torch.optim.AdamW(make_params(FEW_SIZES, torch.float32), **HYPER)
    theirs.step()
    ours = AdamW(make_params(FEW_SIZES, torch.float32), max_grad_norm=0.5, **HYPER)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["max_grad_norm"] == 0.5
    ours.step()
    assert ours.grad_norm.item() == predicted_norm(grads_of(ours))
    theirs.load_state_dict(ours.state_dict())
    theirs.step()
    assert {state["step"].item() for state in theirs.state.values()} == {3.0}


def test_an_optimizer_without_a_limit_saves_no_such_key() -> None:
    assert "max_grad_norm" not in make_optimizer().state_dict()["param_groups"][0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_goes_on_with_the_same_bits_and_a_norm_of_its_own(
    duplicate: Callable[[AdamW], AdamW], mode: str
) -> None:
    """Which is 0 before its first step."""
    optimizer = train(make_optimizer(max_grad_norm=0.5, **MODES[mode]), range(2))
    copied = duplicate(optimizer)
    assert copied.grad_norm.item() == 0.0
    norm = optimizer.grad_norm.item()
    train(copied, range(2, 4))
    assert optimizer.grad_norm.item() == norm != copied.grad_norm.item()
    train(optimizer, range(2, 4))
    assert optimizer.grad_norm.item() == copied.grad_norm.item()
    assert_same_bits(results_of(copied), results_of(optimizer))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_same_step_twice_has_the_same_bits(path: Path) -> None:
    """Whatever lay in the memory that it uses: a step with other gradients of other sizes lies between."""
    params = make_params(EDGES, torch.float32)
    optimizer = AdamW(params, max_grad_norm=0.5, capturable=path.capturable, **HYPER)
    optimizer.init_state()
    start = [tensor.clone() for tensor in results_of(optimizer)]
    results = []
    for given in (range(len(params)), range(3, 9), range(len(params))):
        give_gradients(params, 3)
        for i, param in enumerate(params):
            param.grad = param.grad if i in given else None
        states = [value for param in params for value in optimizer.state[param].values()]
        with torch.no_grad():
            for tensor, begin in zip([*params, *states], start, strict=True):
                tensor.copy_(begin)
        with stepping_on(optimizer, path):
            optimizer.step()
        results.append([*results_of(optimizer), optimizer.grad_norm])
    assert_same_bits(results[2], results[0])
    assert results[1][-1].item() not in (0.0, results[0][-1].item())


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, -1e-300, -math.inf, math.nan, "1.0", [1.0], {}], ids=repr)
def test_a_limit_that_is_no_norm_is_refused_at_once(value: object) -> None:
    """Of a group with its number, and nothing is added to an optimizer that refuses a group."""
    params = make_params((3,), torch.float32)
    with pytest.raises(ValueError, match="max_grad_norm must be a number that is not negative, or None, but is "):
        AdamW(params, max_grad_norm=value)
    groups = [{"params": []}, {"params": params, "max_grad_norm": value}]
    with pytest.raises(ValueError, match=r"max_grad_norm must be .* in param group 1"):
        AdamW(groups)
    optimizer = AdamW([{"params": []}])
    with pytest.raises(ValueError, match=r"max_grad_norm must be .* in param group 1"):
        optimizer.add_param_group({"params": params, "max_grad_norm": value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-1.0, ValueError, "Invalid max_grad_norm value: -1 in param group 1"),
        (-0.5, ValueError, "Invalid max_grad_norm value: -0.5 in param group 1"),
        (math.nan, ValueError, "Invalid max_grad_norm value: nan in param group 1"),
        ("1.0", TypeError, "param group 1: max_grad_norm must be a number or a 1-element tensor, but is '1.0'"),
        (torch.ones(2), TypeError, "param group 1: max_grad_norm must be a number or None, but is a tensor"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("is_first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_refuses_a_limit_that_is_no_norm_and_changes_nothing(
    mode: str, is_first: bool, value: object, error: type[Exception], words: str
) -> None:
    optimizer = make_optimizer(max_grad_norm=1.0, **MODES[mode])
    if not is_first:
        train(optimizer, range(2))
    give_gradients(params_of(optimizer), 7)
    before, norm = results_of(optimizer), optimizer.grad_norm.item()
    optimizer.param_groups[1]["max_grad_norm"] = value
    with pytest.raises(error, match=words):
        optimizer.step()
    assert_same_bits(results_of(optimizer), before)
    assert optimizer.grad_norm.item() == norm
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    optimizer.step()
    assert optimizer.grad_norm.item() == predicted_norm(grads_of(optimizer))


def test_true_is_the_number_1() -> None:
    """As for every other hyperparameter: Python's bools are ints."""
    optimizer = make_optimizer(max_grad_norm=True)
    optimizer.step()
    assert_clipped(optimizer, [1.0, 1.0])


def test_without_any_limit_there_is_no_grad_norm() -> None:
    optimizer = make_optimizer()
    optimizer.step()
    with pytest.raises(RuntimeError, match="max_grad_norm is set, but it is None in every group"):
        _ = optimizer.grad_norm
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    assert optimizer.grad_norm.item() == 0.0


def make_mixed(**options: object) -> AdamW:
    """The second group is updated by torch."""
    leaves = [param.detach() for param in make_params(FEW_SIZES, torch.float32)]
    give_gradients(leaves, 0)
    return AdamW([{"params": leaves[:2], **options}, {"params": leaves[2:], "differentiable": True}], **HYPER)


@pytest.mark.parametrize("group", [0, 1])
def test_params_that_torch_updates_cannot_be_clipped(group: int) -> None:
    """Neither can others beside them: the norm would lack theirs. Nothing has changed then."""
    optimizer = make_mixed()
    optimizer.param_groups[group]["max_grad_norm"] = 1.0
    before = results_of(optimizer)
    with pytest.raises(RuntimeError, match=r"max_grad_norm needs the .* kernel, but param .*updated by torch"):
        optimizer.step()
    assert_same_bits(results_of(optimizer), before)
    assert not optimizer.state
    optimizer.param_groups[group]["max_grad_norm"] = None
    optimizer.step()
    assert len(optimizer.state) == len(FEW_SIZES)


# --- Edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 1])
def test_a_limit_that_comes_later_is_refused_beside_params_that_torch_updates(group: int) -> None:
    optimizer = make_mixed(max_grad_norm=None)
    for _ in range(3):
        optimizer.step()
    before = results_of(optimizer)
    optimizer.param_groups[group]["max_grad_norm"] = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm needs the hand-written kernel"):
        optimizer.step()
    assert_same_bits(results_of(optimizer), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_without_any_gradient_has_norm_0(device: str, mode: str) -> None:
    """As clip_grad_norm_ says of no gradients."""
    params = make_params(FEW_SIZES, torch.float32, device)
    optimizer = AdamW(params, max_grad_norm=1.0, **MODES[mode])
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0


def test_an_optimizer_without_params_has_norm_0() -> None:
    assert AdamW([{"params": []}], max_grad_norm=1.0).grad_norm.item() == 0.0


def test_a_first_step_in_inference_mode_does_not_break_later_ones() -> None:
    """Where two sums are added up by torch."""
    params = make_params(FEW_SIZES, torch.float32)
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "capturable": True}], max_grad_norm=1.0, **HYPER)
    optimizer.init_state()
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()


# --- Captured and steady steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_a_replayed_step_clips_with_the_bits_of_an_eager_one(device: str, dtype: torch.dtype, scaled: bool) -> None:
    """The limits change between replays, None among them, and so do gradients, scale and found_inf."""
    params = make_params(FEW_SIZES, dtype, device)
    groups = [{"params": params[:2]}, {"params": params[2:], "max_grad_norm": 4.0}]
    optimizer = AdamW(groups, max_grad_norm=1.0, capturable=True, **HYPER)
    eager = copy.deepcopy(optimizer)
    twin = AdamW([dict(group, capturable=False) for group in copy.deepcopy(eager).param_groups], **HYPER)
    optimizer.init_state()
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.zeros((), device=device)
    places = [param.grad for param in params]
    captured = Captured(optimizer.step, device)
    optimizer.param_groups[1]["max_grad_norm"] = 3.0  # before the first replay, too
    norm = 0.0
    for step, limit in enumerate((1.0, 0.1, 1e9, None, 0.0, 2.5, 2.5)):
        scale, found = (2.0**step, float(step in (1, 5))) if scaled else (None, None)
        if scaled:
            optimizer.grad_scale.fill_(scale)
            optimizer.found_inf.fill_(found)
        for other in (eager, twin):
            give_gradients(params_of(other), step)
        for place, grad in zip(places, grads_of(eager), strict=True):
            place.copy_(grad)
        for other in (eager, twin):
            other.param_groups[1]["max_grad_norm"] = 3.0
        for each in (optimizer, eager, twin):
            each.param_groups[0]["max_grad_norm"] = limit
        if not found:
            norm = math.sqrt(predicted_sum(places) / (scale or 1.0) / (scale or 1.0))
        optimizer.sync_hyperparameters()
        captured.replay()
        step_with(eager, scale=scale, found=found)
        step_with(twin, scale=scale, found=found)
        assert [each.grad_norm.item() for each in (optimizer, eager, twin)] == [norm] * 3, step
        assert_same_bits(results_of(optimizer), results_of(eager), step)
        assert_same_bits(results_of(optimizer), results_of(twin), step)
        assert_same_bits(places, grads_of(eager), step)


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_keeps_the_limit_until_it_is_handed_over(device: str) -> None:
    optimizer = AdamW(make_params((65,), torch.float32, device), max_grad_norm=1.0, capturable=True, **HYPER)
    optimizer.init_state()
    start = results_of(optimizer)
    captured = Captured(optimizer.step, device)

    def replayed(limit: float, *, syncs: bool) -> Tensor:
        (param,) = params_of(optimizer)
        with torch.no_grad():
            for tensor, begin in zip([param, *optimizer.state[param].values()], start, strict=True):
                tensor.copy_(begin)
        optimizer.param_groups[0]["max_grad_norm"] = limit
        if syncs:
            optimizer.sync_hyperparameters()
        captured.replay()
        return first_moments(optimizer)[0]

    first = replayed(1.0, syncs=False)
    kept = replayed(0.25, syncs=False)
    changed = replayed(0.25, syncs=True)
    assert torch.equal(first, kept) == (device == "cuda")  # a plain call reads it anew
    torch.testing.assert_close(changed, first / 4, rtol=1e-6, atol=0.0)
    if device == "cuda":
        with pytest.raises(ValueError, match="Invalid max_grad_norm value: -1 in param group 0"):
            replayed(-1.0, syncs=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_clipped_step_waits_for_nothing_and_allocates_nothing(device: str, mode: str) -> None:
    """Tensors of four dtypes. Reading the norm makes a tensor, and waits for nothing either."""
    loop = Loop(device, max_grad_norm=0.5, **MODES[mode])
    for _ in range(WARM):
        loop.step()
    before = allocations(device)
    with synchronising_is_an_error(device):
        for _ in range(STEPS):
            loop.step()
    assert allocations(device) == before
    with synchronising_is_an_error(device):
        norm = loop.optimizer.grad_norm
    twin = Loop("cpu", max_grad_norm=0.5)
    for _ in range(WARM + STEPS):
        twin.step()
    assert_same_bits(loop.results, twin.results)
    assert norm.item() == twin.optimizer.grad_norm.item() == predicted_norm(grads_of(loop.optimizer))


@pytest.mark.parametrize("device", DEVICES)
def test_a_replayed_clipped_step_waits_for_nothing_and_allocates_nothing(device: str) -> None:
    loop = Loop(device, max_grad_norm=0.5, capturable=True)
    loop.optimizer.init_state()
    loop.hand_out_gradients()
    captured = Captured(loop.optimizer.step, device)
    for _ in range(WARM):
        captured.replay()
    before = allocations(device)
    with synchronising_is_an_error(device):
        for step in range(STEPS):
            loop.optimizer.param_groups[0]["max_grad_norm"] = 0.1 * (1 + step)
            loop.optimizer.sync_hyperparameters()
            captured.replay()
    assert allocations(device) == before
    assert loop.optimizer.grad_norm.item() == predicted_norm(grads_of(loop.optimizer))
