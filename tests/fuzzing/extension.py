"""``adamw_ext._C``, which is nobody's to call, and must survive it."""

from random import Random
from typing import Any

import torch
from torch import Tensor

from adamw_ext import _C
from tests.fuzzing import junk
from tests.fuzzing.cases import Outcome, Subject, attempt, entrance
from tests.fuzzing.mutate import mutate


class Index:
    """A number that does something when it is read."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def __index__(self) -> int:
        self.action()
        return 0

    __float__ = __int__ = __index__


def members_of(subject: Subject, random: Random) -> list[Any]:
    optimizer = subject.optimizer
    members: list[Any] = []
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            number = len(members)
            state = optimizer.state.get(param) or None
            members.append((param, state, index, f"p{number}", number, 0, None, 0))
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        at = random.randrange(len(members)) if members else 0
        fields = list(members[at]) if members and type(members[at]) is tuple else []
        kind = random.randrange(6)
        if kind < 3 and fields:
            which = random.randrange(len(fields))
            fields[which] = random.choice((junk.value(random), junk.number(random), junk.spoil(fields[which], random)))
            members[at] = tuple(fields)
        elif kind == 3 and fields:
            members[at] = random.choice((tuple(fields[:-1]), fields, (), junk.value(random), (*fields, 0)))
        elif kind == 4 and fields:
            places = random.choice(((1, 1, 1, 1), (0, 1, 1, 1), (2**32 - 1,) * 4, (2**64, 1, 1, 1), (1, 1)))
            members[at] = (*fields[:6], places, random.choice((0, 1, 2**31 - 1, -1, 2**40)))
        elif fields:
            action = random.choice((members.clear, lambda: members.__setitem__(slice(None), [5] * 9), members.pop))
            members[at] = (*fields[:4], Index(action), *fields[5:])
    return members


@entrance
def stepper(random: Random) -> Outcome:
    subject = Subject(random)
    optimizer = subject.optimizer
    if random.random() < 0.9:
        optimizer.init_state()
    groups: Any = optimizer.param_groups
    numbers: list[Any] = [_C.HyperMirror(), _C.DeviceNumbers("int64"), _C.DeviceNumbers("float64")]
    place, complete = (lambda param, grad, name: grad), (lambda number, part: part)
    callbacks: list[Any] = [place, complete]
    kind = random.randrange(12)
    if kind == 0:
        numbers[random.randrange(3)] = random.choice((None, junk.value(random), numbers[1], numbers[2]))
    elif kind == 1:
        callbacks[random.randrange(2)] = random.choice(
            (None, junk.value(random), lambda *_: junk.value(random), lambda *_: junk.scalar_tensor(random))
        )
    elif kind == 2:
        groups = [dict(group, params=list(group["params"])) for group in groups]
        mutate(groups, random)
    members: Any = members_of(subject, random)
    made: list[Any] = []
    containers = (groups, optimizer.state, members)
    if random.random() < 0.05:
        containers = random.choice(((junk.value(random), optimizer.state, members), (groups, {}, members),
                                    (groups, junk.value(random), members)))  # fmt: skip
    error = attempt(lambda: made.append(_C.Stepper(*containers, *numbers, *callbacks)), raw=True)
    if error is not None:
        return Outcome.refused
    return use(made[0], subject, containers, random)


def use(made: Any, subject: Subject, containers: Any, random: Random) -> Outcome:
    groups, state, _ = containers
    error: Exception | None = None
    for _ in range(3):
        grads: Any = None
        if random.random() < 0.4:
            grads = [torch.randn_like(param) for param in subject.params]
            if random.random() < 0.6:
                grads[random.randrange(3)] = junk.spoil(grads[0], random)
            if random.random() < 0.1:
                grads = random.choice((grads[:-1], grads + grads, [], junk.value(random)))
        elif random.random() < 0.3:
            edit_between(groups, state, subject, random)
        if random.random() < 0.2:
            name = random.choice(("units_per_chunk", "emulated_arguments", "isa", "started"))
            sizes = (-(2**63), -1, 0, 1, 8, 100, 400, 4096, 32764, 2**31 - 1, 2**62, junk.value(random))
            attempt(lambda: setattr(made, name, random.choice(sizes)), raw=True)  # noqa: B023
        strange = random.random() < 0.3
        scale, found = (junk.scalar_tensor(random), junk.value(random)) if strange else (None, torch.tensor(0.0))
        if random.random() < 0.5:
            scale, found = found if strange else torch.tensor(2.0), scale
        inputs = (groups, state) if random.random() < 0.95 else (junk.value(random), state)
        error = attempt(lambda: made.step(*inputs, scale, found, grads), raw=True) or error  # noqa: B023
        subject.assert_guards()
    return Outcome.refused if error else Outcome.accepted


def edit_between(groups: Any, state: Any, subject: Subject, random: Random) -> None:
    """What a stepper must notice before it goes on: it holds no reference to params."""
    if type(groups) is not list or not groups or type(groups[0]) is not dict:
        return
    kind = random.randrange(5)
    if kind == 0:
        groups.pop()
    elif kind == 1 and type(groups[0].get("params")) is list:
        groups[0]["params"][:] = []
    elif kind == 2 and isinstance(state, dict):
        state.clear()
    elif kind == 3:
        groups[0]["lr"] = junk.value(random)
    else:
        groups.append(junk.value(random))


@entrance
def extension_functions(random: Random) -> Outcome:
    good = torch.randn(3, 4)
    half, rest = good.bfloat16(), torch.zeros(3, 4, dtype=torch.int16)

    def spoilt(tensor: Tensor) -> Any:
        return junk.spoil(tensor, random) if random.random() < 0.7 else tensor

    def use_numbers() -> None:
        numbers = _C.DeviceNumbers(random.choice(("int64", "float64", junk.value(random))))
        number = numbers.on(random.choice(("cpu", "cuda", "meta", "cpu:5", "", "x", junk.value(random))))
        random.choice(
            (lambda: number.resize_(7), lambda: number.untyped_storage().resize_(0), lambda: number.fill_(5))
        )()
        assert numbers.on("cpu").numel() == 1

    lists = [good, half, rest, spoilt(good)]
    groups = [{"lr": junk.value(random)}, junk.value(random)]
    calls: tuple[Any, ...] = (
        lambda: _C.split_master(spoilt(good)),
        lambda: _C.join_master(spoilt(half), spoilt(rest)),
        lambda: _C.same_memory(
            random.choice((lists, [spoilt(good)], junk.value(random))), random.choice((lists, [good]))
        ),
        use_numbers,
        lambda: _C.HyperMirror().sync(random.choice((groups, [], junk.value(random)))),
    )
    return Outcome.refused if attempt(random.choice(calls), raw=True) else Outcome.accepted
