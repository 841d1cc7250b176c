"""``step`` after edits by hand: of gradients, state, param groups, params, and a scaler's numbers."""

import contextlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzzing import junk
from tests.fuzzing.cases import (
    GUARD,
    Outcome,
    Subject,
    attempt,
    check_prediction,
    entrance,
    others_stay,
    predict,
    try_call,
)
from tests.fuzzing.observe import Broken, is_readable, params_of, storage_bytes

Undo = Callable[[], Any]


def step(subject: Subject, undo: Undo) -> Outcome:
    """A step of what was edited. Where it is accepted and the textbook can be asked, it agrees."""
    predicted = predict(subject.optimizer)
    idle = [param for param in subject.params if param.grad is None]
    before = [storage_bytes(param) for param in idle]
    outcome = try_call(subject, subject.optimizer.step, undo)
    if outcome is Outcome.accepted:
        check_prediction(predicted)
        for param, content in zip(idle, before, strict=True):
            now = storage_bytes(param)
            if content is not None and (now is None or not torch.equal(now, content)):
                raise Broken("a param without gradient moved")
    return outcome


# --- Gradients -------------------------------------------------------------------------------------------------------


def put_grad(param: Tensor, grad: Any) -> bool:
    """Give a param a gradient in spite of torch's checks; False where there is no way."""
    try:
        param.grad = grad
        return True
    except (RuntimeError, TypeError, junk.Planted):
        pass
    if not isinstance(grad, Tensor):
        return False
    try:
        param.grad = torch.zeros_like(param)
        param.grad.data = grad
        return True
    except (RuntimeError, TypeError, NotImplementedError, junk.Planted):
        return False


def spoil_grad_in_place(param: Tensor, random: Random) -> None:
    grad = param.grad
    assert grad is not None
    grad.requires_grad_(False)
    count = grad.numel()
    edits: tuple[Callable[[], Any], ...] = (
        lambda: grad.untyped_storage().resize_(0),
        lambda: grad.untyped_storage().resize_(max(0, count * grad.itemsize - 1)),
        lambda: grad.resize_(count + 1),
        lambda: grad.resize_(0),
        lambda: grad.set_(torch.zeros(count + 3, dtype=grad.dtype)),
        lambda: grad.as_strided_(grad.shape, (0,) * grad.dim()),
        lambda: grad.unsqueeze_(0),
        lambda: grad.set_(param.detach()),
        lambda: grad.t_() if grad.dim() == 2 else grad.unsqueeze_(-1),
        lambda: grad.fill_(float("nan")),
    )
    with contextlib.suppress(RuntimeError):  # torch's own refusals
        random.choice(edits)()


@entrance
def step_grads(random: Random) -> Outcome:
    subject = Subject(random)
    for _ in range(random.choice((1, 1, 2))):
        param = random.choice(subject.params)
        good = torch.randn(param.shape, dtype=param.dtype)
        kind = random.random()
        if kind < 0.25:
            param.grad = good
            spoil_grad_in_place(param, random)
        elif kind < 0.3:
            param.grad = None
        elif kind < 0.4:
            other = random.choice(subject.params)
            put_grad(param, random.choice((other.grad, other.detach(), param.detach())))
        elif not put_grad(param, junk.spoil(good, random)):
            param.grad = good
            spoil_grad_in_place(param, random)
    return step(subject, lambda: [setattr(param, "grad", None) for param in subject.params])


# --- State -----------------------------------------------------------------------------------------------------------

STEPS = (float("nan"), float("inf"), -1.0, 0.5, 0.0, 3.0, 1e9, 2.0**24, 3e38, -0.0)


def spoil_state(subject: Subject, random: Random) -> None:
    state = subject.optimizer.state
    param = random.choice(subject.params)
    items = state[param]
    tensors = [*subject.params, *(value for known in state.values() for value in known.values())]
    kind = random.randrange(12)
    key = random.choice([*items, "exp_avg", "step", "master_param", "param_remainder", "max_exp_avg_sq"])
    if kind < 3:
        items[key] = junk.spoil(items.get(key, torch.zeros(param.shape)), random)
    elif kind == 3:
        items["step"] = random.choice((torch.tensor(random.choice(STEPS)), random.choice(STEPS), junk.number(random)))
    elif kind == 4:
        items["step"] = junk.spoil(torch.tensor(random.choice(STEPS)), random)
    elif kind == 5:
        items.pop(key, None)
    elif kind == 6:
        items[random.choice((key, "note", 5, None, ("exp_avg",)))] = junk.value(random)
    elif kind == 7:
        items[key] = random.choice(tensors)
    elif kind == 8 and "exp_avg" in items:
        which = random.choice(junk._kinds)
        for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if isinstance(items.get(moment), Tensor) and not junk.is_damaged(items[moment]):
                try:
                    items[moment] = junk.SPOILED[which](items[moment])
                except junk.UNMADE:
                    items[moment] = None
    elif kind == 9:
        state[param] = junk.value(random)
    elif kind == 10:
        state[random.choice((junk.Text("x"), 3, torch.zeros(2), None))] = random.choice((dict(items), {}, 5))
    elif kind == 11:
        other = random.choice(subject.params)
        state[param] = random.choice((state[other], dict(state[other]), junk.Dict(items), {}))


@entrance
def step_state(random: Random) -> Outcome:
    subject = Subject(random)
    if random.random() < 0.9:
        subject.good_step()
        subject.give_grads()
    state = subject.optimizer.state
    kept = {owner: dict(items) for owner, items in state.items()}
    for _ in range(random.choice((1, 1, 2, 3))):
        if any(not isinstance(items, dict) for items in state.values()):
            break
        spoil_state(subject, random)

    def undo() -> None:
        state.clear()
        state.update(kept)

    if random.random() < 0.1:
        subject.optimizer.state = random.choice(
            (dict(state), junk.Dict(state), junk.value(random), junk.LyingDict(state))
        )
        if not isinstance(subject.optimizer.state, dict):
            undo()
            return step_without_containers(subject, "state", state)
        return step(subject, lambda: (undo(), setattr(subject.optimizer, "state", state)))
    return step(subject, undo)


def step_without_containers(subject: Subject, attribute: str, good: Any) -> Outcome:
    """As step, with one of the optimizer's own containers replaced by what is none: only params can be looked at."""
    with others_stay(list(subject.params)):
        error = attempt(subject.optimizer.step)
    setattr(subject.optimizer, attribute, good)
    if error is None:
        return Outcome.accepted
    subject.assert_recovered()
    return Outcome.refused


# --- Param groups ----------------------------------------------------------------------------------------------------

NUMBERS = ("lr", "eps", "weight_decay", "max_grad_norm", "seed")
FLAGS = ("amsgrad", "maximize", "capturable", "differentiable", "fused", "foreach", "stochastic_rounding")
OTHERS = ("master_weights", "moment_dtype", "param_names", "decoupled_weight_decay", "initial_lr", "params")


class Edits:
    """A number that edits the optimizer when it is read."""

    def __init__(self, subject: Subject, random: Random) -> None:
        self.subject, self.random = subject, random

    def edit(self) -> None:
        optimizer = self.subject.optimizer
        groups = optimizer.param_groups
        edits: tuple[Callable[[], Any], ...] = (
            lambda: groups.clear(),
            lambda: groups.pop() if groups else None,
            lambda: groups.extend(groups[:1]),
            lambda: [group.get("params", []).clear() for group in groups],
            lambda: groups[0].clear() if groups else None,
            lambda: optimizer.state.clear(),
            lambda: [items.clear() for items in optimizer.state.values() if isinstance(items, dict)],
            lambda: [setattr(param, "grad", None) for param in self.subject.params],
            lambda: groups[0].update(capturable=True, lr=3) if groups else None,
        )
        self.random.choice(edits)()

    def __float__(self) -> float:
        self.edit()
        return 0.1

    def __bool__(self) -> bool:
        self.edit()
        return self.random.random() < 0.5

    def __iter__(self) -> Any:
        self.edit()
        return iter((0.9, 0.99))

    def __repr__(self) -> str:
        self.edit()
        return "edits"


def spoil_group(group: dict[Any, Any], random: Random) -> None:
    key = random.choice((*NUMBERS, *FLAGS, "betas", "betas", *OTHERS))
    kind = random.random()
    if kind < 0.1:
        group.pop(key, None)
    elif kind < 0.15:
        group[random.choice((5, None, "unknown", ("lr",), junk.Text("lr")))] = junk.value(random)
    elif key == "betas":
        pair = [
            random.choice((0.9, junk.number(random), junk.value(random))) for _ in range(random.choice((2, 2, 2, 1, 3)))
        ]
        group[key] = random.choice((tuple(pair), pair, junk.value(random)))
    elif key in NUMBERS:
        group[key] = junk.number(random) if random.random() < 0.7 else junk.value(random)
    elif key in FLAGS:
        group[key] = random.choice((True, False, None, junk.number(random), junk.value(random)))
    elif key == "moment_dtype":
        group[key] = random.choice((torch.float32, torch.bfloat16, torch.int8, "float32", junk.value(random)))
    elif key == "master_weights":
        group[key] = random.choice(("fp32", "split", junk.Text("split"), "\ud800", junk.value(random)))
    else:
        group[key] = junk.value(random)


@entrance
def step_groups(random: Random) -> Outcome:
    subject = Subject(random)
    groups = subject.optimizer.param_groups
    kept = [dict(group) for group in groups]
    params = [list(group["params"]) for group in groups]

    originals = list(groups)

    def undo() -> None:
        groups[:] = originals
        for group, items, own in zip(originals, kept, params, strict=True):
            group.clear()
            group.update(items)
            items["params"][:] = own

    kind = random.random()
    if kind < 0.06:
        subject.optimizer.param_groups = random.choice((tuple(groups), junk.value(random), junk.Dict(), groups[0]))
        return step_without_containers(subject, "param_groups", groups)
    if kind < 0.12:
        groups[random.randrange(len(groups))] = random.choice((junk.Dict(groups[0]), junk.value(random), {}))
        return step_with_replaced_group(subject, undo)
    if kind < 0.2:
        group = random.choice(groups)
        group[random.choice((*NUMBERS, *FLAGS, "betas"))] = Edits(subject, random)
        return step_that_edits(subject)
    for _ in range(random.choice((1, 1, 2, 4))):
        spoil_group(random.choice(groups), random)
    if any(type(group.get("params")) is not list for group in groups):
        return step_with_replaced_group(subject, undo)
    return step(subject, undo)


def step_with_replaced_group(subject: Subject, undo: Undo) -> Outcome:
    taken = set(map(id, params_of(subject.optimizer)))
    left = [param for param in subject.params if id(param) not in taken]
    with others_stay(left):
        error = attempt(subject.optimizer.step)
    subject.assert_guards()
    if error is None:
        return Outcome.accepted
    undo()
    subject.assert_recovered()
    return Outcome.refused


def step_that_edits(subject: Subject) -> Outcome:
    """What comes of it is the caller's; it must not die, nor write elsewhere."""
    error = attempt(subject.optimizer.step)
    subject.assert_guards()
    return Outcome.refused if error else Outcome.accepted


# --- Params ----------------------------------------------------------------------------------------------------------


def resize_storage(tensor: Tensor, size: int) -> None:
    """What is new lies beside the param, as far as its elements had been within its storage."""
    storage = tensor.untyped_storage()
    before = storage.nbytes()
    if torch._C._is_cow_tensor(tensor):
        raise RuntimeError("torch resizes it, and then dies of an assertion wherever it is written to")
    storage.resize_(size)
    if size > before:
        torch.empty(0, dtype=tensor.dtype).set_(storage)[before // tensor.itemsize :].fill_(GUARD)


def spoil_params(subject: Subject, random: Random) -> Undo:
    """Exchange or damage params, or their list. Returns what puts it back."""
    param = random.choice(subject.params)
    groups = subject.optimizer.param_groups
    group = random.choice(groups)
    lists = [(each["params"], list(each["params"])) for each in groups]
    data, content = param.data, storage_bytes(param)
    if content is None:  # spoilt before
        return lambda: None

    def restore() -> None:
        if data.untyped_storage().nbytes() != content.numel():
            data.untyped_storage().resize_(content.numel())
        torch.empty(0, dtype=torch.uint8).set_(data.untyped_storage()).copy_(content)
        param.data = data
        if not param.is_inference():  # torch lets none of these require it; what came before is restored next
            param.requires_grad_(True)
        for own, items in lists:
            own[:] = items

    kind = random.randrange(8)
    if kind < 3:
        try:
            param.data = junk.spoil(data, random)
        except (RuntimeError, TypeError, junk.Planted):  # torch refuses to exchange a param for that
            param.data = torch.ones(2, dtype=data.dtype)  # a shape may be that of no memory
    elif kind == 3:
        with contextlib.suppress(RuntimeError):  # torch's refusals: of memory that is not its own, or shared lazily
            resize_storage(param, random.choice((0, content.numel() // 2, content.numel() + 64)))
    elif kind == 4:
        strange = random.choice((junk.value(random), param, random.choice(subject.params), junk.spoil(data, random)))
        group["params"].insert(random.randrange(len(group["params"]) + 1), strange)
    elif kind == 5:
        views = (data, data.flatten()[:1]) if is_readable(data) else ()
        group["params"].insert(0, torch.nn.Parameter(random.choice((*views, torch.ones(2)))))
        group["params"][0].grad = torch.ones_like(group["params"][0])
    elif kind == 6:
        other = random.choice((data.clone(), data.flatten())) if is_readable(data) else data.detach()
        param.data = random.choice((random.choice(subject.params).data, param.grad, other))
    else:
        with contextlib.suppress(RuntimeError):  # torch's refusal of inference tensors
            param.requires_grad_(random.random() < 0.5)
        if random.random() < 0.5 and group["params"]:
            group["params"].pop()
    return restore


@entrance
def step_params(random: Random) -> Outcome:
    subject = Subject(random)
    undos = [spoil_params(subject, random) for _ in range(random.choice((1, 1, 2)))]

    def undo() -> None:
        for one in reversed(undos):
            one()

    if any(not isinstance(param, Tensor) for group in subject.optimizer.param_groups for param in group["params"]):
        return step_with_replaced_group(subject, undo)
    return step(subject, undo)


# --- A scaler's numbers, and closures --------------------------------------------------------------------------------


@entrance
def step_scaling(random: Random) -> Outcome:
    subject = Subject(random)
    optimizer = subject.optimizer
    for key, good in (("grad_scale", 2.0), ("found_inf", random.choice((0.0, 1.0, 2.0)))):
        kind = random.random()
        if kind < 0.7:
            made = torch.tensor(good)
            setattr(
                optimizer, key, made if kind < 0.2 else junk.spoil(made, random) if kind < 0.5 else junk.value(random)
            )

    def undo() -> None:
        optimizer.grad_scale = optimizer.found_inf = None

    closure: Any = None
    if random.random() < 0.2:
        closure = junk.value(random)
        return try_call(subject, lambda: optimizer.step(closure), undo) if closure is not None else step(subject, undo)
    found = optimizer.__dict__.get("found_inf")
    skips = is_readable(found) and found.numel() == 1 and not found.is_complex() and bool(found != 0)
    before = [param.detach().clone() for param in subject.params]
    outcome = try_call(subject, optimizer.step, undo)
    stayed = all(torch.equal(old, new.detach()) for old, new in zip(before, subject.params, strict=True))
    if outcome is Outcome.accepted and skips and not stayed:
        raise Broken("a skipped step moved a param")
    return outcome
