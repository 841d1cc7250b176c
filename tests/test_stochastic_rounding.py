"""`stochastic_rounding`: without bias, and with the same bits wherever and whenever a step is made.

The expected bits come from an independent reference: Philox4x32-7 written after its paper (Salmon, Moraes, Dror and
Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in numpy, and the numbers that are rounded with it from
steps of float32 params with float32 moments, in which nothing is rounded.
"""

import copy
import functools
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamw_ext import _C, AdamW
from tests.helpers import ISA_LEVELS, assert_same_bits, name_of, spread
from tests.test_bits import Path, stepping_on

pytestmark = pytest.mark.usefixtures("one_thread")

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
MASTER_WEIGHTS = {"none": None, "float32": "fp32", "remainder": "split"}

# (param, moments, master_weights) of every combination that is rounded at random.
KINDS = [
    (getattr(torch, param), getattr(torch, moments), MASTER_WEIGHTS[master])
    for param, moments, master, rounding in _C.combinations()
    if rounding == "stochastic"
]
EMULATED = [Path(capturable=c, emulated_arguments=a) for c, a in itertools.product((False, True), (4096, 32764))]
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}

Kind = tuple[torch.dtype, torch.dtype, str | None]
Words = NDArray[np.uint64]  # of 32 bits


def id_of(value: object) -> str | None:
    if isinstance(value, tuple) and isinstance(value[0], torch.dtype):
        return "-".join(str(item).removeprefix("torch.") for item in value)
    return name_of(value)


# --- The reference ---------------------------------------------------------------------------------------------------


def philox(counter: Sequence[Words], key: tuple[int, int], rounds: int = 7) -> list[Words]:
    """Philox4x32 of four counter words and two key words."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    x0, x1, x2, x3 = counter
    for i in range(rounds):
        key0, key1 = (np.uint64((k + i * weyl) % 2**32) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        product0, product1 = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1 = (product1 >> half) ^ x1 ^ key0, product1 & low
        x2, x3 = (product0 >> half) ^ x3 ^ key1, product0 & low
    return [x0, x1, x2, x3]


# The published vectors for philox4x32 in Random123's file kat_vectors: (rounds, counter, key, expected).
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_reference_gives_the_published_answers(rounds: int, counter: str, key: str, expected: str) -> None:
    counters = [np.array([int(word, 16)], dtype=np.uint64) for word in counter.split()]
    key0, key1 = (int(word, 16) for word in key.split())
    found = philox(counters, (key0, key1), rounds)
    assert " ".join(f"{int(word[0]):08x}" for word in found) == expected


def random_bits(seed: int, step: int, number: int, count: int) -> dict[str, Words]:
    """The 16 bits that each element's numbers are rounded with at this step (the first is 1) of this param."""
    elements = (np.uint64(number) << np.uint64(40)) + np.arange(count, dtype=np.uint64)
    blocks = elements // np.uint64(2)
    counter = [blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32), np.full_like(blocks, step), blocks * 0]
    words = philox(counter, (seed % 2**32, seed >> 32))
    is_even = elements % np.uint64(2) == 0
    first, second = np.where(is_even, words[0], words[2]), np.where(is_even, words[1], words[3])
    low, half = np.uint64(0xFFFF), np.uint64(16)
    return {
        "param": first & low,
        "exp_avg": first >> half,
        "exp_avg_sq": second & low,
        "max_exp_avg_sq": second >> half,
    }


def rounded(values: Tensor, random: Words) -> Tensor:
    """To the bfloat16 below or above, in magnitude; a NaN stays one."""
    sums = values.numpy().view(np.uint32).astype(np.uint64) + random
    nearest = torch.from_numpy((sums >> np.uint64(16)).astype(np.uint16).view(np.int16)).view(BFLOAT16)
    return torch.where(values.isnan(), values.to(BFLOAT16), nearest)


# --- Trainings -------------------------------------------------------------------------------------------------------


def full_options(kind: Kind) -> dict[str, Any]:
    """The constructor's arguments for a kind."""
    _, moments, master_weights = kind
    return {"moment_dtype": moments, "master_weights": master_weights, "stochastic_rounding": True}


def master_of(state: dict[str, Any], param: Tensor) -> Tensor:
    if "param_remainder" in state:
        return _C.join_master(param, state["param_remainder"])
    return state.get("master_param", param.detach().float()).clone()


@functools.lru_cache
def start_values(count: int, dtype: torch.dtype) -> Tensor:
    return spread(count, dtype, torch.Generator().manual_seed(0), octaves=3)


class Training:
    """Some params of one kind, with gradients by their step, and an optimizer over them."""

    sizes: tuple[int, ...] = (1, 0, 2, 65, 1000, 1, 2051)

    def __init__(
        self, kind: Kind = (BFLOAT16, BFLOAT16, None), *, sizes: tuple[int, ...] | None = None, **options: Any
    ) -> None:
        sizes = self.sizes if sizes is None else sizes
        buffer = torch.empty(sum(sizes) + len(sizes), dtype=kind[0])  # params begin at every alignment
        self.params, first = [], 0
        for size, values in zip(sizes, start_values(sum(sizes), kind[0]).split(sizes), strict=True):
            first += 1
            self.params.append(buffer[first : first + size].copy_(values).requires_grad_())
            first += size
        self.optimizer = AdamW(self.params, **{**HYPER, **full_options(kind), **options})
        self.steps = 0

    def give_gradients(self, dtype: torch.dtype | None = None) -> None:
        generator = torch.Generator().manual_seed(1000 + self.steps)
        for param in self.params:
            grad = torch.randint(-99, 100, param.shape, generator=generator) / 64  # which every dtype can hold
            if dtype is not None:
                param.grad_dtype = dtype
            param.grad = grad.to(dtype or param.dtype)

    def train(self, steps: int, dtype: torch.dtype | None = None) -> "Training":
        for _ in range(steps):
            self.give_gradients(dtype)
            self.optimizer.step()
            self.steps += 1
        return self

    def train_on(self, path: Path, steps: int) -> "Training":
        self.optimizer.init_state()
        self.optimizer._stepper = None
        with stepping_on(self.optimizer, path):
            return self.train(steps)

    @property
    def results(self) -> list[Tensor]:
        """Params and each key of the state, as one tensor each."""
        states = [self.optimizer.state[param] for param in self.params]
        return [
            torch.cat([param.detach() for param in self.params]),
            *(torch.cat([state[key].flatten() for state in states]) for key in states[0]),
        ]


def share_of_equal(left: Tensor, right: Tensor) -> float:
    return (left == right).float().mean().item()


# --- The bits --------------------------------------------------------------------------------------------------------


def predict_step(optimizer: AdamW, amsgrad: bool) -> Callable[[], None]:
    """Reckons the next step from the present numbers; what is returned compares."""
    wide, numbers = [], itertools.count()
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            value = master_of(state, param).requires_grad_()
            value.grad = param.grad.float()
            wide.append((next(numbers), group["seed"], param, value))
    unrounded = AdamW([value for *_, value in wide], **HYPER, amsgrad=amsgrad)
    for *_, param, value in wide:
        state = optimizer.state[param]
        moments = {key: state[key].to(FLOAT32, copy=True) for key in state if "exp_avg" in key}
        unrounded.state[value] = {"step": state["step"].clone(), **moments}
    unrounded.step()

    def compare() -> None:
        for number, seed, param, value in wide:
            state, expected = optimizer.state[param], unrounded.state[value]
            step = int(state["step"].item())
            random = random_bits(seed, step, number, param.numel())
            has_master = "master_param" in state or "param_remainder" in state
            if param.dtype == BFLOAT16 and not has_master:
                assert_same_bits([param], [rounded(value.detach(), random["param"])], (number, step, "param"))
            else:
                assert_same_bits([master_of(state, param)], [value], (number, step, "param"))
            for key in (key for key in state if "exp_avg" in key):
                moment = state[key]
                new = rounded(expected[key], random[key]) if moment.dtype == BFLOAT16 else expected[key]
                assert_same_bits([moment], [new], (number, step, key))

    return compare


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_every_bit_of_a_step_is_the_one_that_the_reference_predicts(kind: Kind, amsgrad: bool) -> None:
    """With seeds of up to 64 bits, one for each group, and steps that differ from param to param."""
    for path in (Path(ISA_LEVELS[-1]), EMULATED[-1]):
        training = Training(kind, amsgrad=amsgrad, capturable=path.capturable)
        optimizer, params = training.optimizer, training.params
        optimizer.param_groups[0].update(params=params[:3], seed=0x0123456789ABCDEF)
        optimizer.add_param_group({"params": params[3:5], "seed": 2**64 - 1})
        optimizer.add_param_group({"params": params[5:], "seed": 1})
        optimizer.init_state()
        for i, param in enumerate(params):
            optimizer.state[param]["step"].fill_([0, 5, 70_000, 2**24 - 9][i % 4])
        with stepping_on(optimizer, path):
            for _ in range(5):
                training.give_gradients()
                compare = predict_step(optimizer, amsgrad)
                before = [param.detach().clone() for param in params]
                optimizer.step()
                compare()
                assert not torch.equal(params[-1], before[-1])
                training.steps += 1


def test_without_a_seed_it_is_zero() -> None:
    assert_same_bits(Training().train(3).results, Training(seed=0).train(3).results)


def all_paths() -> Iterator[Path]:
    for isa, units in itertools.product(ISA_LEVELS, (0, 1, 2, 7, 64)):
        yield Path(isa, units_per_chunk=units)
    for path, units in itertools.product((Path(capturable=True), *EMULATED), (0, 1, 7)):
        yield Path(units_per_chunk=units, capturable=path.capturable, emulated_arguments=path.emulated_arguments)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_isa_chunks_capturable_and_launches_do_not_change_bits(kind: Kind, amsgrad: bool) -> None:
    expected = Training(kind, amsgrad=amsgrad, seed=5).train_on(Path(), 3).results
    for path in all_paths():
        training = Training(kind, amsgrad=amsgrad, seed=5, capturable=path.capturable)
        assert_same_bits(training.train_on(path, 3).results, expected, path)


@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_threads_do_not_change_bits(kind: Kind) -> None:
    """In steps long enough to be shared among threads."""
    sizes = (3, 70_001, 70_000)
    expected = Training(kind, sizes=sizes).train_on(Path(ISA_LEVELS[-1]), 2).results
    for threads, units in ((1, 3), (2, 0), (2, 3)):
        found = Training(kind, sizes=sizes).train_on(Path(ISA_LEVELS[-1], threads, units), 2).results
        assert_same_bits(found, expected, (threads, units))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_the_gradients_dtype_does_not_change_bits(kind: Kind) -> None:
    expected = Training(kind).train(3).results
    for dtype, emulated in itertools.product((FLOAT32, BFLOAT16, FLOAT16), (0, 4096)):
        training = Training(kind)
        training.optimizer.init_state()
        with stepping_on(training.optimizer, Path(emulated_arguments=emulated)):
            training.train(3, dtype)
        assert_same_bits(training.results, expected, (dtype, emulated))


def test_layout_and_gaps_do_not_change_bits() -> None:
    """channels_last: of the elements in their order in memory."""
    generator = torch.Generator().manual_seed(3)
    start, grad = (torch.randn(3, 4, 5, 7, generator=generator).bfloat16() for _ in range(2))
    channels_last = {"memory_format": torch.channels_last}
    flat, flat_grad = (tensor.permute(0, 2, 3, 1).flatten() for tensor in (start, grad))
    gaps = torch.full((840,), 7.0, dtype=BFLOAT16)
    cases = [(flat.clone(), flat_grad), (start.clone(**channels_last), grad), (gaps[::2].copy_(flat), flat_grad)]
    results = []
    for param, gradient in cases:
        optimizer = AdamW([param.requires_grad_()], **HYPER, stochastic_rounding=True)
        param.grad = gradient.contiguous() if param.dim() == 1 else gradient.clone(**channels_last)
        optimizer.step()
        moments = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq")]
        results.append([t.detach().permute(0, 2, 3, 1).flatten() if t.dim() == 4 else t for t in (param, *moments)])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    assert bool((gaps[1::2] == 7.0).all())


@pytest.mark.parametrize("kind", [(BFLOAT16, BFLOAT16, None), (BFLOAT16, BFLOAT16, "split")], ids=id_of)
def test_how_a_master_is_kept_does_not_change_the_moments(kind: Kind) -> None:
    """Nor does the param's dtype: an element's moments are rounded with bits of their own."""
    generator = torch.Generator().manual_seed(4)
    numbers = torch.randint(-99, 100, (500,), generator=generator) / 64
    moments = []
    for dtype, mode in ((kind[0], kind[2]), (FLOAT32, None), (BFLOAT16, "fp32"), (FLOAT16, "fp32")):
        param = numbers.to(dtype, copy=True).requires_grad_()
        optimizer = AdamW([param], **full_options((dtype, BFLOAT16, mode)), **HYPER)
        for _ in range(5):
            param.grad = numbers.to(dtype)
            optimizer.step()
        moments.append([optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq")])
    for other in moments[1:]:
        assert_same_bits(other, moments[0])


def resumed(training: Training, **options: Any) -> Training:
    """A new training that goes on from a checkpoint of this one, through a file."""
    file = io.BytesIO()
    torch.save([training.optimizer.state_dict(), [param.detach() for param in training.params]], file)
    file.seek(0)
    state, params = torch.load(file, weights_only=True)
    new = Training(**options)
    with torch.no_grad():
        for param, value in zip(new.params, params, strict=True):
            param.copy_(value)
    new.optimizer.load_state_dict(state)
    new.steps = training.steps
    return new


@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(kind: Kind) -> None:
    for capturable in (False, True):
        run = Training(kind, seed=6, capturable=capturable).train(4)
        again = resumed(run, kind=kind, seed=6, capturable=capturable)
        assert_same_bits(again.train(4).results, run.train(4).results)


@pytest.mark.parametrize("seed", [7, 2**64 - 1, 2**63, 0])
def test_the_seed_is_saved_and_restored(seed: int) -> None:
    """Into an optimizer that was made with another."""
    run = Training(seed=seed).train(3)
    again = resumed(run, seed=8)
    assert_same_bits(again.train(3).results, run.train(3).results)
    assert again.optimizer.param_groups[0].get("seed", 0) == seed


def test_a_dict_without_a_seed_leaves_it() -> None:
    source = torch.optim.AdamW([torch.ones(3, requires_grad=True)])
    target = AdamW([torch.ones(3, requires_grad=True)], seed=9, stochastic_rounding=True, moment_dtype=BFLOAT16)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["seed"] == 9
    assert target.param_groups[0]["stochastic_rounding"] is True


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_bit_for_bit(make_copy: Callable[[AdamW], AdamW]) -> None:
    run = Training(seed=10).train(2)
    twin = Training(seed=11)
    twin.optimizer = make_copy(run.optimizer)
    twin.params, twin.steps = twin.optimizer.param_groups[0]["params"], run.steps
    assert_same_bits(twin.train(3).results, run.train(3).results)
    added = torch.ones(3, dtype=BFLOAT16, requires_grad=True)
    twin.optimizer.add_param_group({"params": [added]})
    group = twin.optimizer.param_groups[1]
    assert (group["stochastic_rounding"], group["seed"]) == (True, 10)


# --- What the bits depend on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2**32 + 1), (5, 5 + 2**63)], ids=str)
def test_another_seed_gives_other_bits(seeds: tuple[int, int]) -> None:
    left, right = (Training(seed=seed).train(1).results for seed in seeds)
    for role in range(3):
        i = [0, 2, 3][role]  # params and moments; 1 is the step
        assert left[i].dtype == BFLOAT16
        assert 0.4 < share_of_equal(left[i], right[i]) < 0.9
    torch.testing.assert_close(left[0], right[0], rtol=2**-7, atol=0)


def test_a_seed_changed_between_steps_takes_effect() -> None:
    for capturable in (False, True):
        changed = Training(seed=12, capturable=capturable).train(2)
        changed.optimizer.param_groups[0]["seed"] = 13
        changed.train(1)
        kept = Training(seed=12, capturable=capturable).train(2)
        other = resumed(kept, seed=12)
        other.optimizer.param_groups[0]["seed"] = 13
        assert_same_bits(changed.results, other.train(1).results)
        assert share_of_equal(changed.results[0], kept.train(1).results[0]) < 0.9


def test_the_option_may_be_switched_between_steps() -> None:
    switched, plain, stochastic = (Training(stochastic_rounding=on) for on in (False, False, True))
    switched.train(2)
    switched.optimizer.param_groups[0]["stochastic_rounding"] = True
    stochastic.optimizer.load_state_dict(plain.train(2).optimizer.state_dict())
    stochastic.steps = 2
    with torch.no_grad():
        for param, value in zip(stochastic.params, plain.params, strict=True):
            param.copy_(value)
    assert_same_bits(switched.train(3).results, stochastic.train(3).results)
    assert share_of_equal(switched.results[0], plain.train(3).results[0]) < 0.9


def twins(count: int, *, split_at: int | None = None, **options: Any) -> tuple[list[Tensor], AdamW]:
    """Equal params with equal gradients, in one group or two."""
    generator = torch.Generator().manual_seed(5)
    value, grad = (torch.randn(1000, generator=generator).bfloat16() for _ in range(2))
    params = [value.clone().requires_grad_() for _ in range(count)]
    for param in params:
        param.grad = grad
    groups = (
        [{"params": params}] if split_at is None else [{"params": params[:split_at]}, {"params": params[split_at:]}]
    )
    return params, AdamW(groups, stochastic_rounding=True, **HYPER, **options)


def test_equal_params_at_other_places_get_other_bits() -> None:
    params, optimizer = twins(3)
    optimizer.step()
    for left, right in itertools.combinations(params, 2):
        for a, b in ((left, right), *((optimizer.state[left][k], optimizer.state[right][k]) for k in ("exp_avg",))):
            assert 0.4 < share_of_equal(a, b) < 0.9
            torch.testing.assert_close(a, b, rtol=2**-7, atol=0)


def test_a_params_place_counts_all_params_before_it_whatever_their_group_or_gradient() -> None:
    expected, optimizer = twins(3)
    optimizer.step()
    for split_at, without in itertools.product((None, 1, 2), ((), (0,), (0, 1), (1,))):
        params, optimizer = twins(3, split_at=split_at)
        for i in without:
            params[i].grad = None
        optimizer.step()
        assert_same_bits(params[2:], expected[2:], (split_at, without))
    params, optimizer = twins(2)
    optimizer.step()
    assert share_of_equal(params[1], expected[2]) < 0.9


def test_each_step_has_bits_of_its_own() -> None:
    """The same numbers, rounded again."""
    params, optimizer = twins(1)
    start = params[0].detach().clone()
    optimizer.init_state()
    results = []
    for step in range(3):
        params[0].data.copy_(start)
        state = optimizer.state[params[0]]
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        state["step"].fill_(step)
        optimizer.step()
        results.append(state["exp_avg"].clone())
    assert all(0.4 < share_of_equal(a, b) < 0.9 for a, b in itertools.combinations(results, 2))


# --- What it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 1.3, 0.01, 1.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_mean_of_many_roundings_is_the_number(value: float, seed: int) -> None:
    """Of a param and of each moment, within 3e-5 of it."""
    results = []
    for dtype, count in ((FLOAT32, 1), (BFLOAT16, 100_000)):
        param = torch.full((count,), value, dtype=BFLOAT16).to(dtype).requires_grad_()
        param.grad = torch.full((count,), value / 3, dtype=BFLOAT16).to(dtype)
        options: dict[str, Any] = {"moment_dtype": dtype, "stochastic_rounding": True, "seed": seed}
        optimizer = AdamW([param], lr=3e-3, weight_decay=0.1, amsgrad=True, **options)
        optimizer.step()
        moments = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
        results.append([param.detach(), *moments])
    for (number,), numbers in zip(*results, strict=True):
        assert numbers.dtype == BFLOAT16
        below, above = sorted(numbers.double().unique().tolist())
        assert below < number < above
        assert numbers.double().mean().item() == pytest.approx(number.item(), rel=3e-5)


def test_the_second_moment_follows_gradients_that_fall_tenfold_where_plain_bfloat16_sticks() -> None:
    """sqrt(v) within 1% of the truth; rounded to nearest, it stays more than twice too large."""
    elements = 2048
    normal = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    options: dict[str, dict[str, Any]] = {
        "truth": {"moment_dtype": FLOAT32},
        "stochastic": {"moment_dtype": BFLOAT16, "stochastic_rounding": True},
        "nearest": {"moment_dtype": BFLOAT16},
    }
    params = {name: torch.zeros(elements, requires_grad=True) for name in options}
    optimizers = {name: AdamW([params[name]], lr=1e-6, betas=(0.9, 0.999), **options[name]) for name in options}
    for step in range(4000):
        size = 1.0 if step < 1000 else 0.1
        grad = normal.roll(step) * size
        for name, param in params.items():
            param.grad = grad
            optimizers[name].step()
    root = {n: optimizers[n].state[p]["exp_avg_sq"].double().mean().sqrt().item() for n, p in params.items()}
    assert root["stochastic"] == pytest.approx(root["truth"], rel=0.01)
    assert root["nearest"] > 2 * root["truth"]


def test_a_decay_too_small_for_bfloat16_is_applied_where_plain_bfloat16_stands_still() -> None:
    """2,000 steps that take 1e-4 each: within 1% of (1 - 1e-4)**2000, on average over the elements."""
    means = {}
    for stochastic in (True, False):
        param = torch.ones(4096, dtype=BFLOAT16, requires_grad=True)
        optimizer = AdamW([param], lr=1e-2, weight_decay=1e-2, stochastic_rounding=stochastic)
        param.grad = torch.zeros_like(param)
        for _ in range(2000):
            optimizer.step()
        means[stochastic] = param.detach().double()
    assert means[True].mean().item() == pytest.approx((1 - 1e-4) ** 2000, rel=0.01)
    assert means[True].std().item() < 0.1
    assert torch.equal(means[False], torch.ones(4096, dtype=torch.float64))


def test_the_four_numbers_of_an_element_and_its_neighbours_are_rounded_independently() -> None:
    count = 100_000
    param = torch.full((count,), 1.3, dtype=BFLOAT16, requires_grad=True)
    optimizer = AdamW([param], lr=3e-3, weight_decay=0.1, amsgrad=True, stochastic_rounding=True)
    param.grad = torch.full_like(param, 0.7)
    optimizer.step()
    state = optimizer.state[param]
    tensors = [param.detach(), *(state[key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))]
    is_up = torch.stack([(tensor == tensor.max()).double() for tensor in tensors])
    series = torch.cat([is_up[:, :-1], is_up[:, 1:]])
    correlation = torch.corrcoef(series) - torch.eye(len(series), dtype=torch.float64)
    assert correlation.abs().max().item() < 4 / math.sqrt(count)


# --- What it leaves alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Path(ISA_LEVELS[-1]), *EMULATED[1:3]], ids=str)
def test_numbers_that_a_bfloat16_holds_stay(path: Path) -> None:
    """Every bfloat16 as a param, infinities and NaNs too; and moments that each step brings back to such a number."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(BFLOAT16)
    param = every.clone().requires_grad_()
    optimizer = AdamW(
        [param],
        lr=0.0,
        weight_decay=0.0,
        betas=(0.5, 0.5),
        amsgrad=True,
        stochastic_rounding=True,
        capturable=path.capturable,
    )
    optimizer.init_state()
    state = optimizer.state[param]
    maximum = every.abs().nan_to_num(nan=4.0).clamp_min_(4.0)
    state["max_exp_avg_sq"].copy_(maximum)
    state["exp_avg"].fill_(1.0)
    state["exp_avg_sq"].fill_(1.0)
    param.grad = torch.ones_like(param)
    with stepping_on(optimizer, path):
        for _ in range(20):
            optimizer.step()
    is_zero = every == 0  # of either sign
    assert_same_bits([param.detach()[~is_zero]], [every[~is_zero]])
    assert bool((param.detach()[is_zero] == 0).all())
    assert_same_bits([state["max_exp_avg_sq"]], [maximum])
    assert_same_bits([state["exp_avg"], state["exp_avg_sq"]], [torch.ones_like(every)] * 2)


@pytest.mark.parametrize("kind", KINDS, ids=id_of)
@pytest.mark.parametrize("path", [Path(ISA_LEVELS[-1]), *EMULATED[1:3]], ids=str)
def test_nan_and_infinity_stay_what_they_are(kind: Kind, path: Path) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        param = torch.ones(70, dtype=kind[0], requires_grad=True)
        optimizer = AdamW([param], **HYPER, **full_options(kind), amsgrad=True, capturable=path.capturable)
        optimizer.init_state()
        with stepping_on(optimizer, path):
            for _ in range(3):
                param.grad = torch.full_like(param, value)
                optimizer.step()
        state = optimizer.state[param]
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            assert_same_bits([state[key].float()], [torch.full((70,), abs(value))])
        assert bool(state["exp_avg"].isnan().all())  # after the first step, inf + (inf - inf)
        assert bool(param.isnan().all())  # inf / inf


def test_wider_params_and_moments_are_untouched_by_the_option() -> None:
    """float32 and float64 numbers, and params with a float32 master and float32 moments."""
    cases: list[tuple[torch.dtype, dict[str, Any]]] = [
        (FLOAT32, {}),
        (torch.float64, {}),
        (torch.complex64, {}),
        (FLOAT32, {"moment_dtype": FLOAT32}),
        (BFLOAT16, {"moment_dtype": FLOAT32, "master_weights": "fp32"}),
        (BFLOAT16, {"moment_dtype": FLOAT32, "master_weights": "split"}),
        (FLOAT16, {"moment_dtype": FLOAT32, "master_weights": "fp32"}),
    ]
    for dtype, options in cases:
        runs = []
        for stochastic in (False, True):
            param = torch.linspace(-2, 2, 77).to(dtype).requires_grad_()
            optimizer = AdamW([param], **HYPER, **options, stochastic_rounding=stochastic)
            for _ in range(5):
                param.grad = param.detach() * 0.7 + 0.1
                optimizer.step()
            runs.append([param, *optimizer.state[param].values()])
        assert_same_bits(runs[1], runs[0], (dtype, options))


def test_float32_numbers_beside_bfloat16_ones_are_not_rounded_at_random() -> None:
    """A float32 param with bfloat16 moments, and float32 moments of a bfloat16 param: a step of equal numbers."""
    numbers = torch.linspace(-2, 2, 77).bfloat16()
    results = {}
    for dtype, moments in ((FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)):
        param = numbers.to(dtype, copy=True).requires_grad_()
        optimizer = AdamW([param], **HYPER, moment_dtype=moments, stochastic_rounding=True)
        param.grad = numbers.to(dtype)
        optimizer.step()
        results[dtype, moments] = [param.detach(), *(optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq"))]
    wide = results[FLOAT32, FLOAT32]
    assert_same_bits(results[FLOAT32, BFLOAT16][:1], wide[:1])
    assert_same_bits(results[BFLOAT16, FLOAT32][1:], wide[1:])


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment_dtype", "master_weights"), [(None, None), (FLOAT32, None), (BFLOAT16, None), (None, "fp32")], ids=str
)
def test_float16_params_without_a_master_and_float16_moments_are_refused_and_nothing_changes(
    moment_dtype: torch.dtype | None, master_weights: str | None
) -> None:
    """Their rounding is to bfloat16."""
    good, bad = torch.ones(3, dtype=BFLOAT16, requires_grad=True), torch.ones(3, dtype=FLOAT16, requires_grad=True)
    optimizer = AdamW([good, bad], stochastic_rounding=True, moment_dtype=moment_dtype, master_weights=master_weights)
    for param in (good, bad):
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"param \(group 0, index 1\) of dtype torch\.float16 cannot have .*rounded stochastically",
        ):
            optimizer.step()
        assert not optimizer.state
        assert all(torch.equal(param, torch.ones(3, dtype=param.dtype)) for param in (good, bad))


def test_a_group_that_torch_updates_is_refused_and_nothing_changes() -> None:
    param = torch.ones(3, dtype=BFLOAT16, requires_grad=True)
    optimizer = AdamW([param], stochastic_rounding=True, differentiable=True)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"stochastic_rounding=True needs the hand-written kernel.*by torch"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(param, torch.ones(3, dtype=BFLOAT16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stochastic_rounding": "yes"}, "stochastic_rounding must be a bool, but is 'yes'"),
        ({"stochastic_rounding": None}, "stochastic_rounding must be a bool, but is None"),
        ({"stochastic_rounding": 1}, "stochastic_rounding must be a bool, but is 1"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\*\*64\), but is -1"),
        ({"seed": 2**64}, r"seed must be an int in \[0, 2\*\*64\), but is 18446744073709551616"),
        ({"seed": 1.0}, r"seed must be an int in \[0, 2\*\*64\), but is 1\.0"),
        ({"seed": True}, r"seed must be an int in \[0, 2\*\*64\), but is True"),
        ({"seed": None}, r"seed must be an int in \[0, 2\*\*64\), but is None"),
        ({"seed": torch.tensor(1)}, r"seed must be an int in \[0, 2\*\*64\), but is a torch.int64 tensor"),
    ],
)
def test_other_values_are_refused(options: dict[str, Any], message: str) -> None:
    param = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        AdamW([param], **options)
    with pytest.raises(ValueError, match=f"{message}.* in param group 0"):
        AdamW([{"params": [param], **options}])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1"], ids=str)
def test_a_seed_that_a_group_is_given_later_and_that_is_none_is_refused_by_group(seed: Any) -> None:
    training = Training().train(1)
    before = [tensor.clone() for tensor in training.results]
    training.optimizer.param_groups[0]["seed"] = seed
    training.give_gradients()
    with pytest.raises((TypeError, ValueError), match=r"param group 0.*seed|seed.*param group 0"):
        training.optimizer.step()
    assert_same_bits(training.results, before)


def test_without_it_group_keys_are_torchs() -> None:
    params = [torch.ones(3, requires_grad=True)]
    keys = AdamW(params, stochastic_rounding=False, seed=0, master_weights=None).param_groups[0].keys()
    assert keys == torch.optim.AdamW(params).param_groups[0].keys()
