"""docs/MIGRATION.md: its code runs, and what it says of checkpoints is so.

Checkpoints of apex, TransformerEngine and bitsandbytes have their tests in test_checkpoint.py, torch's in
test_state_dict.py; here are those of DeepSpeed and torchao, re-enacted likewise.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.test_checkpoint
import tests.test_state_dict
from adamw_ext import AdamW
from tests.helpers import assert_same_bits
from tests.test_checkpoint import FLOAT32, Peer, assert_continues, make_peer, masters_of, params_of, two_groups

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDE = (Path(__file__).parent.parent / "docs" / "MIGRATION.md").read_text()


# --- State dicts of DeepSpeed and torchao ----------------------------------------------------------------------------


def as_deepspeed_cpu_adam(peer: Peer) -> dict[str, Any]:
    """0.19.8: every param's own step, an int; float32 moments."""
    state = {
        i: {"step": peer.updates[i], "exp_avg": peer.exp_avgs[i], "exp_avg_sq": peer.exp_avg_sqs[i]}
        for i in peer.used()
    }
    groups = [{**group, "bias_correction": True, "amsgrad": False} for group in peer.groups]
    return copy.deepcopy({"state": state, "param_groups": groups})


def as_deepspeed_fused_adam(peer: Peer) -> dict[str, Any]:
    """0.19.8: the group's step stays 0, and of the params' only that of the last one in each group advances."""
    state_dict = as_deepspeed_cpu_adam(peer)
    for group in state_dict["param_groups"]:
        group["step"] = 0
        del group["amsgrad"]
        for number in group["params"][:-1]:
            state_dict["state"][number]["step"] = 0
    return state_dict


def as_torchao(peer: Peer, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """0.18.0, ``_AdamW``: lr is a tensor, moments have the param's dtype."""
    state_dict = as_deepspeed_cpu_adam(peer)
    for items in state_dict["state"].values():
        items["step"] = torch.tensor(float(items["step"]))
        items |= {key: items[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}
    for group in state_dict["param_groups"]:
        group["lr"] = torch.tensor(group["lr"])
        del group["bias_correction"]
    return state_dict


def test_deepspeed_cpu_adam_continues() -> None:
    peer = make_peer(frozen=1)
    optimizer = AdamW(two_groups(peer.model(FLOAT32)))
    optimizer.load_state_dict(as_deepspeed_cpu_adam(peer))
    assert [float(state["step"]) for state in optimizer.state.values()] == [3.0, 3.0, 3.0]
    assert_continues(optimizer, peer, frozen=1)


def test_deepspeed_cpu_adams_float32_moments_stay_float32_beside_bfloat16_params() -> None:
    peer = make_peer()
    optimizer = AdamW(two_groups(peer.model([torch.bfloat16] * 4)), moment_dtype=torch.float32)
    optimizer.load_state_dict(as_deepspeed_cpu_adam(peer))
    for key, expected in (("exp_avg", peer.exp_avgs), ("exp_avg_sq", peer.exp_avg_sqs)):
        assert_same_bits([optimizer.state[param][key] for param in params_of(optimizer)], expected, key)


def test_deepspeed_fused_adam_continues_after_its_steps_are_mended() -> None:
    peer = make_peer()
    saved = as_deepspeed_fused_adam(peer)
    namespace: dict[str, Any] = {}
    exec(blocks("DeepSpeed")[1].split("# was")[0], namespace)
    namespace["mend_steps"](saved, updates=peer.step)
    optimizer = AdamW(two_groups(peer.model(FLOAT32)))
    optimizer.load_state_dict(saved)
    assert [float(state["step"]) for state in optimizer.state.values()] == [3.0] * 4
    assert_continues(optimizer, peer)


def test_torchao_continues() -> None:
    peer = make_peer(frozen=1)
    optimizer = AdamW(two_groups(peer.model(FLOAT32)))
    optimizer.load_state_dict(as_torchao(peer))
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)
    assert_continues(optimizer, peer, frozen=1)


# --- The guide's code ------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", GUIDE, flags=re.MULTILINE)
    assert "```python" not in parts[0]
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(section: str) -> list[str]:
    """The code of a section. None stands there in any other form of block."""
    found = re.findall(r"^```python\n(.*?)^```$", sections()[section], flags=re.MULTILINE | re.DOTALL)
    assert sections()[section].count("```") == 2 * len(found)
    return found


def as_torch(peer: Peer) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(two_groups(peer.model(FLOAT32)))
    optimizer.load_state_dict(as_torchao(peer))
    return optimizer.state_dict()


BFLOAT16 = [torch.bfloat16] * len(FLOAT32)

# Dtypes of the model, and the state dict that stands beside it, whose moments' dtype stays.
SOURCES = {
    "torch.optim.AdamW": (FLOAT32, as_torch),
    "apex FusedAdam": (BFLOAT16, lambda peer: peer.as_apex(capturable=True)),
    "DeepSpeed": (BFLOAT16, as_deepspeed_cpu_adam),
    "TransformerEngine FusedAdam": (BFLOAT16, lambda peer: peer.as_transformer_engine(BFLOAT16, remainders=True)),
    "bitsandbytes": (BFLOAT16, Peer.as_bitsandbytes),
    "torchao": (BFLOAT16, lambda peer: as_torchao(peer, torch.bfloat16)),
}


def one_group(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same for ``model.parameters()``, with the first group's hyperparameters."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], "params": numbers}]}


def test_every_section_with_code_is_run() -> None:
    assert [name for name in sections() if blocks(name)] == list(SOURCES)


@pytest.mark.parametrize("section", SOURCES)
def test_the_code_of_the_guide_continues(section: str) -> None:
    dtypes, layout = SOURCES[section]
    peer = make_peer()
    model = nn.ParameterList(peer.model(dtypes))
    namespace: dict[str, Any] = {"model": model, "saved": one_group(layout(peer)), "steps_made": peer.step}
    for block in blocks(section):
        exec(block, namespace)
        optimizer = namespace["optimizer"]
        assert type(optimizer) is AdamW
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (pytest.approx(0.02), (0.9, 0.99))
        for i, param in enumerate(model):
            state = optimizer.state[param]
            assert float(state["step"]) == peer.step
            for key, moment in (("exp_avg", peer.exp_avgs[i]), ("exp_avg_sq", peer.exp_avg_sqs[i])):
                kept = torch.bfloat16 if section == "torchao" else torch.float32
                assert_same_bits([state[key]], [moment.to(kept)], key)
        if group.get("master_weights") == "split":
            assert_same_bits(masters_of(optimizer), peer.values)
        before = [param.detach().clone() for param in model if param.numel()]
        for param in model:
            param.grad = torch.ones_like(param)
        optimizer.step()
        after = [param.detach() for param in model if param.numel()]
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert all(float(optimizer.state[param]["step"]) == peer.step + 1 for param in model)


def test_the_tests_that_the_guide_names_exist() -> None:
    names = set(re.findall(r"`(test_\w+)`", GUIDE))
    assert len(names) > 5
    known = {*globals(), *vars(tests.test_checkpoint), *vars(tests.test_state_dict)}
    assert names <= known


def test_the_defaults_that_the_guide_warns_of() -> None:
    (group,) = AdamW([torch.zeros(1, requires_grad=True)]).param_groups
    assert group["weight_decay"] == 0.01
