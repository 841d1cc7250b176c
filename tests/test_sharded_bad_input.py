"""DTensors that somebody has taken apart: a step refuses them or takes them as they are; nothing dies or moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.helpers import assert_same_bits
from tests.processes import run
from tests.test_sharded import distributed, tensors

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")

SHAPE = (5, 3)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 1.0},
    {"capturable": True},
    {"stochastic_rounding": True, "moment_dtype": torch.bfloat16},
]


def put(attribute: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda tensor: setattr(tensor, attribute, value(tensor))


def remove(attribute: str) -> Callable[[Any], None]:
    return lambda tensor: delattr(tensor, attribute)


# What is done to a DTensor: to a param, to its gradient, and to its first moment.
EDITS: dict[str, Callable[[Any], None]] = {
    "no part": remove("_local_tensor"),
    "no spec": remove("_spec"),
    "None as part": put("_local_tensor", lambda _: None),
    "a string as part": put("_local_tensor", lambda _: "part"),
    "itself as part": put("_local_tensor", lambda tensor: tensor),
    "a part without memory": put("_local_tensor", lambda _: torch.empty(SHAPE, device="meta")),
    "a sparse part": put("_local_tensor", lambda _: torch.eye(*SHAPE).to_sparse()),
    "a part of another shape": put("_local_tensor", lambda _: torch.zeros(2)),
    "a part of integers": put("_local_tensor", lambda _: torch.zeros(SHAPE, dtype=torch.int32)),
    "a freed part": lambda tensor: tensor._local_tensor.untyped_storage().resize_(0),
    "None as spec": put("_spec", lambda _: None),
    "a string as spec": put("_spec", lambda _: "spec"),
}
# The spec of state and of a gradient that came with the param's is not looked at closer.
HARMLESS = {("moment", "no spec"), ("moment", "None as spec"), ("moment", "a string as spec")}


def take_apart() -> int:
    mesh = tensors().init_device_mesh("cpu", (1,))
    refused = 0
    for options in OPTIONS:
        for name, edit in EDITS.items():
            for target in ("param", "grad", "moment"):
                params = [distributed(torch.ones(SHAPE), mesh, [tensors().Shard(0)]) for _ in range(3)]
                optimizer = AdamW([param.requires_grad_() for param in params], **options)
                for param in params:
                    param.grad = distributed(torch.ones(SHAPE), mesh, [tensors().Shard(0)])
                optimizer.step()
                edited = {"param": params[1], "grad": params[1].grad, "moment": optimizer.state[params[1]]["exp_avg"]}
                edit(edited[target])
                others = [params[0]._local_tensor, params[2]._local_tensor]
                before = [other.clone() for other in others]
                for _ in range(2):
                    try:
                        optimizer.step()
                    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
                        refused += 1
                        assert_same_bits(others, before, (options, target, name))
                        steps = [optimizer.state[param]["step"].item() for param in (params[0], params[2])]
                        assert steps == [1.0, 1.0], (options, target, name)
                    else:
                        assert (target, name) in HARMLESS, (options, target, name)
    return refused


def test_dtensors_that_were_taken_apart_are_refused_and_nothing_changes():
    attempts = len(OPTIONS) * 2 * (3 * len(EDITS) - len(HARMLESS))
    assert run(take_apart, 1) == [attempts]


def use_plain_state() -> Tensor:
    mesh = tensors().init_device_mesh("cpu", (1,))
    param = distributed(torch.ones(SHAPE), mesh, [tensors().Shard(0)]).requires_grad_()
    optimizer = AdamW([param])
    param.grad = distributed(torch.ones(SHAPE), mesh, [tensors().Shard(0)])
    optimizer.step()
    state = optimizer.state[param]
    state["exp_avg"] = state["exp_avg"].full_tensor()
    state["step"] = distributed(state["step"], mesh, [tensors().Replicate()])
    optimizer.step()
    return param.full_tensor().detach()


def test_state_that_was_exchanged_for_equal_tensors_of_another_kind_is_taken():
    plain = torch.ones(SHAPE, requires_grad=True)
    optimizer = AdamW([plain])
    plain.grad = torch.ones(SHAPE)
    for _ in range(2):
        optimizer.step()
    assert_same_bits(run(use_plain_state, 1), [plain.detach()])
