"""The constructor and ``add_param_group``."""

from random import Random
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.fuzzing import junk
from tests.fuzzing.cases import Outcome, Subject, attempt, entrance, guarded, others_stay, try_call
from tests.fuzzing.observe import is_readable

KEYS = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
    "master_weights", "moment_dtype", "stochastic_rounding", "seed", "max_grad_norm",
)  # fmt: skip
BOOLS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "stochastic_rounding")


def option(key: str, random: Random) -> Any:
    """A usable value half of the time."""
    good: dict[str, tuple[Any, ...]] = {
        "lr": (0.1, 0, torch.tensor(0.1)),
        "betas": ((0.9, 0.99), (0.0, 0.0), (torch.tensor(0.9), torch.tensor(0.99))),
        "eps": (1e-8, 0, 1),
        "weight_decay": (0.0, 0.1, 1),
        "master_weights": ("fp32", "split", None),
        "moment_dtype": (torch.float32, torch.bfloat16, None),
        "seed": (0, 2**64 - 1, 5),
        "max_grad_norm": (None, 1.0, 0, float("inf")),
    }
    if random.random() < 0.6:
        return random.choice(good.get(key, (True, False, None) if key == "foreach" else (True, False)))
    if key == "betas":
        return (junk.number(random), 0.9) if random.random() < 0.5 else junk.value(random)
    return junk.number(random) if random.random() < 0.6 else junk.value(random)


def options(random: Random) -> dict[str, Any]:
    return {key: option(key, random) for key in random.sample(KEYS, random.choice((0, 1, 1, 2, 3)))}


def spoilt_params(params: list[Any], random: Random) -> Any:
    """A list of params, or of groups, or neither."""
    items: list[Any] = list(params)
    kind = random.randrange(10)
    if kind < 3:
        items[random.randrange(len(items))] = junk.spoil(items[0], random)
    elif kind == 3:
        items.append(random.choice((items[0], junk.value(random))))
    elif kind == 4:
        items = [(f"p{i}", item) for i, item in enumerate(items)]
        items[0] = random.choice(
            (items[0], params[0], ("p", junk.value(random)), (junk.value(random), params[0]), ("p",))
        )
    elif kind == 5:
        return random.choice(
            (junk.value(random), iter(items), tuple(items), items[0], set(items), dict(enumerate(items)))
        )
    if random.random() < 0.3:
        given = [random.choice((items[:1], *items[:1], junk.value(random))), items[1:]]
        return [{"params": one, **options(random)} for one in given] + random.choice(([], [{}], [junk.value(random)]))
    return items


def step_with_grads(optimizer: AdamW) -> Exception | None:
    """A step of whatever was accepted."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param, Tensor) and is_readable(param) and param.is_leaf and param.numel() < 1000:
                try:
                    param.grad = torch.ones_like(param)
                except RuntimeError:
                    continue
    return attempt(optimizer.step)


@entrance
def constructor(random: Random) -> Outcome:
    dtype = random.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    params = [guarded(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,))]
    others = [guarded(torch.randn(3))]
    given = spoilt_params(params, random) if random.random() < 0.6 else params
    arguments = options(random)
    made: list[AdamW] = []
    with others_stay([*params, *others]):
        error = attempt(lambda: made.append(AdamW(given, **arguments)))
    if error is not None:
        return Outcome.refused
    with others_stay(others):
        if step_with_grads(made[0]) is not None:
            return Outcome.refused
        attempt(made[0].init_state)
        attempt(made[0].state_dict)
        attempt(made[0].sync_hyperparameters)
    return Outcome.accepted


@entrance
def add_param_group(random: Random) -> Outcome:
    subject = Subject(random)
    optimizer = subject.optimizer
    new = [guarded(torch.randn(3, 4, dtype=subject.dtype)), guarded(torch.randn(5, dtype=subject.dtype))]
    group: Any = {"params": spoilt_params(new, random), **options(random)}
    kind = random.random()
    if kind < 0.1:
        group = junk.value(random)
    elif kind < 0.2:
        group = random.choice((junk.Dict, junk.LyingDict))(group)
    elif kind < 0.3:
        group["params"] = random.choice(
            (subject.params, subject.params[:1], [new[0], subject.params[0]], [new[0], new[0]])
        )
    elif kind < 0.35:
        del group["params"]
    elif kind < 0.45:
        group[random.choice((5, None, "param_names", "decoupled_weight_decay"))] = junk.value(random)
    elif subject.named and isinstance(group["params"], list):
        group["params"] = [(f"new{i}", item) for i, item in enumerate(group["params"]) if isinstance(item, Tensor)]
    count = len(optimizer.param_groups)
    with others_stay(new):
        outcome = try_call(subject, lambda: optimizer.add_param_group(group))
    if outcome is Outcome.refused:
        return outcome
    error = step_with_grads(optimizer)
    subject.assert_guards()
    if error is None:
        return Outcome.accepted
    del optimizer.param_groups[count:]
    for owner in set(optimizer.state) - set(subject.params):
        del optimizer.state[owner]
    subject.assert_recovered()
    return Outcome.refused
