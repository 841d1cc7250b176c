"""Numbers at the edge: NaN and infinity, and hyperparameters of 0. On every path, in every mode."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW
from benchmarks.limits_sizes import check
from tests.helpers import ISA_LEVELS, assert_same_bits
from tests.reference import Textbook, as_float64
from tests.test_bits import Path, stepping_on

BFLOAT16 = torch.bfloat16
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {}),
    "float16": (torch.float16, {}),
    "bfloat16": (BFLOAT16, {}),
    "float32 moments": (BFLOAT16, {"moment_dtype": torch.float32}),
    "fp32 masters": (BFLOAT16, {"master_weights": "fp32"}),
    "split masters": (BFLOAT16, {"master_weights": "split"}),
    "stochastic": (BFLOAT16, {"moment_dtype": BFLOAT16, "stochastic_rounding": True}),
}
TORCHS = ("float64", "float32", "float16", "bfloat16")  # modes that torch has
PATHS = [
    *(Path(isa, threads) for isa in ISA_LEVELS for threads in (1, 2)),
    Path(ISA_LEVELS[-1], 2, capturable=True),
    Path(capturable=True, emulated_arguments=32764),
]
SHARED = 140_001  # elements: more than a step that stays on the calling thread has
Numbers = dict[str, Tensor]  # of the param, its gradient and its moments


def assert_same(found: Numbers, expected: Numbers, what: object) -> None:
    assert_same_bits(list(found.values()), [expected[role] for role in found], what)
    check(found.keys() == expected.keys(), f"{what}: there are {list(found)}")


class Job:
    """One param with its state, set to given numbers, and its optimizer."""

    def __init__(self, mode: str, numbers: Numbers, capturable: bool = False, **hyper: Any) -> None:
        dtype, options = MODES[mode]
        self.param = numbers["param"].to(dtype, copy=True).requires_grad_()
        self.param.grad = numbers["grad"].to(dtype, copy=True)
        self.optimizer = AdamW([self.param], capturable=capturable, **hyper, **options)
        self.optimizer.init_state()
        self.state = self.optimizer.state[self.param]
        for role in numbers.keys() & self.state.keys():
            self.state[role].copy_(numbers[role])

    def tensors(self) -> Numbers:
        return {"param": self.param.detach(), "grad": self.param.grad, **self.state}

    def step(self, path: Path, steps: int = 1) -> "Job":
        with stepping_on(self.optimizer, path):
            for _ in range(steps):
                self.optimizer.step()
        return self


# --- NaN and infinity ------------------------------------------------------------------------------------------------

SPECIAL_HYPERS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1},
    "amsgrad": {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "amsgrad": True},
    "betas 0": {"lr": 1e-2, "betas": (0.0, 0.0), "weight_decay": 0.1},
}
SPECIAL_ROLES = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGERS[tensor.itemsize])


def special_patterns(dtype: torch.dtype) -> Tensor:
    """Signalling and quiet NaNs with payloads, of both signs, and the infinities: as bits."""
    infinity = raw(torch.tensor(torch.inf, dtype=dtype))
    quiet = raw(torch.tensor(torch.nan, dtype=dtype))
    positive = [infinity + 1, quiet - 1, quiet + 5, infinity]
    sign = torch.iinfo(infinity.dtype).min
    patterns = torch.stack([*positive, *(pattern + sign for pattern in positive), infinity * 0 - 1])
    check(int(patterns.view(dtype).isnan().sum()) == len(patterns) - 2, "a pattern is no NaN")
    return patterns


def ordinary_numbers(count: int) -> Numbers:
    generator = torch.Generator().manual_seed(0)
    numbers = {role: torch.randn(count, generator=generator, dtype=torch.float64) for role in SPECIAL_ROLES}
    return {role: n.square() + 0.1 if role.endswith("_sq") else n + 0.1 * n.sign() for role, n in numbers.items()}


def put_specials(tensors: Numbers, spacing: int) -> list[int]:
    """Each pattern into each role, far from each other, at every place in a vector. Returns where."""
    roles = [role for role in SPECIAL_ROLES if role in tensors]
    places = []
    for i, role in enumerate(roles):
        for j, pattern in enumerate(special_patterns(tensors[role].dtype)):
            places.append((i * 9 + j) * spacing + 5)
            raw(tensors[role])[places[-1]] = pattern
    return places


def classes(tensor: Tensor) -> Tensor:
    """0 for a finite number, 1 and -1 for infinities, 2 for NaN."""
    return torch.where(tensor.isnan(), 2, torch.where(tensor.isinf(), tensor.sign(), 0)).to(torch.int8)


def check_specials(mode: str, name: str, paths: Sequence[Path] = PATHS, spacing: int = SHARED // 45 | 1) -> None:
    """Two steps give NaN and infinity where torch's do, the same bits on all paths, and leave the neighbours alone."""
    hyper = SPECIAL_HYPERS[name]
    numbers = ordinary_numbers(45 * spacing)
    clean = Job(mode, numbers, **hyper).step(paths[0], 2)
    jobs = []
    for path in paths:
        jobs.append(Job(mode, numbers, path.capturable, **hyper))
        places = put_specials(jobs[-1].tensors(), spacing)
        grad = raw(jobs[-1].param.grad).clone()
        jobs[-1].step(path, 2)
        assert_same(jobs[-1].tensors(), jobs[0].tensors(), (mode, name, path))
        check(torch.equal(raw(jobs[-1].param.grad), grad), "a gradient was written to")
    elsewhere = torch.ones(45 * spacing, dtype=torch.bool)
    elsewhere[places] = False
    for key, tensor in jobs[0].tensors().items():
        if tensor.dim():
            assert_same_bits([tensor[elsewhere]], [clean.tensors()[key][elsewhere]], f"{mode}, {name}: neighbours")
    check_steps_of_torch(jobs[0], mode, numbers, hyper, spacing)


def check_steps_of_torch(job: Job, mode: str, numbers: Numbers, hyper: dict[str, Any], spacing: int) -> None:
    theirs = numbers["param"].to(job.param.dtype, copy=True).requires_grad_()
    theirs.grad = numbers["grad"].to(theirs.dtype, copy=True)
    optimizer = torch.optim.AdamW([theirs], foreach=False, **hyper)
    state = {role: numbers[role].to(theirs.dtype, copy=True) for role in job.state if role in numbers}
    optimizer.state[theirs] = {"step": torch.zeros(()), **state}
    tensors = {"param": theirs.detach(), "grad": theirs.grad, **state}
    put_specials(tensors, spacing)
    for _ in range(2):
        optimizer.step()
    tensors = {"param": theirs.detach(), **optimizer.state[theirs]}
    for role in ("param", *state):
        ours = job.tensors()[role]
        differ = (classes(ours) != classes(tensors[role])).nonzero().flatten().tolist()
        check(not differ, f"{mode}: {role} at {differ} is {ours[differ]}, torch has {tensors[role][differ]}")
    if mode in ("float64", "float32"):
        for role in ("param", *state):
            torch.testing.assert_close(job.tensors()[role], tensors[role], rtol=2e-6, atol=2e-6, equal_nan=True)


def check_skipped_specials(mode: str, flags: dict[str, bool], path: Path) -> None:
    """Skipped for found_inf, a step changes no bit of anything, payloads of NaNs neither."""
    job = Job(mode, ordinary_numbers(45 * 7), amsgrad=True, **flags)
    job.step(path)
    put_specials(job.tensors(), 7)
    before = [raw(tensor).clone() for tensor in job.tensors().values()]
    job.optimizer.grad_scale = torch.tensor(4.0)
    for found in (1.0, 2.0, torch.nan):
        job.optimizer.found_inf = torch.tensor(found)
        job.step(path)
    for (role, tensor), old in zip(job.tensors().items(), before, strict=True):
        check(torch.equal(raw(tensor), old), f"{mode}, {flags}, {path}: {role} has changed in a skipped step")
    check(job.optimizer.skipped_steps.item() == 3, "a skipped step was not counted")


SKIPPING: list[tuple[dict[str, bool], Path]] = [
    ({"fused": True}, Path(ISA_LEVELS[-1])),
    ({"capturable": True}, Path(ISA_LEVELS[-1], capturable=True)),
    ({"capturable": True}, Path(capturable=True, emulated_arguments=32764)),
]


def nan_and_infinity() -> str:
    for mode, name in itertools.product(MODES, SPECIAL_HYPERS):
        check_specials(mode, name)
    for mode, (flags, path) in itertools.product(MODES, SKIPPING):
        check_skipped_specials(mode, flags, path)
    return (
        f"9 patterns in params, gradients and moments, {len(MODES)} modes, {len(PATHS)} paths: NaN and infinity where "
        "torch's AdamW has them, the neighbours' bits are untouched; a step skipped for found_inf changes no bit"
    )


# --- Hyperparameters of 0 --------------------------------------------------------------------------------------------

ZEROS = [
    {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay, "amsgrad": amsgrad}
    for lr, betas, eps, decay, amsgrad in itertools.product(
        (0.0, 0.25), ((0.0, 0.0), (0.0, 0.9), (0.9, 0.0), (0.9, 0.9)), (0.0, 1e-3), (0.0, 0.5), (False, True)
    )
]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-2, BFLOAT16: 1e-1}  # of numbers around 1


def few_numbers() -> Numbers:
    """Zeros of both signs, and not, of every role: also 0/0 and 1/0, where eps is 0."""
    roles = {
        "param": (0.0, 1.5, -2.0),
        "grad": (0.0, -0.0, 0.5, -3.0),
        "exp_avg": (0.0, 0.25, -0.125),
        "exp_avg_sq": (0.0, 0.0625),
        "max_exp_avg_sq": (0.0, 0.25),
    }
    rows = torch.tensor(list(itertools.product(*roles.values())), dtype=torch.float64)
    return dict(zip(roles, rows.unbind(1), strict=True))


def check_zeros(mode: str, hyper: dict[str, Any], paths: Sequence[Path]) -> int:
    """Two steps against the textbook, and torch's own where it has the mode. Returns how many params became NaN."""
    numbers = few_numbers()
    job, *others = [Job(mode, numbers, path.capturable, **hyper).step(path, 2) for path in paths]
    for path, other in zip(paths[1:], others, strict=True):
        assert_same(other.tensors(), job.tensors(), (mode, hyper, path))
    book = Textbook([numbers["param"]], **hyper)
    book.exp_avgs, book.exp_avg_sqs = [numbers["exp_avg"]], [numbers["exp_avg_sq"]]
    book.max_exp_avg_sqs = [numbers["max_exp_avg_sq"]]
    for _ in range(2):
        book.step([numbers["grad"]])
    pairs = {"param": book.params[0], "exp_avg": book.exp_avgs[0], "exp_avg_sq": book.exp_avg_sqs[0]}
    if hyper["amsgrad"]:
        pairs["max_exp_avg_sq"] = book.max_exp_avg_sqs[0]
    tolerance = TOLERANCES[job.param.dtype]
    for role, expected in pairs.items():
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        found = as_float64(job.tensors()[role])
        torch.testing.assert_close(found, expected, **close, msg=lambda text, r=role: f"{mode}, {hyper}, {r}: {text}")
    if mode in ("float64", "float32"):
        check_zeros_of_torch(job, numbers, hyper)
    return int(job.param.isnan().sum())


def check_zeros_of_torch(job: Job, numbers: Numbers, hyper: dict[str, Any]) -> None:
    theirs = numbers["param"].to(job.param.dtype, copy=True).requires_grad_()
    theirs.grad = numbers["grad"].to(theirs.dtype, copy=True)
    optimizer = torch.optim.AdamW([theirs], foreach=False, **hyper)
    state = {role: numbers[role].to(theirs.dtype, copy=True) for role in job.state if role in numbers}
    optimizer.state[theirs] = {"step": torch.zeros(()), **state}
    for _ in range(2):
        optimizer.step()
    check(torch.equal(classes(job.param), classes(theirs)), f"{hyper}: NaN or infinity is not where torch has it")


def zero_hyperparameters() -> str:
    paths = [path for path in PATHS if path.threads == 1 or path.capturable]
    became_nan = sum(check_zeros(mode, hyper, paths) for mode, hyper in itertools.product(MODES, ZEROS))
    check(became_nan > 0, "no 0/0")
    return (
        f"{len(ZEROS)} combinations of lr, betas, eps and weight_decay of 0 and not, {len(MODES)} modes, {len(paths)} "
        f"paths: as the float64 textbook, NaN (0/0: {became_nan:,} params) and infinity where it has them"
    )
