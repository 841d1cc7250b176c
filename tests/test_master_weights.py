"""`master_weights`: the float32 that a bfloat16 or float16 param is the rounded value of, whole or as what it lacks."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_ext import _C, AdamW
from tests.helpers import ISA_LEVELS, assert_same_bits, bits, name_of
from tests.test_bits import Path, stepping_on

pytestmark = pytest.mark.usefixtures("one_thread")

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
KEYS = {"fp32": "master_param", "split": "param_remainder"}
MODES = tuple(KEYS)
KINDS = [(BFLOAT16, "fp32"), (BFLOAT16, "split"), (FLOAT16, "fp32")]  # (param, mode) of all that have a kernel
OTHER = {"fp32": "split", "split": "fp32"}
HYPER: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.05, "betas": (0.9, 0.99)}

# (param, moments, rounding) of every combination with a master.
COMBINATIONS = [
    (getattr(torch, param), getattr(torch, moments), rounding == "stochastic")
    for param, moments, master, rounding in _C.combinations()
    if master == "float32"
]
PATHS = [
    *(Path(isa) for isa in ISA_LEVELS),
    Path(capturable=True),
    *(Path(capturable=c, emulated_arguments=a) for c, a in itertools.product((False, True), (4096, 32764))),
]
FEW_PATHS = [
    Path(ISA_LEVELS[-1]),
    Path(capturable=True),
    Path(emulated_arguments=4096),
    Path(capturable=True, emulated_arguments=32764),
]


def id_of(value: object) -> str:
    if isinstance(value, bool):
        return "stochastic" if value else "nearest"
    return name_of(value) or str(value)


def make_params(dtype: torch.dtype, *, zero: bool = False) -> list[Tensor]:
    """Views of one buffer, each at an odd offset: of a model of two layers, with a scalar and an empty param."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(13, 7), (13,), (1,), (), (3, 13), (3,), (0,)]
    buffer = torch.zeros(300, dtype=dtype)
    params, first = [], 1
    for shape in shapes:
        values = torch.randn(shape, generator=generator)
        view = buffer[first : first + values.numel()].view(shape)
        params.append((view if zero else view.copy_(values)).requires_grad_())
        first += values.numel() + 1 + (values.numel() + 1) % 2
    return params


def loss_of(params: Sequence[Tensor], inputs: Tensor) -> Tensor:
    weight1, bias1, scale, shift, weight2, bias2, nothing = params
    hidden = torch.tanh(inputs @ weight1.T + bias1) * scale + shift
    outputs = (hidden @ weight2.T + bias2).float()
    return (outputs - inputs[:, :3].float().flip(1)).square().mean() + nothing.sum()


class Training:
    """A small model, whose gradients depend on what its params show, and an optimizer over it."""

    def __init__(self, dtype: torch.dtype = BFLOAT16, *, zero: bool = False, **options: Any) -> None:
        self.params = make_params(dtype, zero=zero)
        self.optimizer = AdamW(self.params, **{**HYPER, **options})
        self.generator = torch.Generator().manual_seed(1)

    def differentiate(self) -> None:
        inputs = torch.randn(16, 7, generator=self.generator).to(self.params[0].dtype)
        self.optimizer.zero_grad()
        loss_of(self.params, inputs).backward()

    def step(self) -> list[Tensor]:
        """With the model's gradients."""
        self.differentiate()
        self.optimizer.step()
        return self.results

    def train(self, steps: int) -> list[Tensor]:
        """With random gradients, which take less time."""
        for _ in range(steps):
            give_gradients(self.params, self.generator)
            self.optimizer.step()
        return self.results

    @property
    def shows(self) -> Tensor:
        """The params as one tensor."""
        return torch.cat([param.detach().flatten() for param in self.params])

    @property
    def masters(self) -> list[Tensor]:
        return [master_of(self.optimizer, param) for param in self.params]

    @property
    def results(self) -> list[Tensor]:
        """Params, masters, each moment and steps: each role as one tensor."""
        states = [self.optimizer.state[param] for param in self.params]
        moments = [[s[key] for s in states] for key in states[0] if "exp_avg" in key]
        roles = [self.params, self.masters, *moments, [s["step"] for s in states]]
        return [torch.cat([tensor.detach().flatten() for tensor in role]) for role in roles]

    def checkpoint(self) -> dict[str, Any]:
        """Through a file, as plain tensors and containers."""
        file = io.BytesIO()
        torch.save({"params": [p.detach() for p in self.params], "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    @torch.no_grad()
    def load_params(self, saved: Sequence[Tensor]) -> None:
        for param, value in zip(self.params, saved, strict=True):
            param.copy_(value)

    def resume(self, saved: dict[str, Any], generator: torch.Generator, *, model_first: bool) -> "Training":
        if model_first:
            self.load_params(saved["params"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if not model_first:
            self.load_params(saved["params"])
        self.generator.set_state(generator.get_state())
        return self


def master_of(optimizer: AdamW, param: Tensor) -> Tensor:
    """The float32 that the next update of an unwritten param starts from."""
    mode = next(g.get("master_weights") for g in optimizer.param_groups if any(p is param for p in g["params"]))
    if mode == "split":
        return _C.join_master(param, optimizer.state[param]["param_remainder"])
    return optimizer.state[param]["master_param"].clone() if mode == "fp32" else param.detach().float()


@contextmanager
def stepping(optimizer: AdamW, path: Path) -> Iterator[None]:
    """Steps of an optimizer that has its state go this way, also where it has made some already."""
    optimizer._stepper = None
    with stepping_on(optimizer, path):
        yield


def shown(master: Tensor, dtype: torch.dtype) -> Tensor:
    """What a param of this dtype shows of a master."""
    return _C.split_master(master)[0] if dtype == BFLOAT16 else master.to(dtype)


def assert_params_show_their_masters(optimizer: AdamW) -> None:
    for param, state in optimizer.state.items():
        assert_same_bits([param], [shown(master_of(optimizer, param), param.dtype)])
        assert "master_param" in state or "param_remainder" in state


def give_gradients(params: Sequence[Tensor], generator: torch.Generator) -> None:
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def start_of_next_step(optimizer: AdamW) -> list[Tensor]:
    """The masters that a step starts from: one that takes nothing away, no negative zero either, leaves them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
        if "exp_avg" in optimizer.state[param]:
            optimizer.state[param]["exp_avg"].zero_()
    optimizer.step()
    return [master_of(optimizer, param) for param in params]


# --- The same training, however the master is kept -------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize(("param", "moments", "stochastic"), COMBINATIONS, ids=id_of)
def test_every_way_to_keep_a_master_trains_with_the_same_bits(
    param: torch.dtype, moments: torch.dtype, stochastic: bool, amsgrad: bool
) -> None:
    """Step for step, where each gradient depends on what the step before has shown; and on every path with those."""
    moment_dtype = None if moments == param else moments
    options: dict[str, Any] = {"moment_dtype": moment_dtype, "stochastic_rounding": stochastic, "amsgrad": amsgrad}
    modes = MODES if param == BFLOAT16 else ("fp32",)
    run, *others = (Training(param, master_weights=mode, **options) for mode in modes)
    untouched = [p.detach().clone() for p in run.params]
    grads, shows = [], []
    for step in range(50):
        expected = run.step()
        for other in others:
            assert_same_bits(other.step(), expected, step)
        grads.append([p.grad for p in run.params])
        shows.append(run.shows)
    assert all(not torch.equal(p, u) for p, u in zip(run.params, untouched, strict=True) if p.numel())
    assert (expected[0].float() != expected[1]).float().mean() > 0.9  # the master is more than the param
    assert expected[-1].tolist() == [50.0] * len(run.params)
    assert {run.optimizer.state[p]["exp_avg"].dtype for p in run.params} == {moments}
    for mode, path in itertools.product(modes, PATHS):
        replay = Training(param, master_weights=mode, capturable=path.capturable, **options)
        replay.optimizer.init_state()
        with stepping(replay.optimizer, path):
            for step, (given, show) in enumerate(zip(grads, shows, strict=True)):
                for p, grad in zip(replay.params, given, strict=True):
                    p.grad = grad
                replay.optimizer.step()
                assert_same_bits([replay.shows], [show], (mode, path, step))
        assert_same_bits(replay.results, expected, (mode, path))


@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_the_master_walks_as_a_float32_param_with_the_same_gradients_and_the_param_shows_it(
    dtype: torch.dtype, mode: str, amsgrad: bool
) -> None:
    params = make_params(dtype)
    optimizer = AdamW(params, **HYPER, amsgrad=amsgrad, master_weights=mode, moment_dtype=FLOAT32)
    wide = [param.detach().float().requires_grad_() for param in params]
    wide_optimizer = AdamW(wide, **HYPER, amsgrad=amsgrad)
    generator = torch.Generator().manual_seed(2)
    for step in range(60):
        give_gradients(params, generator)
        for param, wide_param in zip(params, wide, strict=True):
            wide_param.grad = param.grad.float()
        optimizer.step()
        wide_optimizer.step()
        assert_same_bits([master_of(optimizer, param) for param in params], wide, step)
        assert_params_show_their_masters(optimizer)
        for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
            found, expected = ([o.state[p][key] for p in ps] for o, ps in ((optimizer, params), (wide_optimizer, wide)))
            assert_same_bits(found, expected, (step, key))


@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_steps_too_small_to_be_seen_add_up(dtype: torch.dtype, mode: str) -> None:
    """A decay of 1e-4, which is less than half a unit in the last place of 1."""
    runs = {}
    for master_weights in (mode, None):
        param = torch.ones(8, dtype=dtype, requires_grad=True)
        optimizer = AdamW([param], lr=1e-2, weight_decay=1e-2, master_weights=master_weights)
        for _ in range(1000):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        runs[master_weights] = param.detach().float()
    torch.testing.assert_close(runs[mode], torch.full((8,), (1 - 1e-4) ** 1000), rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(runs[None], torch.ones(8))


def test_a_master_beyond_float16_shows_as_infinity_and_comes_back() -> None:
    param = torch.tensor([65504.0, -65504.0, 1.0], dtype=FLOAT16, requires_grad=True)
    optimizer = AdamW([param], lr=100.0, weight_decay=0.0, master_weights="fp32", moment_dtype=FLOAT32)
    for sign in (-1, 1, 1, 1, 1, 1):
        param.grad = (sign * param.detach().sign()).half()
        optimizer.step()
        if sign < 0:
            assert param[:2].tolist() == [torch.inf, -torch.inf]
            assert optimizer.state[param]["master_param"][:2].abs().tolist() == [65604.0, 65604.0]
    assert param.isfinite().all()
    assert 6e4 < param[0].item() == -param[1].item() < 65504


@pytest.mark.parametrize("mode", MODES)
def test_threads_and_chunks_do_not_change_bits(mode: str) -> None:
    """Of a tensor long enough to be shared among threads."""
    generator = torch.Generator().manual_seed(3)
    start, *grads = (torch.randn(150_001, generator=generator).bfloat16() for _ in range(3))
    expected: list[Tensor] = []
    for isa, threads, units in [("baseline", 1, 0), *itertools.product(ISA_LEVELS, (1, 2), (0, 7))]:
        param = start.clone().requires_grad_()
        optimizer = AdamW([param], **HYPER, master_weights=mode)
        optimizer.init_state()
        with stepping(optimizer, Path(isa, threads, units)):
            for grad in grads:
                param.grad = grad
                optimizer.step()
        results = [param.detach(), *(optimizer.state[param][key] for key in (KEYS[mode], "exp_avg", "exp_avg_sq"))]
        expected = expected or results
        assert_same_bits(results, expected, (isa, threads, units))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_a_gradient_of_another_dtype_has_the_bits_of_its_numbers(dtype: torch.dtype, mode: str) -> None:
    expected: list[Tensor] = []
    for grad_dtype, emulated in itertools.product((dtype, FLOAT32, FLOAT16, BFLOAT16), (0, 4096)):
        training = Training(dtype, master_weights=mode)
        training.optimizer.init_state()
        generator = torch.Generator().manual_seed(4)
        with stepping(training.optimizer, Path(emulated_arguments=emulated)):
            for _ in range(3):
                for param in training.params:
                    grad = torch.randint(-8, 9, param.shape, generator=generator)
                    param.grad_dtype = grad_dtype
                    param.grad = grad.to(grad_dtype)
                training.optimizer.step()
        expected = expected or training.results
        assert_same_bits(training.results, expected, (grad_dtype, emulated))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_a_skipped_step_changes_no_master_and_scaling_changes_no_bit(dtype: torch.dtype, mode: str, path: Path) -> None:
    plain = Training(dtype, master_weights=mode)
    scaled = Training(dtype, master_weights=mode, capturable=path.capturable)
    for _ in range(3):
        expected = plain.step()
    scaled.optimizer.init_state()
    with stepping(scaled.optimizer, path):
        for skip in (2.0, 0.0, 1.0, torch.nan, 0.0, 0.0):
            before, random = scaled.results, scaled.generator.get_state()
            scaled.differentiate()
            for param in scaled.params:
                param.grad *= 8  # exact
            scaled.optimizer.grad_scale, scaled.optimizer.found_inf = torch.tensor(8.0), torch.tensor(skip)
            scaled.optimizer.step()
            if skip != 0.0:
                assert_same_bits(scaled.results, before, skip)
                scaled.generator.set_state(random)
    assert_same_bits(scaled.results, expected)


# --- Params that others write to -------------------------------------------------------------------------------------


# Each takes (param, numbers of its shape and dtype).
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda param, numbers: param.copy_(numbers),
    "data.copy_": lambda param, numbers: param.data.copy_(numbers),
    "data =": lambda param, numbers: setattr(param, "data", numbers.clone()),
    "zero_": lambda param, numbers: param.zero_(),
    "negative zero": lambda param, numbers: param.fill_(-0.0),
    "clamp_": lambda param, numbers: param.clamp_(-0.25, 0.25),
    "neg_": lambda param, numbers: param.neg_(),
    "mul_": lambda param, numbers: param.mul_(3.0),
    "one bit": lambda param, numbers: param.view(torch.int16).bitwise_xor_(1),
    "fill_(inf)": lambda param, numbers: param.fill_(torch.inf),
    "fill_(-inf)": lambda param, numbers: param.fill_(-torch.inf),
    "some": lambda param, numbers: param.view(-1)[::3].copy_(numbers.view(-1)[::3]),
}


def write(training: Training, kind: str, generator: torch.Generator) -> None:
    with torch.no_grad():
        for param in training.params:
            numbers = (torch.randn(param.shape, generator=generator) * 3).to(param.dtype)
            WRITES[kind](param, numbers)


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_the_next_step_starts_from_what_was_written(dtype: torch.dtype, mode: str, kind: str) -> None:
    """float16: from exactly that; bfloat16: from a number that rounds to that, hence within half a unit of it."""
    for path in FEW_PATHS:
        training = Training(dtype, master_weights=mode, capturable=path.capturable)
        training.train(4)
        before = training.masters
        with stepping(training.optimizer, path):
            write(training, kind, torch.Generator().manual_seed(5))
            written = [param.detach().clone() for param in training.params]
            starts = start_of_next_step(training.optimizer)
        assert_same_bits([param.detach() for param in training.params], written, path)
        for start, value, master in zip(starts, written, before, strict=True):
            assert not start.isnan().any()
            was_written = bits(value) != bits(shown(master, dtype))
            if dtype == FLOAT16:
                assert_same_bits([start[was_written]], [value[was_written].float()])
            assert_same_bits([shown(start, dtype)], [value])
            assert_same_bits([start[~was_written]], [master[~was_written]])


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_both_modes_keep_the_same_bits_when_params_are_written_to(path: Path) -> None:
    """In the middle of training, by every kind of writing in turn, also of infinities, which stay."""
    trainings = [Training(master_weights=mode, capturable=path.capturable) for mode in MODES]
    for training in trainings:
        training.optimizer.init_state()
    for round_, kind in enumerate([*WRITES, *reversed(WRITES)]):
        for training in trainings:
            generator = torch.Generator().manual_seed(100 + round_)
            write(training, kind, generator)
            with stepping(training.optimizer, path):
                for _ in range(3):
                    give_gradients(training.params, generator)
                    training.optimizer.step()
            assert_params_show_their_masters(training.optimizer)
        assert_same_bits(trainings[1].results, trainings[0].results, kind)


def masters_and_neighbours() -> Iterator[tuple[Tensor, Tensor]]:
    """Every high half with the low halves that matter, and what the param beside it is made to show: the bfloat16 below
    and above, the same, and some far ones."""
    high = torch.arange(0x0080, 0x7F00, dtype=torch.int32)
    high = torch.cat([high, high | -0x8000])
    for low, distance in itertools.product((0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF), (-1, 0, 1, 2, -0x40)):
        yield (high << 16 | low).view(FLOAT32), (high + distance).short().view(BFLOAT16)


@pytest.mark.parametrize("path", [Path(), Path(emulated_arguments=4096)], ids=str)
def test_both_modes_start_from_the_same_bits_whatever_is_written_beside_a_master(path: Path) -> None:
    """Neighbours of what a master shows, too: also where the master is a tie, which half to even shows otherwise."""
    params: dict[str, list[Tensor]] = {mode: [] for mode in MODES}
    optimizers = {}
    cases = list(masters_and_neighbours())
    for mode in MODES:
        params[mode] = [_C.split_master(master)[0].requires_grad_() for master, _ in cases]
        optimizers[mode] = AdamW(params[mode], lr=0.0, weight_decay=0.0, master_weights=mode)
        optimizers[mode].init_state()
        for param, (master, written) in zip(params[mode], cases, strict=True):
            optimizers[mode].state[param][KEYS[mode]].copy_(master if mode == "fp32" else _C.split_master(master)[1])
            param.data.copy_(written)
        with stepping(optimizers[mode], path):
            for param in params[mode]:
                param.grad = torch.zeros_like(param)
            optimizers[mode].step()
    for i, (master, written) in enumerate(cases):
        starts = [master_of(optimizers[mode], params[mode][i]) for mode in MODES]
        what = f"low half {master.view(torch.int32)[0].item() & 0xFFFF:#x}, case {i}"
        assert_same_bits([params[mode][i] for mode in MODES], [written, written], what)
        assert_same_bits(starts[1:], starts[:1], what)


@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
@pytest.mark.parametrize("when", ["before state exists", "after init_state", "after steps"])
def test_a_model_loaded_after_the_optimizer_was_built_is_what_trains(dtype: torch.dtype, mode: str, when: str) -> None:
    module = torch.nn.Linear(7, 5).to(dtype)
    saved = torch.nn.Linear(7, 5).to(dtype).state_dict()
    optimizer = AdamW(module.parameters(), master_weights=mode)
    if when == "after init_state":
        optimizer.init_state()
    if when == "after steps":
        for _ in range(3):
            give_gradients(list(module.parameters()), torch.Generator().manual_seed(6))
            optimizer.step()
    module.load_state_dict(saved)
    starts = start_of_next_step(optimizer)
    assert_same_bits([shown(start, dtype) for start in starts], list(saved.values()))
    assert_same_bits(list(module.parameters()), list(saved.values()))
    if when != "after steps" or dtype == FLOAT16:
        assert_same_bits(starts, [value.float() for value in saved.values()])


# --- What has a master, and what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_wider_params_are_their_own_masters_and_have_no_more_state(mode: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.complex64):
        runs = []
        for master_weights in (mode, None):
            param = torch.linspace(-1, 1, 9).to(dtype).requires_grad_()
            optimizer = AdamW([param], **HYPER, master_weights=master_weights)
            for _ in range(3):
                param.grad = param.detach() * 3 + 1
                optimizer.step()
            assert optimizer.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}
            runs.append([param, *optimizer.state[param].values()])
        assert_same_bits(*runs)


def test_every_group_may_have_its_own() -> None:
    params = [torch.ones(3, dtype=dtype, requires_grad=True) for dtype in (BFLOAT16, FLOAT16, BFLOAT16, FLOAT32)]
    optimizer = AdamW(
        [
            {"params": params[:1], "master_weights": "split"},
            {"params": params[1:2]},
            {"params": params[2:3], "master_weights": None},
        ],
        master_weights="fp32",
    )
    optimizer.add_param_group({"params": params[3:]})
    assert [group["master_weights"] for group in optimizer.param_groups] == ["split", "fp32", None, "fp32"]
    give_gradients(params, torch.Generator())
    optimizer.step()
    found = [[key for key in KEYS.values() if key in optimizer.state[param]] for param in params]
    assert found == [["param_remainder"], ["master_param"], [], []]
    assert optimizer.state[params[0]]["param_remainder"].dtype == torch.int16
    assert optimizer.state[params[1]]["master_param"].dtype == torch.float32


@pytest.mark.parametrize(("mode", "expected"), [(None, 0), ("fp32", 4), ("split", 2)])
def test_masters_take_the_bytes_that_they_are_said_to_take(mode: str | None, expected: int) -> None:
    param = torch.nn.Parameter(torch.ones(1000, dtype=BFLOAT16))
    optimizer = AdamW([param], master_weights=mode)
    optimizer.init_state()
    tensors = [value for key, value in optimizer.state[param].items() if key != "step"]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 1000 * (2 + 2 + expected)


@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_init_state_makes_masters_of_the_params_values_and_changes_no_later_step(dtype: torch.dtype, mode: str) -> None:
    training, expected = (Training(dtype, master_weights=mode) for _ in range(2))
    training.optimizer.init_state()
    for param in training.params:
        master = training.optimizer.state[param][KEYS[mode]]
        assert (master.shape, master.requires_grad) == (param.shape, False)
        assert_same_bits([master_of(training.optimizer, param)], [param.float()])
    assert_same_bits(training.train(3), expected.train(3))


@pytest.mark.parametrize(
    ("dtype", "mode"), [(FLOAT16, "split"), (torch.complex32, "fp32"), (torch.complex32, "split")], ids=id_of
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_param_that_can_have_no_such_master_is_refused_by_name(dtype: torch.dtype, mode: str) -> None:
    good, bad = torch.ones(3, dtype=BFLOAT16, requires_grad=True), torch.ones(3, dtype=dtype, requires_grad=True)
    optimizer = AdamW([good, bad], master_weights=mode)
    for param in (good, bad):
        param.grad = torch.ones_like(param)
    message = f"master_weights='{mode}' has no kernel for a {dtype} param on cpu"
    for refused in (optimizer.step, optimizer.step, optimizer.init_state):
        optimizer.state.clear()
        with pytest.raises(ValueError, match=message):
            refused()
        assert bad not in optimizer.state
        assert torch.equal(good, torch.ones(3, dtype=BFLOAT16))
    source = AdamW([torch.ones_like(good, requires_grad=True), torch.ones_like(bad, requires_grad=True)])
    source.init_state()
    optimizer.state.clear()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=id_of)
@pytest.mark.parametrize("mode", MODES)
def test_a_group_that_torch_updates_is_refused_and_nothing_changes(mode: str, dtype: torch.dtype) -> None:
    kernel, differentiable = (torch.ones(3, dtype=dtype, requires_grad=True) for _ in range(2))
    optimizer = AdamW([{"params": [kernel]}, {"params": [differentiable], "differentiable": True}], master_weights=mode)
    for param in (kernel, differentiable):
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"master_weights='{mode}'.*param \(group 1, index 0\).*by torch"):
            optimizer.step()
        assert not optimizer.state
        assert all(torch.equal(param, torch.ones(3, dtype=dtype)) for param in (kernel, differentiable))


@pytest.mark.parametrize("value", ["bf16", "", "FP32", 1, True, False, torch.float32, ("fp32",), ["split"]], ids=str)
def test_other_values_are_refused(value: Any) -> None:
    param = torch.ones(3, dtype=BFLOAT16, requires_grad=True)
    with pytest.raises(ValueError, match=r"master_weights must be 'fp32', 'split' or None, but is"):
        AdamW([param], master_weights=value)
    with pytest.raises(ValueError, match=r"master_weights must be 'fp32', 'split' or None, but is .* in param group 0"):
        AdamW([{"params": [param], "master_weights": value}])
    optimizer = AdamW([param])
    with pytest.raises(ValueError, match=r"master_weights must be .* in param group 1"):
        optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)], "master_weights": value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", ["bf16", 1, torch.float32, ["split"]], ids=str)
def test_a_value_that_a_group_is_given_later_is_refused_by_name_and_nothing_changes(mode: str, value: Any) -> None:
    training = Training(master_weights=mode)
    before = training.train(2)
    training.optimizer.param_groups[0]["master_weights"] = value
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="master_weights must be"):
            training.optimizer.step()
    training.optimizer.param_groups[0]["master_weights"] = mode
    assert_same_bits(training.results, before)
    training.optimizer.step()


EDITS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "float64": (lambda master: master.double(), "must have dtype"),
    "float16": (lambda master: master.half(), "must have dtype"),
    "int32": (lambda master: master.int(), "must have dtype"),
    "int64": (lambda master: master.long(), "must have dtype"),
    "another shape": (lambda master: torch.zeros(2, 3, dtype=master.dtype), r"must have sizes \[5\]"),
    "longer": (lambda master: torch.zeros(6, dtype=master.dtype), r"must have sizes \[5\]"),
    "empty": (lambda master: master[:0], r"must have sizes \[5\]"),
    "meta": (lambda master: master.to("meta"), "must be a strided tensor on cpu"),
    "sparse": (lambda master: master.to_sparse(), "must be a strided tensor on cpu"),
    "freed": (lambda master: freed(master), "its storage holds 0 bytes"),
    "a number": (lambda master: 1.0, "must be a tensor, but is 1.0"),
    "a list": (lambda master: master.tolist(), "must be a tensor, but is"),
}


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def two_params(mode: str) -> tuple[list[Tensor], AdamW]:
    params = [torch.linspace(-1, 1, 5).to(BFLOAT16).requires_grad_() for _ in range(2)]
    optimizer = AdamW(params, master_weights=mode, lr=1e-2)
    for _ in range(3):
        give_gradients(params, torch.Generator().manual_seed(7))
        optimizer.step()
    return params, optimizer


def all_of(params: Sequence[Tensor], optimizer: AdamW) -> list[Tensor]:
    state = [value for p in params for key, value in optimizer.state[p].items() if key not in KEYS.values()]
    return [tensor.detach().clone() for tensor in (*params, *state)]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", MODES)
def test_a_master_that_does_not_fit_is_refused_and_nothing_changes(mode: str, edit: str) -> None:
    change, message = EDITS[edit]
    params, optimizer = two_params(mode)
    right = optimizer.state[params[1]][KEYS[mode]]
    before, masters = all_of(params, optimizer), [master_of(optimizer, param) for param in params]
    wrong = optimizer.state[params[1]][KEYS[mode]] = change(right)
    for _ in range(2):
        with pytest.raises(
            (RuntimeError, TypeError), match=rf"state '{KEYS[mode]}' of param \(group 0, index 1\).*{message}"
        ):
            optimizer.step()
        assert_same_bits(all_of(params, optimizer), before)
        assert optimizer.state[params[1]][KEYS[mode]] is wrong
        assert_same_bits([master_of(optimizer, params[0])], masters[:1])
    optimizer.state[params[1]][KEYS[mode]] = right
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [4.0, 4.0]


@pytest.mark.parametrize("mode", MODES)
def test_masters_that_share_memory_are_refused(mode: str) -> None:
    params, optimizer = two_params(mode)
    optimizer.state[params[1]][KEYS[mode]] = optimizer.state[params[0]][KEYS[mode]].view(-1)
    before = all_of(params, optimizer)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert_same_bits(all_of(params, optimizer), before)


@pytest.mark.parametrize("call", ["step", "init_state"])
@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "None"])
@pytest.mark.parametrize("mode", MODES)
def test_a_master_that_is_taken_away_is_made_again_of_the_params_value(mode: str, deleted: bool, call: str) -> None:
    params, optimizer = two_params(mode)
    other = master_of(optimizer, params[0])
    value = params[1].detach().clone()
    if deleted:
        del optimizer.state[params[1]][KEYS[mode]]
    else:
        optimizer.state[params[1]][KEYS[mode]] = None
    if call == "init_state":
        optimizer.init_state()
        starts = [master_of(optimizer, param) for param in params]
    else:
        starts = start_of_next_step(optimizer)
    assert_same_bits(starts, [other, value.float()])


@pytest.mark.parametrize("mode", MODES)
def test_a_master_of_other_strides_is_laid_out_as_its_param(mode: str) -> None:
    expected, training = Training(master_weights=mode), Training(master_weights=mode)
    expected.train(2)
    training.train(2)
    state = training.optimizer.state[training.params[0]]
    state[KEYS[mode]] = state[KEYS[mode]].t().contiguous().t()
    assert_same_bits(training.train(2), expected.train(2))
    assert state[KEYS[mode]].stride() == training.params[0].stride()


# --- State dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("start", ["fresh", "zero", "warm"])
@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    dtype: torch.dtype, mode: str, start: str, model_first: bool
) -> None:
    """Through a file; into params of other values, with state or without, loaded before or after the optimizer."""
    for capturable, moments in itertools.product((False, True), (None, BFLOAT16, FLOAT32)):
        options: dict[str, Any] = {"master_weights": mode, "moment_dtype": moments, "capturable": capturable}
        run = Training(dtype, **options)
        run.train(5)
        resumed = Training(dtype, zero=start == "zero", **options)
        if start == "warm":
            resumed.train(2)
        resumed.resume(run.checkpoint(), run.generator, model_first=model_first)
        assert_same_bits(resumed.results, run.results)
        assert_same_bits(resumed.train(5), run.train(5), options)


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("start", ["fresh", "zero", "warm"])
@pytest.mark.parametrize("mode", MODES)
def test_the_masters_of_either_mode_load_into_the_other_exactly(mode: str, start: str, model_first: bool) -> None:
    run = Training(master_weights=mode)
    run.train(5)
    resumed = Training(zero=start == "zero", master_weights=OTHER[mode])
    if start == "warm":
        resumed.train(2)
    resumed.resume(run.checkpoint(), run.generator, model_first=model_first)
    assert resumed.optimizer.param_groups[0]["master_weights"] == OTHER[mode]
    for param in resumed.params:
        assert KEYS[OTHER[mode]] in resumed.optimizer.state[param]
        assert KEYS[mode] not in resumed.optimizer.state[param]
    assert_same_bits(resumed.train(5), run.train(5))
    back = Training(zero=True, master_weights=mode)
    back.resume(resumed.checkpoint(), run.generator, model_first=model_first)
    assert_same_bits(back.train(5), run.train(5))


@pytest.mark.parametrize("mode", MODES)
def test_sampled_masters_survive_the_way_into_the_other_mode_and_back(mode: str) -> None:
    """Every high half with the low halves that matter: ties, zeros, subnormals, infinities."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    masters = torch.cat([(high | low).view(FLOAT32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    masters = masters[~masters.isnan()]
    shows, remainder = _C.split_master(masters)
    values = {"fp32": masters, "split": remainder}
    for zero, model_first in itertools.product((False, True), repeat=2):
        source, middle, end = (
            AdamW([torch.zeros(len(masters), dtype=BFLOAT16, requires_grad=True)], lr=0.0, master_weights=m)
            for m in (mode, OTHER[mode], mode)
        )
        source.init_state()
        source.state[source.param_groups[0]["params"][0]][KEYS[mode]].copy_(values[mode])
        source.param_groups[0]["params"][0].data.copy_(shows)
        for start, into in ((source, middle), (middle, end)):
            param = into.param_groups[0]["params"][0]
            with torch.no_grad():
                if not zero:
                    param.copy_(shows.roll(1))
                if model_first:
                    param.copy_(shows)
                into.load_state_dict(copy.deepcopy(start.state_dict()))
                param.copy_(shows)
            assert_same_bits(start_of_next_step(into), [masters], (zero, model_first))
            assert_same_bits([param], [shows])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("written", [0.0, -0.0, torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("how", ["load", "group"])
def test_what_was_written_beside_a_master_survives_the_way_into_the_other_mode(
    mode: str, written: float, how: str
) -> None:
    """As the mode that is left would have gone on from it."""
    lows = torch.tensor([0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    masters = (0x3F800000 | lows).view(FLOAT32)
    optimizers = []
    for _ in range(2):
        param = _C.split_master(masters)[0].requires_grad_()
        optimizer = AdamW([param], lr=0.0, master_weights=mode)
        optimizer.init_state()
        state = optimizer.state[param]
        state[KEYS[mode]].copy_(masters if mode == "fp32" else _C.split_master(masters)[1])
        param.data.fill_(written)
        optimizers.append(optimizer)
    expected = start_of_next_step(optimizers[0])
    if how == "group":
        changed = optimizers[1]
        changed.param_groups[0]["master_weights"] = OTHER[mode]
    else:
        param = torch.full((len(lows),), written, dtype=BFLOAT16, requires_grad=True)
        changed = AdamW([param], lr=0.0, master_weights=OTHER[mode])
        changed.load_state_dict(optimizers[1].state_dict())
    assert_same_bits(start_of_next_step(changed), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_param_that_shows_its_master_rounded_half_to_even_goes_on_from_the_master(mode: str) -> None:
    """Others keep float32 masters so. Both values are equally near; "split" can only show the one away from zero."""
    masters = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001], dtype=torch.int32).view(FLOAT32)
    source = AdamW([masters.bfloat16().requires_grad_()], master_weights="fp32")
    source.init_state()
    source.state[source.param_groups[0]["params"][0]]["master_param"].copy_(masters)
    param = masters.bfloat16().requires_grad_()
    target = AdamW([param], master_weights=mode)
    target.load_state_dict(source.state_dict())
    assert_same_bits(start_of_next_step(target), [masters])
    assert param.view(torch.int16).tolist() == [0x3F81, 0x3F82, 0x3F81]


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_masters_are_not_loaded_into_a_group_without_them(dtype: torch.dtype, mode: str, warm: bool) -> None:
    saved = Training(dtype, master_weights=mode)
    saved.train(2)
    target = Training(dtype)
    if warm:
        target.train(1)
    before = [p.detach().clone() for p in target.params], copy.deepcopy(target.optimizer.state_dict())
    with pytest.raises(
        ValueError, match=rf"loaded state '{KEYS[mode]}' of param \(group 0, index 0\).*master_weights.*None"
    ):
        target.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert_same_bits([p.detach() for p in target.params], before[0])
    after = target.optimizer.state_dict()
    assert after["param_groups"] == before[1]["param_groups"]
    for index, state in before[1]["state"].items():
        assert_same_bits(list(after["state"][index].values()), list(state.values()))
    assert len(after["state"]) == len(before[1]["state"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edit", ["float64", "int64", "another shape", "meta", "sparse", "a number", "a list"])
def test_a_loaded_master_that_does_not_fit_is_refused_and_nothing_changes(mode: str, edit: str) -> None:
    params, optimizer = two_params(mode)
    before, masters = all_of(params, optimizer), [master_of(optimizer, param) for param in params]
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][KEYS[mode]] = EDITS[edit][0](saved["state"][1][KEYS[mode]])
    saved["state"][0]["exp_avg"].zero_()
    with pytest.raises(ValueError, match=rf"loaded state '{KEYS[mode]}' of param \(group 0, index 1\) must be a torch"):
        optimizer.load_state_dict(saved)
    assert_same_bits(all_of(params, optimizer), before)
    assert_same_bits([master_of(optimizer, param) for param in params], masters)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_torchs_state_dict_loads_and_the_masters_start_as_the_params(dtype: torch.dtype, mode: str, warm: bool) -> None:
    params = make_params(dtype)
    source = torch.optim.AdamW(params, **HYPER)
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        give_gradients(params, generator)
        source.step()
    training = Training(dtype, zero=True, master_weights=mode)
    if warm:
        training.train(2)
    training.optimizer.load_state_dict(source.state_dict())
    training.load_params([param.detach() for param in params])
    give_gradients(training.params, generator)
    wide = [param.detach().float().requires_grad_() for param in params]
    expected = AdamW(wide, **HYPER)
    expected.load_state_dict(source.state_dict())
    for param, wide_param in zip(training.params, wide, strict=True):
        wide_param.grad = param.grad.float()
    training.optimizer.step()
    expected.step()
    assert_same_bits(training.masters, wide)
    assert training.results[-1].tolist() == [4.0] * len(params)
    assert_params_show_their_masters(training.optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_loading_keeps_the_addresses_of_masters_and_shares_no_memory_with_the_dict(mode: str) -> None:
    for other in MODES:
        source, target = Training(master_weights=other), Training(master_weights=mode)
        source.train(3)
        target.train(1)
        masters = [target.optimizer.state[param][KEYS[mode]] for param in target.params]
        saved = source.optimizer.state_dict()
        target.optimizer.load_state_dict(saved)
        assert all(target.optimizer.state[p][KEYS[mode]] is m for p, m in zip(target.params, masters, strict=True))
        fresh = Training(master_weights=mode)
        fresh.optimizer.load_state_dict(saved)
        theirs = {source.optimizer.state[p][KEYS[other]].data_ptr() for p in source.params if p.numel()}
        for param in fresh.params:
            assert fresh.optimizer.state[param][KEYS[mode]].data_ptr() not in theirs


def test_loading_keeps_the_constructors_way_to_keep_masters() -> None:
    for ours, theirs in itertools.product((*MODES, None), repeat=2):
        source = AdamW([torch.ones(3, requires_grad=True)], master_weights=theirs)  # float32: no master in the dict
        target = AdamW([torch.ones(3, requires_grad=True)], master_weights=ours)
        target.load_state_dict(source.state_dict())
        assert target.param_groups[0].get("master_weights") == ours


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda training: pickle.loads(pickle.dumps(training))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_a_copy_continues_bit_for_bit(dtype: torch.dtype, mode: str, duplicate: Callable[[AdamW], AdamW]) -> None:
    training = Training(dtype, master_weights=mode)
    training.train(3)
    twin = duplicate(training.optimizer)
    params = twin.param_groups[0]["params"]
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    for _ in range(3):
        for owned, optimizer, generator in zip(
            (training.params, params), (training.optimizer, twin), generators, strict=True
        ):
            give_gradients(owned, generator)
            optimizer.step()
    assert_same_bits(params, training.params)
    assert_same_bits([master_of(twin, param) for param in params], training.masters)
    twin.add_param_group({"params": [torch.ones(3, dtype=dtype, requires_grad=True)]})
    twin.init_state()
    assert KEYS[mode] in twin.state[twin.param_groups[1]["params"][0]]


# --- Another mode between steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS[-5:], ids=str)
@pytest.mark.parametrize("modes", [("fp32", "split"), ("split", "fp32"), ("fp32", "split", "fp32", "split")], ids=str)
def test_the_other_mode_between_steps_changes_no_bit(modes: Sequence[str], path: Path) -> None:
    unchanged = Training(master_weights=modes[0])
    changed = Training(master_weights=modes[0], capturable=path.capturable)
    for i, mode in enumerate(modes):
        changed.optimizer.param_groups[0]["master_weights"] = mode
        changed.optimizer.init_state()
        with stepping(changed.optimizer, path):
            for _ in range(4):
                results, expected = changed.step(), unchanged.step()
                assert_same_bits(results[:1], expected[:1], (i, mode))
        kept = [KEYS[mode] in changed.optimizer.state[param] for param in changed.params]
        assert all(kept), mode


@pytest.mark.parametrize("modes", [("fp32", "split"), ("split", "fp32")], ids=str)
def test_a_master_in_another_form_is_not_kept_beside_the_present_one(modes: Sequence[str]) -> None:
    """It would be out of date, take memory, and go into checkpoints."""
    training = Training(master_weights=modes[0])
    training.train(3)
    training.optimizer.param_groups[0]["master_weights"] = modes[1]
    training.train(3)
    for param in training.params:
        held = [key for key in KEYS.values() if key in training.optimizer.state[param]]
        assert held == [KEYS[modes[1]]]


@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_a_group_that_gets_masters_between_steps_starts_them_as_the_params_and_may_lose_them(
    dtype: torch.dtype, mode: str
) -> None:
    training = Training(dtype)
    training.train(3)
    values = [param.detach().clone() for param in training.params]
    training.optimizer.param_groups[0]["master_weights"] = mode
    training.optimizer.init_state()
    assert_same_bits(training.masters, [value.float() for value in values])
    training.train(3)
    assert_params_show_their_masters(training.optimizer)
    values = [param.detach().clone() for param in training.params]
    training.optimizer.param_groups[0]["master_weights"] = None
    plain = Training(dtype)
    plain.train(3)
    plain.load_params(values)
    state = [training.optimizer.state[param] for param in training.params]
    for param, items in zip(plain.params, state, strict=True):
        plain.optimizer.state[param] = {k: v.clone() for k, v in items.items() if k not in KEYS.values()}
    for trained in (training, plain):
        give_gradients(trained.params, torch.Generator().manual_seed(10))
        trained.optimizer.step()
    assert_same_bits(training.params, plain.params)


@pytest.mark.parametrize("how", ["group", "model.float()"])
@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_whose_masters_were_given_up_loads_its_own_state_dict(mode: str, how: str) -> None:
    """Which has none any more: a dict with masters is refused where none are kept."""
    module = torch.nn.Linear(7, 5).bfloat16()
    optimizer = AdamW(module.parameters(), master_weights=mode)
    for step in range(2):
        give_gradients(list(module.parameters()), torch.Generator().manual_seed(13))
        optimizer.step()
        if step == 0 and how == "group":
            optimizer.param_groups[0]["master_weights"] = None
        elif step == 0:
            module.float()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


# --- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_channels_last_params_have_masters_of_their_strides_and_the_bits_of_contiguous_ones(
    dtype: torch.dtype, mode: str
) -> None:
    generator = torch.Generator().manual_seed(11)
    start, *grads = (torch.randn(5, 3, 4, 7, generator=generator).to(dtype) for _ in range(4))
    for path in PATHS:
        runs = []
        for layout in (torch.contiguous_format, torch.channels_last):
            param = start.clone(memory_format=layout).requires_grad_()
            optimizer = AdamW([param], **HYPER, master_weights=mode, capturable=path.capturable)
            optimizer.init_state()
            assert optimizer.state[param][KEYS[mode]].stride() == param.stride()
            with stepping(optimizer, path):
                for grad in grads:
                    param.grad = grad.clone(memory_format=layout)
                    optimizer.step()
            runs.append([param.detach(), master_of(optimizer, param), optimizer.state[param]["exp_avg"]])
        assert_same_bits(runs[1], runs[0], path)
        saved = optimizer.state_dict()
        loaded = AdamW([runs[0][0].clone().requires_grad_()], **HYPER, master_weights=mode)
        loaded.load_state_dict(saved)  # channels_last into contiguous
        param = loaded.param_groups[0]["params"][0]
        assert_same_bits([master_of(loaded, param)], [runs[0][1]])
        assert loaded.state[param][KEYS[mode]].stride() == param.stride()


@pytest.mark.parametrize(("dtype", "mode"), KINDS, ids=id_of)
def test_params_with_gaps_have_the_bits_of_dense_ones_and_nothing_is_written_between(
    dtype: torch.dtype, mode: str
) -> None:
    generator = torch.Generator().manual_seed(12)
    start, *grads = (torch.randn(77, generator=generator).to(dtype) for _ in range(4))
    for path in PATHS:
        runs = []
        for buffer in (torch.empty(77, dtype=dtype), torch.full((154,), 7.0, dtype=dtype)):
            param = buffer[:: len(buffer) // 77].copy_(start).requires_grad_()
            optimizer = AdamW([param], **HYPER, master_weights=mode, capturable=path.capturable)
            optimizer.init_state()
            with stepping(optimizer, path):
                for grad in grads:
                    param.grad = grad
                    optimizer.step()
            runs.append([param.detach(), master_of(optimizer, param), optimizer.state[param]["exp_avg"]])
            optimizer.param_groups[0]["lr"] = 0.0
            param.data.fill_(3.0)  # written, with gaps
            optimizer.step()
            assert torch.equal(param, torch.full((77,), 3.0, dtype=dtype))
        assert bool((buffer[1::2] == 7.0).all())
        assert not torch.equal(runs[1][0], start)
        assert_same_bits(runs[1][1:], runs[0][1:], path)
