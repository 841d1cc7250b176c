"""What one case is made of: an optimizer with its twin, the attempt that may be refused, and what must hold after."""

import enum
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.fuzzing.junk import LyingDict, Planted
from tests.fuzzing.observe import Broken, Memory, Snapshot, is_readable
from tests.helpers import bits
from tests.reference import Textbook


class Outcome(enum.Enum):
    """How a case ended, if all promises were kept. ``accepted``: without an error."""

    refused = "refused"
    accepted = "accepted"


Entrance = Callable[[Random], Outcome]
ENTRANCES: dict[str, Entrance] = {}


def entrance(function: Entrance) -> Entrance:
    ENTRANCES[function.__name__] = function
    return function


def run_case(name: str, seed: int) -> Outcome:
    """Raises Broken where a promise was broken."""
    torch.manual_seed(seed)
    return ENTRANCES[name](Random(f"{name} {seed}"))


# --- Errors ----------------------------------------------------------------------------------------------------------

# AttributeError: torch's own methods call methods of what should be a dict.
ORDINARY = (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError, Planted)
# What pybind11, the standard library of C++ and assertions say.
RAW = (
    "INTERNAL ASSERT",
    "incompatible function arguments",
    "incompatible constructor arguments",
    "Unable to cast",
    "_M_range_check",
    "map::at",
    "std::",
    "bad_alloc",
    "vector::",
)
# Of torch's bindings for operators and classes; and of its dispatcher, where a gradient was robbed of its class.
TORCHS = (
    "Expected a value of type",
    "<torch.ScriptMethod object",
    "<torch.ScriptClassFunction object",
    "dispatch_on_subclass called with NO overloaded args",
)


def is_torchs_lack_of_memory(error: Exception) -> bool:
    """Whether torch's own Python code was about to walk what has, or says it has, more items than fit."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    in_torch = place.parent == Path(torch.optim.__file__).parent or place == Path(torch._tensor.__file__)
    return in_torch and (isinstance(error, MemoryError) or str(error) == "std::bad_alloc")


def check_error(error: Exception, *, raw: bool = False) -> None:
    """Raise Broken unless the error is one that users may see. raw: pybind11's words will do."""
    if is_torchs_lack_of_memory(error):
        return
    if not isinstance(error, ORDINARY):
        raise Broken(f"a {type(error).__name__} is no error for users: {error}") from error
    text = "" if isinstance(error, Planted) else str(error)
    for words in () if raw else RAW:
        if words in text and not any(known in text for known in TORCHS):
            raise Broken(f"an internal message: {text[:300]}") from error
    if not text.strip() and not isinstance(error, (Planted, AttributeError)):
        raise Broken(f"a {type(error).__name__} that says nothing") from error


def attempt(call: Callable[[], Any], *, raw: bool = False) -> Exception | None:
    """The error of a call, an ordinary one; None if there was none."""
    try:
        call()
    except Exception as error:
        check_error(error, raw=raw)
        if not torch.is_grad_enabled():
            raise Broken("grad mode is left off") from error
        return error
    return None


# --- An optimizer and its twin ---------------------------------------------------------------------------------------

GUARD = 7.0
SHAPES = ((5,), (3, 4), (17,), (2, 3, 2), (), (0,))


def guarded(value: Tensor) -> torch.nn.Parameter:
    """A param within a larger buffer, whose ends nobody may write to."""
    buffer = torch.full((value.numel() + 8,), GUARD, dtype=value.dtype)
    view = buffer[4 : 4 + value.numel()].view(value.shape)
    return torch.nn.Parameter(view.copy_(value))


def random_options(random: Random, dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": random.choice((0.1, 1e-3, torch.tensor(0.05)))}
    for key in ("amsgrad", "maximize", "capturable"):
        if random.random() < 0.25:
            options[key] = True
    if random.random() < 0.2:
        options["fused"] = True
    if random.random() < 0.2:
        options["max_grad_norm"] = random.choice((0.5, 1e9, 0.0))
    if random.random() < 0.4 and dtype == torch.bfloat16:
        options["master_weights"] = random.choice(("fp32", "split"))
    if random.random() < 0.3 and dtype == torch.bfloat16:
        options["stochastic_rounding"] = True
        options["seed"] = random.getrandbits(64)
    if random.random() < 0.3 and dtype in (torch.bfloat16, torch.float16):
        options["moment_dtype"] = torch.float32
    if random.random() < 0.1:
        options["betas"] = (torch.tensor(0.8), torch.tensor(0.95))
    return options


class Subject:
    """An optimizer that has made steps; ``twin`` sees the good ones only."""

    def __init__(self, random: Random, *, dtype: torch.dtype | None = None, **options: Any) -> None:
        dtypes = (torch.float32,) * 4 + (torch.bfloat16, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
        self.dtype = dtype or random.choice(dtypes)
        self.shapes = random.sample(SHAPES, 3)
        self.options = {**random_options(random, self.dtype), **options}
        self.cuts = sorted(random.sample(range(1, 3), random.randrange(3)))
        self.named = random.random() < 0.5
        values = [torch.randn(shape, dtype=self.dtype) for shape in self.shapes]
        self.params, self.twins = ([guarded(value) for value in values] for _ in range(2))
        self.optimizer, self.twin = self.build(self.params), self.build(self.twins)
        self.steps = 0
        for _ in range(random.choice((0, 1, 1, 2))):
            self.good_step()
        self.give_grads()

    def build(self, params: list[torch.nn.Parameter]) -> AdamW:
        items: list[Any] = [(f"p{i}", param) for i, param in enumerate(params)] if self.named else list(params)
        bounds = [0, *self.cuts, len(items)]
        groups = [{"params": items[a:b]} for a, b in pairwise(bounds)]
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return AdamW(groups, **copies)

    def give_grads(self) -> None:
        for param, twin in zip(self.params, self.twins, strict=True):
            param.grad = torch.randn(param.shape, dtype=self.dtype)
            twin.grad = param.grad.clone()

    def good_step(self) -> None:
        self.give_grads()
        self.optimizer.step()
        self.twin.step()
        self.steps += 1

    def assert_recovered(self) -> None:
        """Two good steps have the twin's bits."""
        try:
            self.good_step()
            self.good_step()
        except Exception as error:
            raise Broken(f"a good step after a refusal is refused: {error}") from error
        self.assert_as_twin("the next good step")

    def assert_as_twin(self, what: str) -> None:
        pairs = list(zip(self.params, self.twins, strict=True))
        for param, twin in pairs:
            theirs, ours = self.twin.state[twin], self.optimizer.state[param]
            if theirs.keys() != ours.keys():
                raise Broken(f"{what}: state has keys {list(ours)}, not {list(theirs)}")
            pairs_of_state = [(ours[key], theirs[key]) for key in theirs]
            for mine, other in [(param, twin), *pairs_of_state]:
                if mine.shape != other.shape or mine.dtype != other.dtype:
                    raise Broken(f"{what}: {mine.dtype} {mine.shape} instead of {other.dtype} {other.shape}")
                if not torch.equal(bits(mine), bits(other)):
                    raise Broken(f"{what}: other bits than an optimizer's that never saw bad input")
        self.assert_guards()
        if self.optimizer.skipped_steps.item() != self.twin.skipped_steps.item():
            raise Broken(f"{what}: another count of skipped steps")

    def assert_guards(self) -> None:
        for param in self.params:
            if param.dtype != self.dtype or not is_readable(param) or param.storage_offset() != 4:
                continue
            buffer = torch.empty(0, dtype=self.dtype).set_(param.untyped_storage())
            after = buffer[4 + param.numel() : 8 + param.numel()]
            if not bool((buffer[:4] == GUARD).all() and (after == GUARD).all()):
                raise Broken("memory beside a param was written to")


# --- Attempts --------------------------------------------------------------------------------------------------------


def try_call(subject: Subject, call: Callable[[], Any], undo: Callable[[], Any] = lambda: None) -> Outcome:
    """Make a call that may be refused. If it is: nothing has changed, and with the bad input undone good steps have the
    twin's bits."""
    before = Snapshot(subject.optimizer)
    error = attempt(call)
    subject.assert_guards()
    if error is None:
        return Outcome.accepted
    try:
        before.assert_unchanged()
    except Broken as broken:
        raise Broken(f"{broken} (after {type(error).__name__}: {str_of(error)})") from error
    undo()
    subject.assert_recovered()
    return Outcome.refused


def str_of(error: Exception) -> str:
    return str(error)[:300]


@contextmanager
def others_stay(tensors: list[Tensor]) -> Iterator[None]:
    """No byte of these changes within."""
    memory = Memory(tensors)
    yield
    memory.assert_unchanged("a tensor that takes no part")


# --- The textbook, where it can be asked ------------------------------------------------------------------------------


def predict(optimizer: AdamW) -> list[tuple[Tensor, Textbook]]:
    """For each param that a step would update plainly in float32 or float64: the param, and the textbook after that."""
    predicted: list[tuple[Tensor, Textbook]] = []
    groups = optimizer.param_groups
    if any(group.get("max_grad_norm") is not None for group in groups):
        return []
    if any(getattr(optimizer, key, None) is not None for key in ("grad_scale", "found_inf")):
        return []
    if isinstance(optimizer.state, LyingDict):  # what a step reads of it is not what it holds
        return []
    seen: set[int] = set()
    for group in groups:
        plain = {key: number_in(group.get(key)) for key in ("lr", "eps", "weight_decay")}
        betas = [number_in(beta) for beta in group["betas"]] if type(group.get("betas")) is tuple else []
        flags = [group.get(key) for key in ("amsgrad", "maximize", "differentiable", "stochastic_rounding")]
        usable = None not in plain.values() and len(betas) == 2 and None not in betas
        usable = usable and all(type(flag) in (bool, type(None)) for flag in flags) and not flags[2] and not flags[3]
        for param in group["params"]:
            if id(param) in seen:
                return []
            seen.add(id(param))
            if usable and is_readable(param) and param.dtype in (torch.float32, torch.float64):
                book = Textbook([param], **plain, betas=tuple(betas), amsgrad=flags[0], maximize=flags[1])
                if advance(book, param, dict.get(optimizer.state, param)):
                    predicted.append((param, book))
    return predicted


def advance(book: Textbook, param: Tensor, state: Any) -> bool:
    """One step of the textbook from the state; False where that cannot be read."""
    grad = param.grad
    if not is_readable(grad) or grad.dtype != param.dtype or grad.shape != param.shape:
        return False
    if state is not None and (not isinstance(state, dict) or len(state) > 0):
        if not isinstance(state, dict) or number_in(state.get("step")) is None:
            return False
        book.steps = [number_in(state["step"])]
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for key, kept in zip(keys, (book.exp_avgs, book.exp_avg_sqs, book.max_exp_avg_sqs), strict=True):
            if key == "max_exp_avg_sq" and not book.amsgrad:
                continue
            if not is_readable(state.get(key)) or state[key].shape != param.shape or state[key].dtype != param.dtype:
                return False
            kept[0] = state[key].detach().double()
    try:
        book.step([grad])
    except (ArithmeticError, ValueError):
        return False
    return True


def number_in(value: Any) -> float | None:
    if type(value) in (int, float) and abs(value) < 1e30:
        return float(value)
    readable = is_readable(value) and value.numel() == 1 and not value.is_complex()
    return float(value.detach()) if readable else None


def check_prediction(predicted: list[tuple[Tensor, Textbook]]) -> None:
    for param, book in predicted:
        expected = book.params[0]
        decidable = expected.isfinite() & (expected.abs() < 1e20) & (book.exp_avg_sqs[0] < 1e30)
        # Denominators near zero amplify the rounding of the moments without bound.
        root = (
            book.exp_avg_sqs[0] / (1 - book.betas[1] ** book.steps[0]) if book.betas[1] else book.exp_avg_sqs[0]
        ).sqrt()
        decidable &= (root > 1e-6) & (book.exp_avgs[0].abs() < 1e15)
        got, wanted = param.detach().double()[decidable], expected[decidable]
        scale = torch.as_tensor(abs(book.lr)).double() * 2e-5 + 1e-6
        if not torch.allclose(got, wanted, rtol=1e-5, atol=float(scale)) and book.lr < 1e3:
            worst = (got - wanted).abs().max().item()
            raise Broken(f"an accepted step is off the textbook by {worst} (lr {book.lr}, step {book.steps[0]})")
