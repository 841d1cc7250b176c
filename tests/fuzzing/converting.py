"""``adamw_ext.checkpoint``: state dicts of other libraries and of the common form."""

from random import Random
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW, checkpoint
from tests.fuzzing import junk
from tests.fuzzing.cases import Outcome, Subject, attempt, entrance, try_call
from tests.fuzzing.loading import wrapped
from tests.fuzzing.mutate import copied, mutate
from tests.fuzzing.observe import Broken, Memory, tensors_of

GROUP = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def apex_dict() -> dict[str, Any]:
    """As apex's FusedAdam leaves it: ``step`` by group."""
    moments = {number: {"exp_avg": torch.randn(3), "exp_avg_sq": torch.rand(3)} for number in range(2)}
    return {"state": moments, "param_groups": [{**GROUP, "step": 3, "params": [0, 1]}]}


def transformer_engine_dict(random: Random) -> dict[str, Any]:
    made = apex_dict()
    remainders = random.random() < 0.5
    for items in made["state"].values():
        whole = torch.randn(3)
        items["master_param"] = whole.view(torch.int16)[::2].clone() if remainders else whole
    return made


def bitsandbytes_dict(random: Random) -> dict[str, Any]:
    items: list[dict[str, Any]] = [{"state1": torch.randn(3), "state2": torch.rand(3)} for _ in range(2)]
    nested = random.random() < 0.5
    state = {
        number: {"step": 2, "__bnb_optimizer_quant_state__": own} if nested else {"step": 2, **own}
        for number, own in enumerate(items)
    }
    group = {**GROUP, "alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": [0, 1]}
    return {"state": state, "param_groups": [group]}


@entrance
def conversions(random: Random) -> Outcome:
    """Another library's dict, converted and imported."""
    params: Any = [torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16)) for _ in range(2)]
    source = random.randrange(3)
    made = (apex_dict(), transformer_engine_dict(random), bitsandbytes_dict(random))[source]
    for _ in range(random.choice((0, 1, 1, 1, 2))):
        mutate(made, random)
    given = wrapped(made, random) if random.random() < 0.3 else made
    others = list(params)
    if random.random() < 0.1 and source == 1:
        params = random.choice((params[:1], [junk.spoil(params[0], random), params[1]], junk.value(random)))
    memory = Memory([*tensors_of(given), *others])
    converted: list[Any] = []
    ways: tuple[Any, ...] = (
        lambda: checkpoint.from_apex(given),
        lambda: checkpoint.from_transformer_engine(given, params),
        lambda: checkpoint.from_bitsandbytes(given),
    )
    error = attempt(lambda: converted.append(ways[source]()))
    memory.assert_unchanged("what was converted")
    if error is not None:
        return Outcome.refused
    own = [torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(own, master_weights=random.choice((None, "fp32", "split")))
    before = Memory(own)
    error = attempt(lambda: checkpoint.import_float32(optimizer, converted[0]))
    if error is not None:
        before.assert_unchanged(f"params of a refused import ({error})")
        if optimizer.state:
            raise Broken("a refused import left state")
        return Outcome.refused
    memory.assert_unchanged("what was imported")
    return Outcome.accepted


@entrance
def import_float32(random: Random) -> Outcome:
    subject = Subject(random)
    made: Any = checkpoint.export_float32(subject.optimizer)
    if random.random() < 0.3 and subject.dtype == torch.bfloat16:
        for items in made["state"].values():
            if items:
                items["master_param"] = torch.randn(items["exp_avg"].shape)
    made = copied(made)
    for _ in range(random.choice((0, 1, 1, 1, 2))):
        mutate(made, random)
    given = wrapped(made, random) if random.random() < 0.3 else made
    memory = Memory(tensors_of(given))
    outcome = try_call(subject, lambda: checkpoint.import_float32(subject.optimizer, given))
    memory.assert_unchanged("an imported dict")
    if outcome is Outcome.accepted:
        attempt(subject.optimizer.step)
        memory.assert_unchanged("an imported dict, by a step after")
    return outcome


@entrance
def export_float32(random: Random) -> Outcome:
    """Of an optimizer whose state, groups or params were spoilt."""
    from tests.fuzzing.stepping import spoil_group, spoil_params, spoil_state

    subject = Subject(random)
    optimizer = subject.optimizer
    optimizer.init_state()
    subject.twin.init_state()
    kept = {owner: dict(items) for owner, items in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    params = [list(group["params"]) for group in optimizer.param_groups]
    undo_params = lambda: None  # noqa: E731
    kind = random.randrange(4)
    if kind < 2:
        spoil_state(subject, random)
    elif kind == 2:
        spoil_group(random.choice(optimizer.param_groups), random)
    else:
        undo_params = spoil_params(subject, random)  # type: ignore[assignment]
    spoilt = [group.get("params") for group in optimizer.param_groups]
    if not all(type(own) is list and all(isinstance(param, Tensor) for param in own) for own in spoilt):
        return Outcome.refused if attempt(lambda: checkpoint.export_float32(optimizer)) else Outcome.accepted

    def undo() -> None:
        for group, items, own in zip(optimizer.param_groups, groups, params, strict=True):
            group.clear()
            group.update(items, params=own)
        undo_params()
        optimizer.state.clear()
        optimizer.state.update(kept)

    return try_call(subject, lambda: checkpoint.export_float32(optimizer), undo)
