"""The same bits on every path: instruction set, threads, chunks, alignment, one tensor or many, eager or functional,
capturable or not, and through the emulated CUDA kernels, which test_emulation looks at more closely.

The reference path is the baseline instruction set on one thread; that its numbers are right is test_update's subject.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import COMBINATIONS, ISA_LEVELS, assert_same_bits, functional_step, name_of, running_on, spread

# What these tests prepare and compare is small: only the step itself gets threads.
pytestmark = pytest.mark.usefixtures("one_thread")

THREADS = (1, 2, 3)
UNITS_PER_CHUNK = (0, 1, 2, 7, 64)  # 0: chosen from the work
STEPS = 3
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}

SIZES = (0, *range(1, 131), 0, 1000, 4096, 0, 20_011, 0)
FEW_SIZES = (0, 1, 2, 3, 63, 64, 65, 0, 130, 1000, 0)
LONG_SIZES = (150_001, 0, 3, 70_000, 129, 80_000, 0)
SPECIALS = (0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e30, -3e38, torch.inf, -torch.inf, torch.nan)

Combination = tuple[torch.dtype, torch.dtype]


@dataclass(frozen=True)
class Path:
    """How a step is run. None of it may be seen in the result."""

    isa: str = "baseline"
    threads: int = 1
    units_per_chunk: int = 0
    capturable: bool = False  # the kernels, not the host, count steps and reckon scalars
    emulated_arguments: int = 0  # the CUDA kernels, walked over on the host, with so many bytes of arguments; 0: no


# Each level, number of threads and way to cut at least once.
FEW_PATHS = [
    *(Path(ISA_LEVELS[i % len(ISA_LEVELS)], *rest) for i, rest in enumerate([(1, 1), (2, 0), (3, 2)])),
    Path(units_per_chunk=2, capturable=True),
    Path(units_per_chunk=1, emulated_arguments=4096),
    Path(capturable=True, emulated_arguments=32764),
]


@functools.lru_cache
def random_numbers(count: int) -> Tensor:
    """7 rows: params, a gradient for each of 3 steps, and 3 for moments; one number in 16 is a special one."""
    generator = torch.Generator().manual_seed(count)
    numbers = spread(7 * count, torch.float64, generator, octaves=12)
    where = torch.rand(7 * count, generator=generator) < 1 / 16
    special = torch.tensor(SPECIALS, dtype=torch.float64)
    numbers[where] = special[torch.randint(0, len(SPECIALS), (int(where.sum()),), generator=generator)]
    return numbers.view(7, count)


class Run:
    """Tensors, cut from one buffer for each role, and the updates made to them.

    A buffer holds its tensors with one element between neighbours, behind some elements that differ from role to role:
    so tensors start at every alignment. What lies between them must not be written.
    """

    def __init__(
        self,
        combination: Combination,
        sizes: Sequence[int],
        *,
        amsgrad: bool = False,
        steps_before: int | None = None,  # made before; None: another number for each param
    ) -> None:
        self.sizes = sizes
        self.amsgrad = amsgrad
        self.buffers: list[Tensor] = []
        self.between: list[Tensor] = []  # the indices into each buffer that belong to no tensor
        param_dtype, moment_dtype = combination
        param, *grads, exp_avg, exp_avg_sq, max_exp_avg_sq = random_numbers(sum(sizes))
        self.params = [view.requires_grad_() for view in self.cut(param_dtype, param)]
        self.grads = [self.cut(param_dtype, grad) for grad in grads]
        self.exp_avgs = self.cut(moment_dtype, exp_avg)
        self.exp_avg_sqs = self.cut(moment_dtype, exp_avg_sq.square())
        self.max_exp_avg_sqs = self.cut(moment_dtype, max_exp_avg_sq.square()) if amsgrad else []
        self.steps = [torch.tensor(float(i % 3 if steps_before is None else steps_before)) for i in range(len(sizes))]
        self.start = [tensor.clone() for tensor in (*self.buffers, *self.steps)]
        self.optimizer: adamw_ext.AdamW | None = None

    def cut(self, dtype: torch.dtype, values: Tensor) -> list[Tensor]:
        """Views of a new buffer, which hold the values one after the other."""
        first = len(self.buffers)
        buffer = torch.empty(first + sum(self.sizes) + len(self.sizes), dtype=dtype)
        is_between = torch.ones(buffer.shape, dtype=torch.bool)
        views = []
        for size, part in zip(self.sizes, values.split(self.sizes), strict=True):
            views.append(buffer[first : first + size].copy_(part))
            is_between[first : first + size] = False
            first += size + 1
        buffer[is_between] = 7.0
        self.buffers.append(buffer)
        self.between.append(is_between.nonzero().flatten())
        return views

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, start in zip((*self.buffers, *self.steps), self.start, strict=True):
                tensor.copy_(start)

    def state_of(self, i: int) -> dict[str, Tensor]:
        state = {"step": self.steps[i], "exp_avg": self.exp_avgs[i], "exp_avg_sq": self.exp_avg_sqs[i]}
        return {**state, "max_exp_avg_sq": self.max_exp_avg_sqs[i]} if self.amsgrad else state

    def train(self, path: Path) -> "Run":
        """Through the optimizer."""
        if self.optimizer is None or self.optimizer.defaults["capturable"] != path.capturable:
            self.optimizer = make_optimizer([self], capturable=path.capturable)
        train_together(self.optimizer, [self], path)
        return self

    def train_functional(self, path: Path) -> "Run":
        """Through the functional form."""
        with running_on(isa=path.isa, threads=path.threads):
            for grads in self.grads:
                state = (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.steps)
                functional_step(self.params, grads, *state, amsgrad=self.amsgrad, **HYPER)
        return self

    @property
    def results(self) -> list[Tensor]:
        """Params and state, each role as one tensor."""
        params = [param.detach() for param in self.params]
        roles = [params, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs]
        return [torch.cat(views) for views in roles if views] + [torch.stack(self.steps)]

    def assert_nothing_written_between(self) -> None:
        for buffer, between in zip(self.buffers, self.between, strict=True):
            assert bool((buffer[between] == 7.0).all())


def make_optimizer(runs: Sequence[Run], *, capturable: bool = False) -> adamw_ext.AdamW:
    """Over the tensors of all runs, one group a run."""
    groups = [{"params": run.params, "amsgrad": run.amsgrad} for run in runs]
    optimizer = adamw_ext.AdamW(groups, capturable=capturable, **HYPER)
    for run in runs:
        for i, param in enumerate(run.params):
            optimizer.state[param] = run.state_of(i)
    return optimizer


def train_together(optimizer: adamw_ext.AdamW, runs: Sequence[Run], path: Path) -> None:
    with stepping_on(optimizer, path):
        for step in range(STEPS):
            for run in runs:
                for param, grad in zip(run.params, run.grads[step], strict=True):
                    param.grad = grad
            optimizer.step()


@contextmanager
def stepping_on(optimizer: adamw_ext.AdamW, path: Path) -> Iterator[None]:
    """Steps of an optimizer that has its state go this way, the first one too."""
    with running_on(isa=path.isa, threads=path.threads):
        if optimizer._stepper is None:
            optimizer._stepper = optimizer._make_stepper([])
        stepper = optimizer._stepper
        stepper.units_per_chunk = path.units_per_chunk
        stepper.emulated_arguments = path.emulated_arguments
        yield
        assert optimizer._stepper is stepper  # a step that makes another stepper would have gone some other way
        assert stepper.isa == path.isa


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_isa_and_chunks_do_not_change_bits(combination: Combination, amsgrad: bool) -> None:
    """Tensors of every size up to two units and of some beyond, at every alignment, empty ones among them."""
    expected = Run(combination, SIZES, amsgrad=amsgrad).train(Path()).results
    assert expected[0].isfinite().float().mean() > 0.5  # the specials have not taken over
    for isa in ISA_LEVELS:
        run = Run(combination, SIZES, amsgrad=amsgrad)
        for path in (Path(isa, 1, units_per_chunk) for units_per_chunk in UNITS_PER_CHUNK):
            run.restore()
            assert_same_bits(run.train(path).results, expected, path)
            run.assert_nothing_written_between()


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_threads_do_not_change_bits(combination: Combination) -> None:
    """In steps long enough to be shared among threads, and for other threads to have the interpreter meanwhile."""
    expected = Run(combination, LONG_SIZES).train(Path()).results
    for isa in ISA_LEVELS:
        run = Run(combination, LONG_SIZES)
        for path in (Path(isa, *rest) for rest in itertools.product(THREADS, (0, 1))):
            run.restore()
            assert_same_bits(run.train(path).results, expected, path)
            run.assert_nothing_written_between()


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_one_tensor_has_the_bits_of_many(combination: Combination, amsgrad: bool) -> None:
    """Where tensors begin and end cannot be seen in the result, down to tensors of one element."""
    total = 200
    one = Run(combination, [total], amsgrad=amsgrad, steps_before=2).train(Path()).results
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, total + 1, (20,), generator=generator).sort().values.tolist()
    partitions = [
        [1] * total,
        [3] * 66 + [2],
        [64] * 3 + [8],
        [end - begin for begin, end in itertools.pairwise([0, *cuts, total])],
    ]
    for sizes, path in itertools.product(partitions, FEW_PATHS):
        many = Run(combination, sizes, amsgrad=amsgrad, steps_before=2).train(path)
        assert_same_bits(many.results[:-1], one[:-1], (len(sizes), path))
        assert many.results[-1].unique().tolist() == [2.0 + STEPS]


@pytest.mark.parametrize("path", FEW_PATHS, ids=str)
def test_an_empty_tensor_anywhere_changes_nothing(path: Path) -> None:
    """First, last, in a row, or all: every pattern of empty and full among six tensors."""
    float32 = (torch.float32, torch.float32)
    for pattern in itertools.product([0, 70], repeat=6):
        run = Run(float32, pattern, steps_before=0).train(path)
        without = Run(float32, [size for size in pattern if size] or [0], steps_before=0).train(Path())
        assert_same_bits(run.results[:-1], without.results[:-1], pattern)
        assert run.results[-1].tolist() == [STEPS] * 6


def test_groups_of_all_dtypes_in_one_step_have_the_bits_of_a_step_each() -> None:
    """With and without amsgrad, in the same parallel region."""
    kinds = list(itertools.product(COMBINATIONS, (False, True)))
    sizes = (5, 0, 300, 64)
    expected = [Run(combination, sizes, amsgrad=amsgrad).train(Path()).results for combination, amsgrad in kinds]
    for path in FEW_PATHS:
        runs = [Run(combination, sizes, amsgrad=amsgrad) for combination, amsgrad in kinds]
        train_together(make_optimizer(runs, capturable=path.capturable), runs, path)
        for run, results, kind in zip(runs, expected, kinds, strict=True):
            assert_same_bits(run.results, results, (kind, path))


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_the_functional_form_has_the_bits_of_the_optimizer(combination: Combination, amsgrad: bool) -> None:
    for path in (Path(isa) for isa in ISA_LEVELS):
        expected = Run(combination, FEW_SIZES, amsgrad=amsgrad).train(path).results
        run = Run(combination, FEW_SIZES, amsgrad=amsgrad).train_functional(path)
        assert_same_bits(run.results, expected, path)
        run.assert_nothing_written_between()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_a_complex_tensor_has_the_bits_of_its_real_view(dtype: torch.dtype, amsgrad: bool) -> None:
    count = 77
    starts = [row.to(dtype) for row in random_numbers(2 * count)[:4]]
    optimized = []
    for as_complex in (False, True):
        real = starts[0].clone()
        param = (torch.view_as_complex(real.view(count, 2)) if as_complex else real).requires_grad_()
        optimizer = adamw_ext.AdamW([param], amsgrad=amsgrad, **HYPER)
        for grad in starts[1:]:
            param.grad = torch.view_as_complex(grad.view(count, 2)) if as_complex else grad
            optimizer.step()
        state = optimizer.state[param]
        tensors = [param, *(value for key, value in state.items() if key != "step")]
        optimized.append([torch.view_as_real(t.detach()).flatten() if as_complex else t.detach() for t in tensors])
    assert_same_bits(optimized[1], optimized[0])


def test_an_unknown_instruction_set_is_refused_with_the_choices() -> None:
    run = Run((torch.float32, torch.float32), [5])
    with pytest.raises(ValueError, match=f"{', '.join(ISA_LEVELS)}.*'sse9'"):
        run.train(Path("sse9"))
