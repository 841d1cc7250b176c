"""The functional form, the registered operators, and the functional TorchScript optimizer."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from adamw_ext import functional
from adamw_ext.jit import FunctionalAdamW
from tests.fuzzing import junk
from tests.fuzzing.cases import Outcome, attempt, check_prediction, entrance, guarded
from tests.fuzzing.observe import Broken, Memory, tensors_of
from tests.fuzzing.scripted import uncycled
from tests.helpers import assert_same_bits
from tests.reference import Textbook

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
SCALARS = ("lr", "beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize")


def good_call(random: Random) -> dict[str, Any]:
    """Arguments as they should be."""
    dtype = random.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    shapes = [random.choice(((5,), (3, 4), (17,), (), (0,))) for _ in range(random.randrange(1, 4))]
    steps = [float(random.randrange(4)) for _ in shapes]
    call: dict[str, Any] = {
        "params": [guarded(torch.randn(shape, dtype=dtype)).detach() for shape in shapes],
        "grads": [torch.randn(shape, dtype=dtype) for shape in shapes],
        "exp_avgs": [torch.randn(shape, dtype=dtype) * 0.1 for shape in shapes],
        "exp_avg_sqs": [torch.rand(shape, dtype=dtype) for shape in shapes],
        "max_exp_avg_sqs": [torch.rand(shape, dtype=dtype) for shape in shapes],
        "state_steps": [torch.tensor(step) for step in steps],
    }
    call.update(lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.01, eps=1e-8)
    call.update(amsgrad=random.random() < 0.3, maximize=random.random() < 0.3, grad_scale=None, found_inf=None)
    if random.random() < 0.3:
        call["lr"] = torch.tensor(0.1)
    return call


def spoil_call(call: dict[str, Any], random: Random) -> None:
    kind = random.randrange(10)
    name = random.choice(LISTS)
    lists = call[name]
    if kind < 4 and type(lists) is list and lists:
        at = random.randrange(len(lists))
        lists[at] = junk.spoil(lists[at], random)
    elif kind == 4 and type(lists) is list and lists:
        other = call[random.choice(LISTS)]
        lists[random.randrange(len(lists))] = random.choice(other) if type(other) is list and other else None
    elif kind == 5 and type(lists) is list:
        call[name] = random.choice((lists[:-1], lists + lists[:1], [], tuple(lists), None, junk.value(random)))
    elif kind == 6:
        call[random.choice(("grad_scale", "found_inf"))] = random.choice(
            (torch.tensor(2.0), torch.tensor(0.0), junk.scalar_tensor(random), junk.value(random))
        )
    elif kind == 7 and type(call["state_steps"]) is list and call["state_steps"]:
        call["state_steps"][0] = torch.tensor(random.choice((float("nan"), -1.0, 0.5, 2.0**24, 3e38, float("inf"))))
    else:
        call[random.choice(SCALARS)] = junk.number(random) if random.random() < 0.7 else junk.value(random)


def textbook(call: dict[str, Any]) -> list[tuple[Tensor, Textbook]]:
    """One step of unspoilt arguments."""
    predicted = []
    hyper = {key: float(call[key]) for key in ("lr", "weight_decay", "eps")}
    for i, param in enumerate(call["params"]):
        if param.dtype not in (torch.float32, torch.float64):
            return []
        betas = (call["beta1"], call["beta2"])
        book = Textbook([param], **hyper, betas=betas, amsgrad=call["amsgrad"], maximize=call["maximize"])
        book.exp_avgs, book.exp_avg_sqs = [call["exp_avgs"][i].double()], [call["exp_avg_sqs"][i].double()]
        book.max_exp_avg_sqs, book.steps = [call["max_exp_avg_sqs"][i].double()], [int(call["state_steps"][i])]
        book.step([call["grads"][i]])
        predicted.append((param, book))
    return predicted


def try_functional(random: Random, run: Callable[[dict[str, Any]], Any], *, taken: bool = True) -> Outcome:
    """A spoilt call; where it is refused, no tensor has changed. taken: torch takes good arguments for it."""
    call = good_call(random)
    good = {key: list(value) if isinstance(value, list) else value for key, value in call.items()}
    spoils = random.choice((0, 1, 1, 1, 2))
    with junk.readable_only(spoils > 1 or not taken):
        for _ in range(spoils):
            spoil_call(call, random)
    memory = Memory(tensors_of([good, call]))
    predicted = textbook(call) if spoils == 0 else []
    error = attempt(lambda: run(call))
    if error is None:
        check_prediction(predicted)
        return Outcome.accepted
    if isinstance(error, junk.Planted) and any(type(param) is junk.Wrapping for param in tensors_of(call["params"])):
        return Outcome.refused  # raised by a class of the caller's, within torch's own update
    memory.assert_unchanged(f"a refused call ({type(error).__name__}: {str(error)[:200]})")
    if taken and random.random() < 0.2:
        predicted = textbook(good)
        run(good)
        check_prediction(predicted)
    return Outcome.refused


@entrance
def functional_form(random: Random) -> Outcome:
    def run(call: dict[str, Any]) -> None:
        more = {}
        if random.random() < 0.1:
            more[random.choice(("capturable", "differentiable"))] = random.choice((True, False, 1, None))
        with torch.no_grad():
            functional.adamw(**call, **more)

    return try_functional(random, run)


@entrance
def operators(random: Random) -> Outcome:
    operator = torch.ops.adamw_ext.adamw_
    overload = random.choice(
        (operator, operator.default, operator.tensor_lr, operator.unmarked, operator.unmarked_tensor_lr)
    )
    fits = random.random() < 0.9

    def run(call: dict[str, Any]) -> None:
        chosen = overload
        if fits and type(call["lr"]) in (float, Tensor):
            tensor = isinstance(call["lr"], Tensor)
            chosen = operator.tensor_lr if tensor else operator.default
        with torch.set_grad_enabled(random.random() < 0.1):
            chosen(**call)

    return try_functional(random, run, taken=fits or overload is operator)


@entrance
def compiled_operators(random: Random) -> Outcome:
    """The operators that stand for a whole step in a compiled graph, called by hand."""
    import adamw_ext.compiled
    from tests.fuzzing.cases import Subject, try_call

    subject = Subject(random)
    optimizer = subject.optimizer
    adamw_ext.compiled.look_at_params(optimizer._number)
    params: Any = [param.detach() for param in subject.params]
    grads: Any = [torch.randn_like(param) for param in params]
    numbers: Any = list(range(len(params)))
    trace: Any = optimizer._trace
    scale: Any = torch.tensor(2.0)
    found: Any = random.choice((None, torch.tensor(0.0), torch.tensor(1.0)))
    for _ in range(random.choice((0, 1, 1, 2))):
        kind = random.randrange(6)
        which = random.choice((params, grads))
        if kind == 0 and which:
            which[0] = junk.spoil(which[0], random)
        elif kind == 1 and which:
            which.pop() if random.random() < 0.5 else which.append(which[0])
        elif kind == 2 and type(numbers) is list:
            numbers = random.choice(
                ([-1] * len(numbers), [2**62] * len(numbers), [0] * len(numbers), numbers[1:], junk.value(random))
            )
        elif kind == 3:
            trace = random.choice(("", ".", "0.0", "-1.5", "x" * 1000, f"{optimizer._number}.", junk.value(random)))
        elif kind == 4:
            scale = junk.scalar_tensor(random)
        else:
            found = random.choice((junk.scalar_tensor(random), junk.value(random)))
    operator = torch.ops.adamw_ext.compiled_step_
    params, grads, numbers, scale, found = map(uncycled, (params, grads, numbers, scale, found))
    if random.random() < 0.5:
        return try_call(subject, lambda: operator.default(params, grads, found, numbers, trace))
    return try_call(subject, lambda: operator.unscaling(params, grads, scale, found, numbers, trace))


@entrance
def functional_script(random: Random) -> Outcome:
    dtype = random.choice((torch.float32, torch.bfloat16, torch.float64))
    params = [guarded(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,))]
    twins = [guarded(param.detach()) for param in params]
    if random.random() < 0.3:
        return construct_functional(params, random)
    amsgrad = random.random() < 0.3
    made, twin = (FunctionalAdamW(own, lr=0.1, amsgrad=amsgrad) for own in (params, twins))

    def good_step() -> None:
        grads: list[Tensor | None] = [torch.randn_like(param) for param in params]
        made.step(grads)
        twin.step(grads)

    for _ in range(random.randrange(3)):
        good_step()
    grads: Any = [torch.randn_like(param) for param in params]
    defaults, states = dict(made.defaults), {owner: dict(items) for owner, items in made.state.items()}
    count = random.choice((1, 1, 2))
    with junk.readable_only():
        for _ in range(count):
            kind = random.randrange(5)
            if kind == 0:
                grads = [junk.spoil(grads[0], random), *grads[1:]] if type(grads) is list and grads else None
            elif kind == 1:
                grads = random.choice(([], grads, junk.value(random), tuple(grads) if type(grads) is list else None))
            elif kind == 2:
                made.defaults[random.choice(list(defaults))] = junk.number(random)
            elif kind == 3 and made.state:
                items = made.state[params[0]]
                key = random.choice(list(items) or ["step"])
                items[key] = junk.spoil(items.get(key), random)
            else:
                made.defaults.pop(random.choice(list(made.defaults) or ["lr"]), None)
    memory = Memory(tensors_of([params, twins, grads, [items for items in made.state.values()]]))
    present = len(made.state)
    lone = random.random() < 0.3 and type(grads) is list and grads
    error = attempt(lambda: made.step_param(params[0], grads[0]) if lone else made.step(grads))
    if error is None:
        return Outcome.accepted
    memory.assert_unchanged(f"a refused step ({type(error).__name__}: {str(error)[:200]})")
    if len(made.state) != present:
        raise Broken("a refused step leaves state")
    made.defaults, made.state = defaults, states
    good_step()
    assert_same_bits(params, twins, "the next good step")
    return Outcome.refused


def construct_functional(params: list[Any], random: Random) -> Outcome:
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "fused", "_allow_empty_param_list")
    arguments = {name: junk.value(random) for name in random.sample(names, random.choice((1, 1, 2)))}
    if random.random() < 0.3:
        params = random.choice(([], [junk.spoil(params[0], random)], [params[0], params[0]]))

    def make_and_step() -> None:
        with torch.no_grad():
            made = FunctionalAdamW(params, **arguments)
            made.step([torch.ones_like(param) if type(param) is torch.nn.Parameter else None for param in params])

    return Outcome.refused if attempt(make_and_step) else Outcome.accepted
