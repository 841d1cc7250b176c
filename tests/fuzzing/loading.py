"""State dicts, pickles and copies that are not what they should be."""

import contextlib
import copy
import io
import pickle
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.fuzzing import junk
from tests.fuzzing.cases import Outcome, Subject, attempt, check_prediction, entrance, others_stay, predict, try_call
from tests.fuzzing.mutate import copied, mutate
from tests.fuzzing.observe import Broken, Memory, is_readable, tensors_of


def source_dict(subject: Subject, random: Random) -> dict[str, Any]:
    """A state dict of this optimizer, of one with other options over params of these shapes, or of torch's."""
    kind = random.random()
    if kind < 0.5 or (kind < 0.9 and subject.dtype not in (torch.float32, torch.bfloat16)):
        return copied(subject.optimizer.state_dict())
    groups = [[torch.nn.Parameter(param.detach().clone()) for param in group["params"]] for group in
              subject.optimizer.param_groups]  # fmt: skip
    params = [param for group in groups for param in group]
    options: dict[str, Any] = {"amsgrad": random.random() < 0.3}
    if kind < 0.75:
        made: Any = torch.optim.AdamW([{"params": group} for group in groups], **options)
    else:
        if subject.dtype == torch.bfloat16:
            options["master_weights"] = random.choice(("fp32", "split", None))
        made = AdamW([{"params": group} for group in groups], **options)
    for param in params:
        param.grad = torch.randn_like(param) if random.random() < 0.9 else None
    made.step()
    return copied(made.state_dict())


def wrapped(state_dict: dict[str, Any], random: Random) -> Any:
    kind = random.randrange(12)
    if kind == 0:
        return junk.value(random)
    if kind == 1:
        return random.choice((junk.Dict, junk.LyingDict))(state_dict)
    if kind == 2:
        return list(state_dict.items())
    if kind == 3 and isinstance(state_dict.get("state"), dict):
        state_dict["state"] = random.choice((list(state_dict["state"].values()), junk.Dict(state_dict["state"])))
    return state_dict


def renumber(state_dict: dict[str, Any], random: Random) -> None:
    """Other numbers of params, as other libraries and hands write them."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    shift = random.choice((-3, 10**30, 0.5, "x"))
    new: dict[Any, Any] = {n: f"x{n}" if shift == "x" else n + shift for n in numbers}
    if random.random() < 0.3:
        new = dict.fromkeys(numbers, numbers[0] if numbers else 0)
    for group in state_dict["param_groups"]:
        group["params"] = [new[n] for n in group["params"]]
    if random.random() < 0.6:
        state_dict["state"] = {new.get(n, n): items for n, items in state_dict["state"].items()}


def shares(tensors: list[Tensor], others: list[Tensor]) -> bool:
    addresses = {t.untyped_storage().data_ptr() for t in tensors if is_readable(t) and t.numel() > 0}
    return any(is_readable(t) and t.numel() > 0 and t.untyped_storage().data_ptr() in addresses for t in others)


@entrance
def load_state_dict(random: Random) -> Outcome:
    subject = Subject(random)
    loaded = source_dict(subject, random)
    for _ in range(random.choice((0, 1, 1, 1, 2, 5))):
        mutate(loaded, random)
    if random.random() < 0.08 and loaded.keys() >= {"state", "param_groups"}:
        with contextlib.suppress(*junk.UNMADE, LookupError, ArithmeticError):
            renumber(loaded, random)
    given = wrapped(loaded, random)
    if random.random() < 0.15:
        spoil_own(subject, random)
    inputs = tensors_of(given)
    memory = Memory(inputs)
    outcome = try_call(subject, lambda: subject.optimizer.load_state_dict(given))
    memory.assert_unchanged("a loaded dict")
    if outcome is Outcome.accepted:
        check_loaded(subject, inputs, memory)
    return outcome


def spoil_own(subject: Subject, random: Random) -> None:
    """Damage to the present state, which a load replaces and a refused load leaves, equal in the twin."""
    for optimizer in (subject.optimizer, subject.twin):
        optimizer.state.clear()
    subject.optimizer.init_state()
    subject.twin.init_state()


def check_loaded(subject: Subject, inputs: list[Tensor], memory: Memory) -> None:
    """What was loaded is not shared, and the next step is made or refused like any other."""
    optimizer = subject.optimizer
    known = {id(param) for param in subject.params}  # what belongs to no param is kept as it came, as torch's does
    own = tensors_of([items for owner, items in optimizer.state.items() if id(owner) in known])
    if shares(own, inputs):
        raise Broken("state shares memory with the loaded dict")
    predicted = predict(optimizer)
    if try_good_step(subject) is None:
        check_prediction(predicted)
    subject.assert_guards()
    memory.assert_unchanged("a loaded dict, by a step after")


def try_good_step(subject: Subject) -> Exception | None:
    from tests.fuzzing.observe import Snapshot

    before = Snapshot(subject.optimizer)
    error = attempt(subject.optimizer.step)
    if error is not None:
        before.assert_unchanged()
    return error


# --- Pickles ---------------------------------------------------------------------------------------------------------

# What groups of earlier versions of torch do not have.
NEWER_KEYS = ("decoupled_weight_decay", "fused", "capturable", "differentiable", "maximize", "foreach", "amsgrad")


def clone_of(subject: Subject) -> tuple[dict[str, Any], list[Tensor]]:
    """The pickled attributes of the optimizer, read again, and its params."""
    attributes = pickle.loads(pickle.dumps(subject.optimizer.__getstate__()))
    return attributes, [param for group in attributes["param_groups"] for param in group["params"]]


def restored(attributes: Any) -> AdamW:
    made = AdamW.__new__(AdamW)
    made.__setstate__(attributes)
    return made


@entrance
def setstate_of_older_versions(random: Random) -> Outcome:
    """A pickle of an earlier torch goes on with the bits of never having been pickled."""
    options: dict[str, Any] = {key: False for key in ("amsgrad", "maximize", "capturable")}
    subject = Subject(random, fused=None, **options)
    attributes, params = clone_of(subject)
    missing = random.sample(NEWER_KEYS, random.randrange(len(NEWER_KEYS) + 1))
    steps_as = random.choice((int, float, lambda step: step, lambda step: step))
    for group in attributes["param_groups"]:
        for key in missing:
            group.pop(key)
    for key in missing if random.random() < 0.5 else ():
        attributes["defaults"].pop(key, None)
    for items in attributes["state"].values():
        if "step" in items:
            items["step"] = steps_as(items["step"])
    if random.random() < 0.3:
        attributes.update({key: {} for key in ("_optimizer_step_pre_hooks", "_zero_grad_profile_name")})
    made = restored(attributes)
    for _ in range(2):
        subject.give_grads()
        for param, twin in zip(params, subject.twins, strict=True):
            param.grad = twin.grad.clone()
        made.step()
        subject.twin.step()
    subject.optimizer, subject.params = made, params  # type: ignore[assignment]
    subject.assert_as_twin("the steps after unpickling")
    return Outcome.accepted


@entrance
def setstate(random: Random) -> Outcome:
    subject = Subject(random)
    attributes: Any = clone_of(subject)[0]
    attributes["state"] = {owner: items for owner, items in attributes["state"].items()}
    for _ in range(random.choice((1, 1, 2, 4))):
        mutate(attributes, random)
    if random.random() < 0.1:
        attributes = junk.value(random)
    made = AdamW.__new__(AdamW)
    with others_stay(list(subject.params)):
        error = attempt(lambda: made.__setstate__(attributes))
        if error is None:
            for param in tensors_of(made.__dict__.get("param_groups")):
                if is_readable(param) and param.is_leaf and param.is_floating_point() and param.requires_grad:
                    param.grad = torch.ones_like(param)
            error = attempt(made.step)
            attempt(made.state_dict)
    subject.assert_recovered()
    return Outcome.refused if error else Outcome.accepted


@entrance
def setstate_of_a_living_optimizer(random: Random) -> Outcome:
    """__setstate__ of an optimizer that has params is torch's way to end a load."""
    subject = Subject(random)
    incoming: Any = {
        "state": dict(subject.optimizer.state),
        "param_groups": [*map(dict, subject.optimizer.param_groups)],
    }
    incoming["state"] = {owner: dict(items) for owner, items in incoming["state"].items()}
    for _ in range(random.choice((1, 2))):
        mutate(incoming, random)
    before = subject.optimizer.__dict__["param_groups"], subject.optimizer.__dict__["state"]
    error = attempt(lambda: subject.optimizer.__setstate__(incoming))
    subject.assert_guards()
    step_error = attempt(subject.optimizer.step)
    subject.assert_guards()
    del before
    return Outcome.refused if error or step_error else Outcome.accepted


@entrance
def copies(random: Random) -> Outcome:
    """deepcopy, copy and pickle of optimizers whose containers have been spoilt: the original goes on."""
    subject = Subject(random)
    optimizer = subject.optimizer
    groups, state = [dict(group) for group in optimizer.param_groups], {k: dict(v) for k, v in optimizer.state.items()}
    if random.random() < 0.8:
        mutate(random.choice((optimizer.param_groups, [dict(optimizer.state)])), random)
    if random.random() < 0.3 and optimizer.state:
        items = optimizer.state[random.choice(list(optimizer.state))]
        items[random.choice(list(items) or ["step"])] = junk.value(random)

    def through_pickle() -> Any:
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    way = random.choice((lambda: copy.deepcopy(optimizer), lambda: copy.copy(optimizer), through_pickle,
                         optimizer.state_dict, lambda: repr(optimizer)))  # fmt: skip
    made: list[Any] = []
    with others_stay(list(subject.params)):
        error = copy_error(lambda: made.append(way()))
        if error is None and isinstance(made[0], AdamW):
            theirs = tensors_of(made[0].param_groups)
            if {id(param) for param in theirs}.isdisjoint(map(id, subject.params)):  # no shallow copy
                for param in theirs:
                    if is_readable(param) and param.is_leaf and param.requires_grad:
                        param.grad = torch.ones_like(param)
                error = attempt(made[0].step)
    if optimizer.param_groups and all(isinstance(group, dict) for group in optimizer.param_groups):
        optimizer.param_groups[:] = groups
    else:
        optimizer.param_groups = groups
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, (first, last) in zip(groups, bounds(subject), strict=True):
        group["params"] = subject.params[first:last]
    subject.assert_recovered()
    return Outcome.refused if error else Outcome.accepted


def copy_error(call: Any) -> Exception | None:
    """Errors of copying and pickling are those of the values."""
    try:
        call()
    except (pickle.PicklingError, AttributeError, NotImplementedError, OverflowError) as error:
        return error
    except (TypeError, ValueError, RuntimeError, KeyError, junk.Planted) as error:
        return error
    return None


def bounds(subject: Subject) -> list[tuple[int, int]]:
    ends = [0, *subject.cuts, len(subject.params)]
    return list(pairwise(ends))
