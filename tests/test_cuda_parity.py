"""CUDA has the bits of the CPU: every dtype, option and way to keep steps, any alignment, any number of tensors.

The expected bits are those of the CPU kernel with its step counts on the host, which test_update and test_bits prove.
Whole buffers are compared, with what lies between the tensors, so a write that strays is seen too.
"""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import (
    COMBINATIONS,
    COMPLEX_COMBINATIONS,
    DEVICES,
    MODES,
    assert_same_bits,
    functional_step,
    name_of,
    on_cpu,
)
from tests.test_bits import FEW_SIZES, LONG_SIZES, SIZES, UNITS_PER_CHUNK, random_numbers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

STEPS = 3
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
FLOAT32 = (torch.float32, torch.float32)
ROLES = ("param", "grad 0", "grad 1", "grad 2", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
ALIGNMENT = 8  # elements: 16 bytes or a multiple of it for every dtype

Combination = tuple[torch.dtype, torch.dtype]


def staggered(sizes: Sequence[int]) -> list[list[int]]:
    """For each role, how many elements behind an aligned address each tensor begins: all alignments occur."""
    return [[(i + i // ALIGNMENT * role) % ALIGNMENT for i in range(len(sizes))] for role in range(len(ROLES))]


class Job:
    """Tensors on a device, cut from one buffer for each role, and an optimizer over them.

    The numbers depend on sizes and dtype alone; one in 16 is a zero, denormal, huge, infinite or NaN. Param i begins
    with i % 3 steps made, and belongs to group i % len(hypers).
    """

    def __init__(
        self,
        combination: Combination,
        sizes: Sequence[int],
        *,
        device: str = "cpu",
        amsgrad: bool = False,
        maximize: bool = False,
        hypers: Sequence[dict[str, object]] = (HYPER,),
        offsets: list[list[int]] | None = None,  # None: staggered
        **flags: bool,
    ) -> None:
        self.device = device
        self.amsgrad = amsgrad
        self.buffers: list[Tensor] = []
        width = 2 if combination[0].is_complex else 1  # real numbers an element
        numbers = random_numbers(width * sum(sizes))
        views = {}
        for role, row, begin in zip(ROLES, numbers, offsets or staggered(sizes), strict=True):
            dtype = combination[1 if "exp_avg" in role else 0]
            views[role] = self._cut(dtype, row.square() if "sq" in role else row, sizes, begin)
        self.params = [view.requires_grad_() for view in views["param"]]
        self.grads = [views[f"grad {step}"] for step in range(STEPS)]
        self.state = {key: views[key] for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))}
        on_device = flags.get("capturable") or flags.get("fused")
        self.steps = [torch.tensor(float(i % 3), device=device if on_device else "cpu") for i in range(len(sizes))]
        groups = [{"params": self.params[i :: len(hypers)], **hyper} for i, hyper in enumerate(hypers)]
        groups = [group for group in groups if group["params"]]
        self.optimizer = adamw_ext.AdamW(groups, amsgrad=amsgrad, maximize=maximize, **flags)
        for i, param in enumerate(self.params):
            self.optimizer.state[param] = {"step": self.steps[i], **{key: self.state[key][i] for key in self.state}}

    def _cut(self, dtype: torch.dtype, values: Tensor, sizes: Sequence[int], offsets: list[int]) -> list[Tensor]:
        """Views of a new buffer that hold the values one after the other, at least one element apart."""
        begins, end = [], 0
        for size, offset in zip(sizes, offsets, strict=True):
            begins.append((end // ALIGNMENT + 1) * ALIGNMENT + offset)
            end = begins[-1] + size
        width = 2 if dtype.is_complex else 1
        buffer = torch.full((width * (end + ALIGNMENT),), 7.0, dtype=dtype.to_real())
        for begin, size, part in zip(begins, sizes, values.split([width * size for size in sizes]), strict=True):
            buffer[width * begin : width * (begin + size)] = part
        buffer = buffer.to(self.device)
        self.buffers.append(buffer)
        elements = torch.view_as_complex(buffer.view(-1, 2)) if dtype.is_complex else buffer
        return [elements[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]

    def train(self, *, units_per_chunk: int = 0) -> "Job":
        """Through the optimizer."""
        for grads in self.grads:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            if self.optimizer._stepper is not None:  # an optimizer's first step is cut as chosen from the work
                self.optimizer._stepper.units_per_chunk = units_per_chunk
            self.optimizer.step()
        return self

    def train_functional(self, *, capturable: bool = False) -> "Job":
        """Through the functional form."""
        for grads in self.grads:
            moments = [self.state.get(key, []) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
            flags = {"amsgrad": self.amsgrad, "capturable": capturable}
            functional_step(self.params, grads, *moments, self.steps, **HYPER, **flags)
        return self

    @property
    def results(self) -> list[Tensor]:
        """All buffers, gradients included, and the step counts."""
        return [*on_cpu(self.buffers), torch.stack(self.steps).cpu()]


def jobs(device: str, *args: object, **kwargs: object) -> Iterator[tuple[str, Job]]:
    """The same job on this device in every mode."""
    for mode, flags in MODES.items():
        yield mode, Job(*args, device=device, **kwargs, **flags)  # type: ignore[arg-type]


@pytest.mark.parametrize("combination", [*COMBINATIONS, *COMPLEX_COMBINATIONS], ids=name_of)
@pytest.mark.parametrize(
    ("device", "amsgrad", "maximize"),
    [
        ("cpu", False, False),
        ("cpu", True, True),
        *(
            pytest.param("cuda", *options, marks=pytest.mark.cuda)
            for options in itertools.product((False, True), repeat=2)
        ),
    ],
)
def test_every_dtype_and_option_has_the_bits_of_the_cpu(
    device: str, amsgrad: bool, maximize: bool, combination: Combination
) -> None:
    """Tensors of every size up to 130 and of some beyond, empty ones among them, with steps that lag."""
    options = {"amsgrad": amsgrad, "maximize": maximize}
    untouched = Job(combination, SIZES, **options).results
    expected = Job(combination, SIZES, **options).train().results
    assert not torch.equal(expected[0], untouched[0])
    assert expected[0].isfinite().float().mean() > 0.5  # the specials have not taken over
    for mode, job in jobs(device, combination, SIZES, **options):
        assert_same_bits(job.train().results, expected, mode)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize(
    ("device", "amsgrad"),
    [
        ("cpu", True),
        pytest.param("cuda", False, marks=pytest.mark.cuda),
        pytest.param("cuda", True, marks=pytest.mark.cuda),
    ],
)
def test_every_pointer_may_be_misaligned_on_its_own(device: str, amsgrad: bool, combination: Combination) -> None:
    """Param, gradient and moments begin 0 to 7 elements behind an aligned address, each pointer independently."""
    sizes = [1 + i % 70 for i in range(640)]
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(0, ALIGNMENT, (len(ROLES), len(sizes)), generator=generator).tolist()
    pairs = list(itertools.product(range(ALIGNMENT), repeat=2))  # of param and gradient: all
    for role in range(4):
        offsets[role][: len(pairs)] = [pair[min(role, 1)] for pair in pairs]
    for role, offset in itertools.product(range(len(ROLES)), range(ALIGNMENT)):  # all aligned but one
        for other in range(len(ROLES)):
            offsets[other][100 + role * ALIGNMENT + offset] = offset if other == role else 0
    expected = Job(combination, sizes, amsgrad=amsgrad, offsets=offsets).train().results
    for mode, job in jobs(device, combination, sizes, amsgrad=amsgrad, offsets=offsets):
        assert_same_bits(job.train().results, expected, mode)


@pytest.mark.parametrize("combination", [*COMBINATIONS, *COMPLEX_COMBINATIONS], ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_every_group_has_its_own_hyperparameters(device: str, combination: Combination) -> None:
    """beta1 below 0.5 among them, which takes another form of the average."""
    hypers = [
        {},
        {"betas": (0.3, 0.99), "weight_decay": 0.0},
        {"lr": 0.0, "betas": (0.0, 0.5)},
        {"lr": 0.3, "eps": 1e-3, "betas": (0.499, 0.0), "weight_decay": 0.7},
        {"betas": (0.5, 0.9999), "eps": 0.0},
    ]
    groups = [{**HYPER, **hyper} for hyper in hypers]
    expected = Job(combination, SIZES[:80], hypers=groups).train().results
    for mode, job in jobs(device, combination, SIZES[:80], hypers=groups):
        assert_same_bits(job.train().results, expected, mode)


@pytest.mark.cuda
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_chunks_do_not_change_bits(combination: Combination) -> None:
    expected = Job(combination, LONG_SIZES).train().results
    for units_per_chunk in UNITS_PER_CHUNK:
        for mode in ("host_steps", "capturable"):
            job = Job(combination, LONG_SIZES, device="cuda", **MODES[mode])
            results = job.train(units_per_chunk=units_per_chunk).results
            assert_same_bits(results, expected, (mode, units_per_chunk))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_takes_any_number_of_tensors(device: str, mode: str) -> None:
    """From 1 to over 1,100, one more each step up to 560: every param lags its predecessor by a step.

    What a step leaves out is seen at the end, in its step count and moments.
    """
    sizes = [i % 4 for i in range(1110)]
    here = Job(FLOAT32, sizes, device=device, **MODES[mode])
    twin = Job(FLOAT32, sizes)
    counts = [*range(1, 561), *range(577, len(sizes), 64), len(sizes)]
    given = 0
    for step, count in enumerate(counts):
        for job in (here, twin):
            for i in range(given, count):
                job.params[i].grad = job.grads[i % STEPS][i]
            job.optimizer.step()
        given = count
        if step % 100 == 0:
            assert_same_bits(here.results, twin.results, (step, count))
    assert_same_bits(here.results, twin.results)
    assert twin.steps[0].item() == len(counts)


@pytest.mark.cuda
def test_20321_tensors_are_updated_in_one_step() -> None:
    """More than metadata of fixed size holds: TransformerEngine#3418."""
    sizes = [i % 5 for i in range(20_320)] + [0]
    expected = Job(FLOAT32, sizes).train().results
    for mode in ("host_steps", "capturable"):
        results = Job(FLOAT32, sizes, device="cuda", **MODES[mode]).train().results
        assert_same_bits(results, expected, mode)


@pytest.mark.parametrize("device", DEVICES)
def test_all_dtypes_in_one_optimizer_have_the_bits_of_the_cpu(device: str) -> None:
    """With and without amsgrad, some groups maximizing."""

    def train(device: str, **flags: bool) -> list[Tensor]:
        kinds = itertools.product([*COMBINATIONS, *COMPLEX_COMBINATIONS], (False, True))
        parts = [Job(c, FEW_SIZES, device=device, amsgrad=amsgrad, **flags) for c, amsgrad in kinds]
        groups = [{**part.optimizer.param_groups[0], "maximize": i % 3 == 0} for i, part in enumerate(parts)]
        optimizer = adamw_ext.AdamW(groups, **flags)
        for part in parts:
            optimizer.state.update(part.optimizer.state)
        for step in range(STEPS):
            for part in parts:
                for param, grad in zip(part.params, part.grads[step], strict=True):
                    param.grad = grad
            optimizer.step()
        return [tensor for part in parts for tensor in part.results]

    expected = train("cpu")
    for mode, flags in MODES.items():
        assert_same_bits(train(device, **flags), expected, mode)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("combination", [*COMBINATIONS, *COMPLEX_COMBINATIONS], ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_the_functional_form_has_the_bits_of_the_cpu(device: str, combination: Combination, amsgrad: bool) -> None:
    expected = Job(combination, FEW_SIZES, amsgrad=amsgrad).train().results
    for capturable in (False, True):
        job = Job(combination, FEW_SIZES, device=device, amsgrad=amsgrad, capturable=capturable)
        assert_same_bits(job.train_functional(capturable=capturable).results, expected, capturable)


# --- Memory layouts --------------------------------------------------------------------------------------------------

# Each makes a buffer, the param in it, and its gradient, from 48 numbers for each of the two.
LAYOUTS = {
    "every second element": lambda p, g: (p, p[::2], g[:24]),
    "gradient of every second element": lambda p, g: (p, p[:24], g[::2]),
    "a column": lambda p, g: (p, p.view(8, 6)[:, 1], g[:8]),
    "a transposed param": lambda p, g: (p, p.view(8, 6).t(), g.view(6, 8)),
    "a transposed gradient": lambda p, g: (p, p.view(8, 6), g.view(6, 8).t()),
    "both transposed": lambda p, g: (p, p.view(8, 6).t(), g.view(8, 6).t()),
    "channels_last": lambda p, g: (p, p.view(2, 2, 3, 4).permute(0, 3, 1, 2), g.view(2, 4, 2, 3)),
    "channels_last gradient": lambda p, g: (p, p.view(2, 4, 2, 3), g.view(2, 2, 3, 4).permute(0, 3, 1, 2)),
    "an expanded gradient": lambda p, g: (p, p.view(6, 8), g[:8].expand(6, 8)),
    "a gradient expanded from one element": lambda p, g: (p, p.view(6, 8), g[3].expand(6, 8)),
    "0-d": lambda p, g: (p, p[5], g[7]),
    "a row of a matrix": lambda p, g: (p, p.view(6, 8)[1:2], g.view(6, 8)[3:4]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_memory_layout_has_the_bits_of_the_cpu(device: str, layout: str, dtype: torch.dtype) -> None:
    """Nothing outside the param's elements is written, nor any gradient. The step creates the state."""

    def train(device: str, **flags: bool) -> list[Tensor]:
        numbers = torch.randn(2, 48, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
        rows = (numbers if dtype.is_complex else numbers.real).to(dtype).to(device)
        buffer, view, grad = LAYOUTS[layout](rows[0].clone(), rows[1].clone())
        param = torch.nn.Parameter(view)
        other = torch.nn.Parameter(torch.ones(5, dtype=dtype, device=device))
        optimizer = adamw_ext.AdamW([other, param], amsgrad=True, **{**HYPER, "lr": 0.1}, **flags)
        for _ in range(STEPS):
            param.grad, other.grad = grad, other.detach().clone()
            optimizer.step()
        moments = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
        assert optimizer.state[param]["step"].item() == STEPS
        assert not torch.equal(buffer, rows[0])
        return on_cpu([buffer, param, other, grad, *moments])

    expected = train("cpu")
    for mode, flags in MODES.items():
        assert_same_bits(train(device, **flags), expected, mode)


@pytest.mark.parametrize("device", DEVICES)
def test_a_conjugated_gradient_has_the_bits_of_the_cpu(device: str) -> None:
    def train(device: str, **flags: bool) -> list[Tensor]:
        numbers = torch.randn(2, 33, generator=torch.Generator().manual_seed(1), dtype=torch.complex64).to(device)
        param = torch.nn.Parameter(numbers[0].clone())
        optimizer = adamw_ext.AdamW([param], **HYPER, **flags)
        for _ in range(STEPS):
            param.grad = numbers[1].conj()
            optimizer.step()
        return on_cpu([param, optimizer.state[param]["exp_avg"]])

    expected = train("cpu")
    for mode, flags in MODES.items():
        assert_same_bits(train(device, **flags), expected, mode)
