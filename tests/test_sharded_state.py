"""State of sharded params in other ways than torch.distributed.checkpoint's: whole, in the common form, or refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import adamw_ext
from adamw_ext import checkpoint
from tests import processes
from tests.checkpointed import (
    MODES,
    assert_same,
    forget,
    like,
    make,
    make_model,
    make_optimizer,
    own,
    params_of,
    train,
)
from tests.helpers import assert_same_bits

SAVED_AFTER, END = 3, 5
MASTERS = ("fp32", "split", None)


def trained(mode: str, steps: int, *, sharded: bool = False) -> tuple[nn.Module, adamw_ext.AdamW]:
    model, optimizer = make(mode, sharded=sharded)
    train(optimizer, range(steps))
    return model, optimizer


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """From a model that is whole, or sharded as the other."""
    for param, value in zip(target.parameters(), source.parameters(), strict=True):
        own(param).copy_(own(value if isinstance(value, DTensor) else like(value, param)))


def load_whole() -> None:
    for mode in MODES:
        source, saved = trained(mode, SAVED_AFTER)
        model, optimizer = make(mode, sharded=True, lr=0.5)
        copy_weights(source, model)
        optimizer.load_state_dict(saved.state_dict())
        assert_same((model, optimizer), (source, saved), mode)
        assert optimizer.param_groups[0]["lr"] == saved.param_groups[0]["lr"]
        train(optimizer, range(SAVED_AFTER, END))
        assert_same((model, optimizer), trained(mode, END), mode)


@pytest.mark.parametrize("count", [2, 4])
def test_a_plain_state_dict_is_cut_for_shards(count: int) -> None:
    processes.run(load_whole, count)


def make_with_masters(masters: str | None, *, sharded: bool = False) -> tuple[nn.Module, adamw_ext.AdamW]:
    model = make_model(torch.bfloat16, sharded=sharded)
    return model, make_optimizer(model, master_weights=masters, moment_dtype=torch.float32)


def move(exported: dict[str, Any], masters: str | None, *, sharded: bool) -> tuple[nn.Module, adamw_ext.AdamW]:
    """A run that goes on from the common form with other masters. Its params come from those that were exported."""
    model, optimizer = make_with_masters(masters, sharded=sharded)
    forget(model)
    checkpoint.import_float32(optimizer, exported)
    train(optimizer, range(SAVED_AFTER, END))
    return model, optimizer


def expected_of(masters: str | None) -> tuple[nn.Module, adamw_ext.AdamW]:
    """The unsharded run: with masters never stopped, as those of both forms have the same bits."""
    run = make_with_masters(masters or "split")
    train(run[1], range(END if masters else SAVED_AFTER))
    return run if masters else move(checkpoint.export_float32(run[1]), None, sharded=False)


def export(folder: Path) -> None:
    whole, source = make_with_masters("split"), make_with_masters("split", sharded=True)
    for _, optimizer in (whole, source):
        train(optimizer, range(SAVED_AFTER))
    expected, exported = (checkpoint.export_float32(optimizer) for _, optimizer in (whole, source))
    for number, param in enumerate(params_of(source[1])):
        items, wanted = exported["state"][number], expected["state"][number]
        assert list(items) == list(wanted) == ["step", "exp_avg", "exp_avg_sq", "master_param"]
        for key in ("exp_avg", "exp_avg_sq", "master_param"):
            assert isinstance(items[key], DTensor)
            assert_same_bits([own(items[key])], [own(like(wanted[key], param))], (number, key))
    for masters in MASTERS:
        assert_same(move(exported, masters, sharded=True), expected_of(masters), masters)
    dcp.save({"state": exported}, checkpoint_id=folder)


def import_elsewhere(folder: Path, sharded: bool) -> None:
    for masters in ("fp32", "split"):  # without, the template has no place for what was saved
        _, optimizer = make_with_masters(masters, sharded=sharded)
        optimizer.init_state()
        template = checkpoint.export_float32(optimizer)
        dcp.load({"state": template}, checkpoint_id=folder)
        assert_same(move(template, masters, sharded=sharded), expected_of(masters), masters)


def test_the_common_form_of_shards_goes_to_other_masters_and_other_processes(tmp_path: Path) -> None:
    processes.run(export, 2, tmp_path)
    processes.run(import_elsewhere, 4, tmp_path, True)
    processes.run(import_elsewhere, 1, tmp_path, False)


def as_shard_1(value: DTensor) -> DTensor:
    return value.redistribute(placements=[Shard(1)])


def as_replicate(value: DTensor) -> DTensor:
    return value.redistribute(placements=[Replicate()])


def on_another_mesh(value: DTensor) -> DTensor:
    """Of the same processes in another order."""
    mesh = DeviceMesh("cpu", list(reversed(range(value.device_mesh.size()))))
    return distribute_tensor(torch.zeros(value.shape), mesh, value.placements, src_data_rank=None)


def larger_whole(value: DTensor) -> Tensor:
    return torch.zeros(value.shape[0] + 1, *value.shape[1:])


def too_wide(value: DTensor) -> DTensor:
    """Numbers that do not fit into 16 bits."""
    return value + 2**16


PLACED = r"must be placed as a DTensor of shape \(3, 7\) placed \(Shard\(dim=0\),\)"
REFUSED: dict[str, tuple[str, str, Callable[[DTensor], Tensor], str]] = {
    "other dimension": ("float32", "exp_avg", as_shard_1, PLACED + r".*, but is a DTensor .*Shard\(dim=1\)"),
    "not cut": ("float32", "exp_avg_sq", as_replicate, PLACED + r".*, but is a DTensor .*Replicate\(\)"),
    "other mesh": ("float32", "exp_avg", on_another_mesh, PLACED + ".*, but is a DTensor"),
    "other whole": ("float32", "exp_avg", larger_whole, PLACED + r".*, or whole, but has shape \(4, 7\)"),
    "amsgrad": ("amsgrad", "max_exp_avg_sq", as_shard_1, PLACED),
    "master": ("float32 masters", "master_param", as_replicate, PLACED),
    "remainder": ("split", "param_remainder", as_replicate, PLACED),
    "remainder out of range": (
        "split",
        "param_remainder",
        too_wide,
        r"must be a torch\.int16 tensor of shape .*, but is a torch\.int32 tensor",
    ),
}


def refuse() -> None:
    for what, (mode, key, change, message) in REFUSED.items():
        model, optimizer = trained(mode, SAVED_AFTER, sharded=True)
        state_dict = copy.deepcopy(optimizer.state_dict())
        train(optimizer, range(SAVED_AFTER, END))
        state_dict["param_groups"][0]["lr"] = 0.5
        state_dict["state"][1][key] = change(state_dict["state"][1][key])  # others come first
        with pytest.raises(
            ValueError, match=rf"loaded state '{key}' of param '1\.weight' \(group 0, index 1\) {message}"
        ):
            optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert_same((model, optimizer), trained(mode, END), what)


def test_state_that_does_not_belong_to_the_shards_is_refused_and_changes_nothing() -> None:
    processes.run(refuse, 2)


def refuse_shards() -> None:
    for mode, key in [("float32", "exp_avg"), ("float32 masters", "master_param"), ("split", "param_remainder")]:
        _, sharded = trained(mode, SAVED_AFTER, sharded=True)
        model, optimizer = trained(mode, END)
        state_dict = copy.deepcopy(trained(mode, SAVED_AFTER)[1].state_dict())
        state_dict["state"][1][key] = sharded.state_dict()["state"][1][key]
        message = rf"loaded state '{key}' of param '1\.weight' .* must be a plain tensor, .* see full_tensor\(\)"
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
        assert_same((model, optimizer), trained(mode, END), mode)


def test_shards_are_refused_by_a_whole_param() -> None:
    processes.run(refuse_shards, 2)
