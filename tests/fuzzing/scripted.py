"""``torch.classes.adamw_ext.AdamW``, the optimizer of TorchScript."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzzing import junk
from tests.fuzzing.cases import Outcome, attempt, entrance, guarded
from tests.fuzzing.mutate import copied, mutate
from tests.fuzzing.observe import Broken, Memory, tensors_of
from tests.fuzzing.stepping import put_grad
from tests.helpers import assert_same_bits

OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (0.1, 0.0),
    "betas": ((0.9, 0.99), (0.0, 0.5)),
    "eps": (1e-8, 0.0),
    "weight_decay": (0.0, 0.1),
    "amsgrad": (True, False),
    "maximize": (True, False),
    "capturable": (True, False),
    "master_weights": ("fp32", "split", None),
    "moment_dtype": (torch.float32, torch.bfloat16, None),
    "stochastic_rounding": (True, False),
    "seed": (0, 5, 2**62),
    "max_grad_norm": (None, 1.0, 0.0),
}


def uncycled(value: Any, within: tuple[int, ...] = ()) -> Any:
    """The same, for torch's bindings of classes and operators. Without cycles of plain containers: torch dies of them
    before it calls anything, as `torch._C._jit_try_infer_type(cyclic_list())` alone does. Without sequences that lie
    about their length: torch makes room for as many items as they say."""
    if isinstance(value, junk.Lies):
        return None
    if type(value) not in (dict, list, tuple) or len(within) > 50:
        return value
    if id(value) in within:
        return None
    inside = (*within, id(value))
    if type(value) is dict:
        return {key: uncycled(item, inside) for key, item in value.items()}
    return type(value)(uncycled(item, inside) for item in value)


class Pair:
    """A scripted optimizer and its twin, after good steps."""

    def __init__(self, random: Random) -> None:
        self.dtype = random.choice((torch.float32, torch.bfloat16, torch.float64))
        options: dict[str, Any] = {"lr": 0.1, "amsgrad": random.random() < 0.3, "capturable": random.random() < 0.2}
        if self.dtype == torch.bfloat16:
            options["master_weights"] = random.choice(("fp32", "split", None))
            options["stochastic_rounding"] = random.random() < 0.3
        if random.random() < 0.2:
            options["max_grad_norm"] = 0.5
        values = [torch.randn(shape, dtype=self.dtype) for shape in ((3, 4), (5,), (0,))]
        self.params, self.twins = ([guarded(value) for value in values] for _ in range(2))
        cls = torch.classes.adamw_ext.AdamW
        self.made, self.twin = cls(self.params, **options), cls(self.twins, **options)
        for _ in range(random.randrange(3)):
            self.good_step()

    def good_step(self) -> None:
        grads = [torch.randn_like(param) for param in self.params]
        self.made.step(grads)
        self.twin.step(grads)

    def contents(self) -> tuple[list[Tensor], str]:
        """All tensors, and all else that can be asked for."""
        state = self.made.state()
        norms = [repr(self.made.skipped_steps())]
        error = attempt(lambda: norms.append(repr(self.made.grad_norm())))
        seen = (sorted(state), [list(state[key]) for key in state], str(self.made.param_groups()), norms, str(error))
        grads = [param.grad for param in self.params if param.grad is not None]
        return [*self.params, *grads, *tensors_of({key: dict(state[key]) for key in state})], str(seen)

    def try_call(self, call: Callable[[], Any]) -> Outcome:
        tensors, seen = self.contents()
        memory = Memory(tensors)
        error = attempt(call)
        if error is None:
            return Outcome.accepted
        memory.assert_unchanged(f"a refusal ({type(error).__name__}: {str(error)[:300]})")
        if self.contents()[1] != seen:
            raise Broken(f"a refusal changed {seen} into {self.contents()[1]} ({error})")
        for param in self.params:
            param.grad = None
        self.good_step()
        self.good_step()
        assert_same_bits(self.params, self.twins, "the next good steps")
        return Outcome.refused


def arguments(random: Random) -> dict[str, Any]:
    chosen = random.sample(sorted(OPTIONS), random.choice((0, 1, 1, 2)))
    made = {}
    for key in chosen:
        made[key] = random.choice(OPTIONS[key]) if random.random() < 0.4 else uncycled(junk.value(random))
    return made


@entrance
@junk.readable_only()
def script_constructor(random: Random) -> Outcome:
    dtype = random.choice((torch.float32, torch.bfloat16))
    params: Any = [guarded(torch.randn(3, 4, dtype=dtype)), guarded(torch.randn(5, dtype=dtype))]
    kind = random.randrange(8)
    if kind < 3:
        params[0] = junk.spoil(params[0], random)
    elif kind == 3:
        params = random.choice(([], params + params[:1], junk.value(random), tuple(params)))
    params = uncycled(params)
    options = arguments(random)
    made: list[Any] = []
    cls = torch.classes.adamw_ext.AdamW
    if random.random() < 0.3:
        groups: Any = uncycled(random.choice(([{"params": params, **options}], [], junk.value(random), [{}])))
        error = attempt(lambda: made.append(cls.from_groups(groups)))
    else:
        error = attempt(lambda: made.append(cls(params, **options)))
    if error is None:
        grads = [torch.ones_like(param) if type(param) is torch.nn.Parameter else None for param in params]
        error = attempt(lambda: made[0].step(grads)) or attempt(made[0].init_state) or attempt(made[0].state_dict)
    return Outcome.refused if error else Outcome.accepted


@entrance
def script_step(random: Random) -> Outcome:
    pair = Pair(random)
    grads: Any = [torch.randn_like(param) for param in pair.params]
    count = random.choice((1, 1, 2))
    with junk.readable_only(count > 1):
        grads, scale, found = spoilt_step(pair, grads, count, random)
    grads, scale, found = uncycled((grads, scale, found))
    return pair.try_call(lambda: pair.made.step(grads, scale, found))


def spoilt_step(pair: Pair, grads: Any, count: int, random: Random) -> tuple[Any, Any, Any]:
    scale: Any = None
    found: Any = None
    for _ in range(count):
        kind = random.randrange(6)
        if kind < 2 and type(grads) is list and grads:
            grads[random.randrange(len(grads))] = junk.spoil(grads[0], random)
        elif kind == 2:
            grads = random.choice(([], None, junk.value(random), grads[:1] if type(grads) is list else None))
        elif kind == 3:
            scale = random.choice((torch.tensor(2.0), junk.scalar_tensor(random), junk.value(random)))
        elif kind == 4:
            found = random.choice(
                (torch.tensor(1.0), torch.tensor(0.0), junk.scalar_tensor(random), junk.value(random))
            )
        else:
            put_grad(pair.params[0], junk.spoil(torch.randn_like(pair.params[0]), random))
            grads = None
    return grads, scale, found


@entrance
@junk.readable_only()
def script_load_state_dict(random: Random) -> Outcome:
    pair = Pair(random)
    if random.random() < 0.5:
        pair.made.init_state()
        pair.twin.init_state()
    state = pair.made.state()
    loaded: dict[str, Any] = {
        "state": {key: {name: tensor.clone() for name, tensor in state[key].items()} for key in state},
        "param_groups": copied([dict(group) for group in pair.made.param_groups()]),
    }
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        mutate(loaded, random)
    loaded = uncycled(loaded)
    outcome = pair.try_call(lambda: pair.made.load_state_dict(loaded["state"], loaded["param_groups"]))
    if outcome is Outcome.accepted:
        attempt(lambda: pair.made.step([torch.ones_like(param) for param in pair.params]))
    return outcome


@entrance
@junk.readable_only()
def script_methods(random: Random) -> Outcome:
    pair = Pair(random)
    made = pair.made
    new = guarded(torch.randn(4, dtype=pair.dtype))
    group = {"params": random.choice(([new], new, (new,), [pair.params[0]], junk.value(random))), **arguments(random)}
    group = random.choice((group, group, junk.value(random)))
    number = random.choice((junk.number(random), junk.value(random)))
    index = random.choice((None, 0, 1, -1, 2**62, junk.value(random)))
    group, number, index, flag = uncycled((group, number, index, junk.value(random)))
    name, call = random.choice(
        (
            ("add", lambda: made.add_param_group(group)),
            ("lr", lambda: made.set_lr(number, index)),
            ("decay", lambda: made.set_weight_decay(number, index)),
            ("get", lambda: (made.get_lr(index), made.get_weight_decay(index))),
            ("zero", lambda: made.zero_grad(flag)),
            ("getstate", lambda: made.__getstate__()),
        )
    )
    outcome = pair.try_call(call)
    if name == "add" and outcome is Outcome.accepted:
        count = len(made.params())
        attempt(lambda: made.step([torch.ones_like(param) for param in made.params()]) if count > 3 else None)
    return outcome
