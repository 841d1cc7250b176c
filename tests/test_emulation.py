"""The CUDA path without a GPU: its kernels, walked over (block, thread) on the host, have the bits of the CPU kernel.

What is emulated is the very text that a GPU runs, and the very code that cuts tensor tables into launches. The expected
bits are those of the CPU kernel that counts steps on the host, which test_update and test_bits prove. Whole buffers are
compared, with the gradients and with what lies between tensors, so a write that strays is seen too.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import COMBINATIONS, assert_same_bits, name_of
from tests.test_bits import (
    FEW_SIZES,
    SIZES,
    STEPS,
    UNITS_PER_CHUNK,
    Combination,
    Path,
    Run,
    random_numbers,
    stepping_on,
)
from tests.test_cuda_parity import HYPER, ROLES, Job

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = (torch.float32, torch.float32)
FLOAT64 = (torch.float64, torch.float64)
BFLOAT16 = (torch.bfloat16, torch.bfloat16)

# Bytes of arguments that a launch may have (csrc/cuda/arguments.h), and both ways to reckon scalars.
SMALL, LARGE = 4096, 32764
EMULATED = [Path(capturable=c, emulated_arguments=a) for c, a in itertools.product((False, True), (SMALL, LARGE))]
PATHS = [Path(), Path(capturable=True), *EMULATED]  # the first is what the others are compared with

# How many of each kind one launch holds. test_sanitized checks these against what the headers say.
SCALARS_BY_VALUE = 8
CAPACITIES = {
    kind: {size: reckon(size) for size in (SMALL, LARGE)}
    for kind, reckon in {
        "entries of float": lambda size: (size - 64 - SCALARS_BY_VALUE * 56) // 56,  # tensors in an update
        "entries of double": lambda size: (size - 64 - SCALARS_BY_VALUE * 96) // 56,
        "uploaded scalars": lambda size: (size - 24) // 160,
        "sources": lambda size: size // 2 // 120,  # groups in a launch of the scalar kernel
        "steps": lambda size: (size - size // 2 - 48) // 16,  # params in one
    }.items()
}


def around(*kinds: str) -> list[int]:
    """One and two full launches of these kinds and of both sizes, and one more or less than that; the most first."""
    capacities = [capacity for kind in kinds for capacity in CAPACITIES[kind].values()]
    return sorted({launches * c + d for c in capacities for launches in (1, 2) for d in (-1, 0, 1)} - {0}, reverse=True)


def train(job: Job, path: Path) -> list[Tensor]:
    with stepping_on(job.optimizer, path):
        return job.train(units_per_chunk=path.units_per_chunk).results


def same_jobs(paths: Sequence[Path], *args: object, **kwargs: object) -> list[tuple[Path, Job]]:
    return [(path, Job(*args, capturable=path.capturable, **kwargs)) for path in paths]  # type: ignore[arg-type]


def step_each(jobs: Sequence[tuple[Path, Job]], what: object) -> None:
    """One step of every job, with the gradients it has, after which all have the bits of the first."""
    results = []
    for path, job in jobs:
        with stepping_on(job.optimizer, path):
            job.optimizer.step()
        results.append(job.results)
        assert_same_bits(results[-1], results[0], (what, path))


def give_gradients(jobs: Sequence[tuple[Path, Job]], given: Callable[[int], bool]) -> None:
    """To the params whose index it likes."""
    for _, job in jobs:
        for i, (param, grad) in enumerate(zip(job.params, job.grads[0], strict=True)):
            param.grad = grad if given(i) else None


# --- The kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_every_way_to_cut_and_launch_has_the_bits_of_the_cpu(combination: Combination, amsgrad: bool) -> None:
    """Tensors of every size up to two units and of some beyond, at every alignment, with steps that lag."""

    def everything(run: Run) -> list[Tensor]:
        return [*(buffer.clone() for buffer in run.buffers), torch.stack(run.steps)]

    expected = everything(Run(combination, SIZES, amsgrad=amsgrad).train(Path()))
    assert expected[0].isfinite().float().mean() > 0.5  # the specials have not taken over
    for capturable in (False, True):
        run = Run(combination, SIZES, amsgrad=amsgrad)
        for arguments, units_per_chunk in itertools.product((SMALL, LARGE), UNITS_PER_CHUNK):
            path = Path("baseline", 1, units_per_chunk, capturable, arguments)
            run.restore()
            assert not torch.equal(run.buffers[0], expected[0])
            assert_same_bits(everything(run.train(path)), expected, path)


HYPERS = [
    {},
    {"betas": (0.3, 0.99), "weight_decay": 0.0, "maximize": True},
    {"lr": 0.0, "betas": (0.0, 0.5)},
    {"lr": 0.3, "eps": 1e-3, "betas": (0.499, 0.0), "weight_decay": 0.7},
    {"betas": (0.5, 0.9999), "eps": 0.0, "maximize": True},
]


class Crowd:
    """One optimizer over every dtype combination, amsgrad and set of hyperparameters: a group for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = []
        groups = []
        for combination, amsgrad, hyper in itertools.product(COMBINATIONS, (False, True), HYPERS):
            run = Run(combination, FEW_SIZES, amsgrad=amsgrad)
            groups.append({"params": run.params, "amsgrad": amsgrad, **HYPER, **hyper})
            self.runs.append(run)
        self.optimizer = adamw_ext.AdamW(groups, capturable=path.capturable)
        for run in self.runs:
            self.optimizer.state.update({param: run.state_of(i) for i, param in enumerate(run.params)})

    def restore(self) -> None:
        for run in self.runs:
            run.restore()

    def train(self, grad_scale: Tensor | None, found_infs: Sequence[Tensor | None]) -> list[Tensor]:
        """A step with each of these; the results of all runs, role by role and dtype by dtype."""
        with stepping_on(self.optimizer, self.path):
            for step, found_inf in enumerate(found_infs):
                for run in self.runs:
                    for param, grad in zip(run.params, run.grads[step % STEPS], strict=True):
                        param.grad = grad
                self.optimizer.grad_scale, self.optimizer.found_inf = grad_scale, found_inf
                self.optimizer.step()
        return self.results

    @property
    def results(self) -> list[Tensor]:
        buffers = [buffer for run in self.runs for buffer in run.buffers]
        by_dtype = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype: None for b in buffers}]
        return [*(torch.cat(same) for same in by_dtype), torch.stack([s for run in self.runs for s in run.steps])]


@pytest.fixture(scope="module")
def crowds() -> list[Crowd]:
    """One for each path, to be restored before use."""
    return [Crowd(path) for path in PATHS]


@pytest.mark.parametrize("scale", [None, 1.0, 1024.0, 1536.7, 3e-39])
def test_groups_of_all_kinds_have_the_bits_of_the_cpu(crowds: list[Crowd], scale: float | None) -> None:
    """In one step; beta1 below 0.5 and maximize among them. Gradients are written back unscaled, with the same bits."""
    grad_scale = None if scale is None else torch.tensor(scale)
    expected: list[Tensor] = []
    for crowd in crowds:
        crowd.restore()
        untouched = crowd.results
        results = crowd.train(grad_scale, [None, torch.tensor(0.0), torch.tensor([-0.0])])
        assert not torch.equal(results[0], untouched[0])
        expected = expected or results
        assert_same_bits(results, expected, crowd.path)


@pytest.mark.parametrize("scale", [0.0, torch.inf, torch.nan, -2.0])
def test_a_scale_that_the_host_would_refuse_has_the_bits_of_the_cpu(crowds: list[Crowd], scale: float) -> None:
    """Where nobody on the host looks at it."""
    expected: list[Tensor] = []
    for crowd in crowds:
        if crowd.path.capturable:
            crowd.restore()
            results = crowd.train(torch.tensor(scale), [None, None])
            expected = expected or results
            assert_same_bits(results, expected, crowd.path)


SKIPS = [1.0, 2.0, torch.nan, -1.0, torch.inf, 1e-45]  # found_inf is a sum over devices


def test_any_found_inf_but_zero_changes_nothing(crowds: list[Crowd]) -> None:
    """Neither params nor moments nor gradients nor step counts, whatever the flag's dtype."""
    flags = [torch.tensor(value) for value in SKIPS]
    flags += [torch.tensor(value, dtype=dtype) for dtype in (torch.float64, torch.bfloat16) for value in SKIPS[:3]]
    flags += [torch.tensor(1e-60, dtype=torch.float64), torch.tensor(2), torch.tensor([True])]
    for crowd in crowds:
        crowd.restore()
        untouched = crowd.results
        assert_same_bits(crowd.train(torch.tensor(8.0), flags), untouched, crowd.path)


def test_steps_after_a_skipped_one_count_on_from_those_before(crowds: list[Crowd]) -> None:
    """The very first step skipped, one in the middle, and two in a row."""
    taken = torch.tensor(0.0)
    schedule = [torch.tensor(2.0), taken, torch.tensor(1.0), taken, torch.tensor(torch.nan), torch.tensor(2.0), taken]
    expected: list[Tensor] = []
    for crowd in crowds:
        crowd.restore()
        results = crowd.train(None, schedule)
        expected = expected or results
        assert_same_bits(results, expected, crowd.path)
        assert results[-1].tolist() == [i % 3 + 3.0 for i in range(len(FEW_SIZES))] * len(crowd.runs)


@pytest.mark.parametrize("path", PATHS[1:], ids=str)
def test_changed_hyperparameters_are_read_at_every_step(path: Path) -> None:
    """Floats, and CPU tensors changed in place: with the bits of steps that the host counts."""

    def schedule(job: Job) -> Iterator[list[Tensor]]:
        lr, beta1 = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.0)
        group = job.optimizer.param_groups[0]
        for step in range(8):
            for param, grad in zip(job.params, job.grads[step % STEPS], strict=True):
                param.grad = grad
            lr.fill_(0.01 / (1 + step))
            beta1.fill_(0.1 * step)
            group["lr"] = lr if step % 2 else lr.item()
            group["betas"] = (beta1 if step % 3 else beta1.item(), 0.9 + 0.01 * step)
            group["weight_decay"], group["eps"] = 0.05 * step, 10.0**-step
            job.optimizer.step()
            yield job.results

    job = Job(BFLOAT16, FEW_SIZES, amsgrad=True, capturable=path.capturable)
    with stepping_on(job.optimizer, path):
        for step, (results, expected) in enumerate(
            zip(schedule(job), schedule(Job(BFLOAT16, FEW_SIZES, amsgrad=True)), strict=True)
        ):
            assert_same_bits(results, expected, step)


# --- Alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_float32_pointers_may_be_misaligned_in_every_combination(amsgrad: bool) -> None:
    """Each of the four or five pointers 0 to 3 elements behind an aligned address, with tails of every length."""
    pointers = [role for role in ROLES if amsgrad or role != "max_exp_avg_sq"]
    pointers = [role for role in pointers if not role.startswith("grad ")] + ["grad"]
    combinations = list(itertools.product(range(4), repeat=len(pointers)))
    offsets = [[c[pointers.index(name)] if name in pointers else 0 for c in combinations] for name in role_names()]
    sizes = [1 + (i * 7 + i // 16) % 17 for i in range(len(combinations))]
    assert_alignments_agree(FLOAT32, sizes, offsets, amsgrad=amsgrad)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_each_pointer_may_be_misaligned_alone_and_all_together(combination: Combination) -> None:
    """0 to 7 elements behind an aligned address, for lengths up to five packets and around a unit's end."""
    lengths = [*range(1, 41), *range(57, 73)]
    names = role_names()
    shifts: list[tuple[int, ...]] = []
    for shift in range(8):
        shifts.append((shift,) * len(names))  # all together
        for pointer in sorted(set(names)):  # all aligned but one; all the same but one
            shifts.append(tuple(shift if name == pointer else 0 for name in names))
            shifts.append(tuple(0 if name == pointer else shift for name in names))
    cases = [(size, shift) for i, shift in enumerate(shifts) for size in lengths[i % 4 :: 4]]
    offsets = [[shift[role] for _, shift in cases] for role in range(len(names))]
    assert_alignments_agree(combination, [size for size, _ in cases], offsets, amsgrad=True)


def role_names() -> list[str]:
    """ROLES by pointer: the gradients of all steps are one."""
    return ["grad" if role.startswith("grad ") else role for role in ROLES]


def assert_alignments_agree(
    combination: Combination, sizes: Sequence[int], offsets: list[list[int]], *, amsgrad: bool
) -> None:
    expected = train(Job(combination, sizes, amsgrad=amsgrad, offsets=offsets), Path())
    for path in (Path(units_per_chunk=1, emulated_arguments=LARGE), Path(capturable=True, emulated_arguments=SMALL)):
        job = Job(combination, sizes, amsgrad=amsgrad, offsets=offsets, capturable=path.capturable)
        assert_same_bits(train(job, path), expected, path)


# --- Launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", [FLOAT32, FLOAT64], ids=name_of)
def test_any_number_of_tensors_around_the_limits_of_a_launch(combination: Combination) -> None:
    """Of the update kernel, and of the scalar kernel, and where the large arguments take over from the small."""
    most = CAPACITIES["steps"][LARGE] + 1
    counts = [count for count in around("entries of float", "entries of double", "steps", "sources") if count <= most]
    jobs = same_jobs([PATHS[0], *EMULATED], combination, [1 + i % 2 for i in range(most)])
    for _, job in jobs:
        for step in job.steps:
            step.zero_()  # so that the first tensors, which take part in all steps, have the same scalars
    for count in counts:
        give_gradients(jobs, lambda i, count=count: i < count)
        step_each(jobs, count)
    assert [jobs[0][1].steps[i].item() for i in (0, most - 1)] == [len(counts), 1]


@pytest.mark.parametrize(("combination", "neighbours"), [(FLOAT32, "alike"), (FLOAT64, "different")], ids=name_of)
def test_any_number_of_group_and_step_pairs_around_the_limits_of_a_launch(
    combination: Combination, neighbours: str
) -> None:
    """Scalars travel by value, or are uploaded. Pairs that come in a row, and pairs that come again and again."""
    hypers = [{**HYPER, **hyper} for hyper in HYPERS[2:]]
    counts = [*range(1, SCALARS_BY_VALUE + 3), *around("uploaded scalars")]
    for places in (15, -(-max(counts) // 3)):  # in each group
        jobs = same_jobs([PATHS[0], *EMULATED], combination, [1 + i % 3 for i in range(3 * places)], hypers=hypers)
        for pairs in (count for count in counts if count <= 3 * places):
            steps = [pairs // 3 + (group < pairs % 3) for group in range(3)]  # how many each group has
            for _, job in jobs:
                for i, step in enumerate(job.steps):
                    place, group_steps = i // 3, max(steps[i % 3], 1)
                    step.fill_(place * group_steps // places if neighbours == "alike" else place % group_steps)
            give_gradients(jobs, lambda i, steps=steps: steps[i % 3] > 0)
            job = jobs[0][1]
            assert len({(i % 3, job.steps[i].item()) for i, p in enumerate(job.params) if p.grad is not None}) == pairs
            step_each(jobs, (places, pairs))


def test_any_number_of_groups_around_the_limits_of_the_scalar_kernel() -> None:
    """Each with hyperparameters of its own, and with two params."""
    counts = around("sources")
    hypers = [{**HYPER, "lr": 0.001 * (1 + i), "maximize": i % 5 == 0} for i in range(counts[0])]
    jobs = same_jobs([PATHS[0], *EMULATED], FLOAT32, [1 + i % 2 for i in range(2 * counts[0])], hypers=hypers)
    for count in counts:
        give_gradients(jobs, lambda i, count=count: i % counts[0] < count)
        step_each(jobs, count)


def test_an_empty_tensor_in_any_slot_changes_nothing() -> None:
    """First, last, and on either side of every boundary between launches; then a launch's worth of them in a row."""
    entries, steps = CAPACITIES["entries of float"][SMALL], CAPACITIES["steps"][SMALL]
    full = [3] * (steps + 2)
    slots = sorted({0, 1, len(full) - 1, *(n + d for n in (entries, 2 * entries, steps) for d in (-1, 0, 1))})
    patterns = [[0 if i == slot else size for i, size in enumerate(full)] for slot in slots]
    patterns += [[0 if i in slots else size for i, size in enumerate(full)], [0] * (entries + 1) + full]
    patterns += [full + [0] * (steps + 1), [0] * len(full)]
    for sizes in patterns:
        expected = train(Job(FLOAT32, sizes), PATHS[0])
        for path, job in same_jobs([path for path in EMULATED if path.emulated_arguments == SMALL], FLOAT32, sizes):
            assert_same_bits(train(job, path), expected, (sizes, path))


def test_empty_tensors_at_the_boundaries_of_large_launches_change_nothing() -> None:
    entries, steps = CAPACITIES["entries of float"][LARGE], CAPACITIES["steps"][LARGE]
    for shift in (-1, 0, 1):
        slots = {0, *(n + shift for n in (CAPACITIES["sources"][SMALL], entries, 2 * entries, steps)), steps + 5}
        sizes = [0 if i in slots else 2 for i in range(steps + 6)]
        expected = train(Job(FLOAT32, sizes), PATHS[0])
        for path, job in same_jobs([path for path in EMULATED if path.emulated_arguments == LARGE], FLOAT32, sizes):
            assert_same_bits(train(job, path), expected, (shift, path))


def test_20321_tensors_are_updated_in_one_step() -> None:
    """More than metadata of fixed size holds: TransformerEngine#3418. The last one is empty."""
    sizes = [i % 5 for i in range(20_320)] + [0]
    param, grad, exp_avg, exp_avg_sq, *_ = random_numbers(sum(sizes)).float()
    start = [param, exp_avg, exp_avg_sq.square(), torch.arange(float(len(sizes))) % 3]
    expected: list[Tensor] = []
    for paths in ([PATHS[0], EMULATED[1]], [EMULATED[3]]):
        buffers = [tensor.clone() for tensor in start]
        params = [view.requires_grad_() for view in buffers[0].split(sizes)]
        optimizer = adamw_ext.AdamW(params, capturable=paths[0].capturable, **HYPER)
        views = [*(buffer.split(sizes) for buffer in buffers[1:3]), buffers[3].unbind()]
        for param, *state in zip(params, *views, strict=True):
            optimizer.state[param] = dict(zip(("exp_avg", "exp_avg_sq", "step"), state, strict=True))
        for param, gradient in zip(params, grad.split(sizes), strict=True):
            param.grad = gradient
        for path in paths:
            for buffer, begin in zip(buffers, start, strict=True):
                buffer.copy_(begin)
            with stepping_on(optimizer, path):
                optimizer.step()
            expected = expected or [buffer.clone() for buffer in buffers]
            assert_same_bits(buffers, expected, path)
    assert torch.equal(expected[-1], start[-1] + 1)
    assert not torch.equal(expected[0][-4:], start[0][-4:])


@pytest.mark.parametrize("path", EMULATED, ids=str)
def test_a_step_of_no_tensors_does_nothing(path: Path) -> None:
    """No param has a gradient, or there is none, or all are empty."""
    job = Job(FLOAT32, FEW_SIZES, capturable=path.capturable)
    untouched = job.results
    with stepping_on(job.optimizer, path):
        job.optimizer.step()
    assert_same_bits(job.results, untouched)

    nothing = adamw_ext.AdamW([{"params": []}], capturable=path.capturable)
    with stepping_on(nothing, path):
        nothing.step()

    empty = Job(FLOAT32, [0, 0], capturable=path.capturable)
    assert train(empty, path)[-1].tolist() == [3.0, 4.0]
