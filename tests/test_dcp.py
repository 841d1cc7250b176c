"""torch.distributed.checkpoint: what any number of processes saved, any other number loads, and trains on as one process
that was never stopped, bit for bit."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import adamw_ext
from tests import processes
from tests.checkpointed import MODES, assert_same, forget, make, train

# How the state dict looks: the parts of each process under the params' names; flat; whole, in one file that every
# process reads, or that the first one reads for all.
SHARDED: dict[str, dict[str, bool]] = {"sharded": {}, "flat": {"flatten_optimizer_state_dict": True}}
WHOLE: dict[str, dict[str, bool]] = {"whole": {}, "broadcast": {"broadcast_from_rank0": True}}
SAVED_AFTER, END = 3, 5


@functools.cache
def never_stopped(mode: str) -> tuple[nn.Module, adamw_ext.AdamW]:
    model, optimizer = make(mode)
    train(optimizer, range(END))
    return model, optimizer


def save(folder: Path, sharded: bool) -> None:
    runs = {mode: make(mode, sharded=sharded) for mode in MODES}
    for _, optimizer in runs.values():
        train(optimizer, range(SAVED_AFTER))
    for style, flags in SHARDED.items():
        options = StateDictOptions(**flags)
        dcp.save({mode: parts_of(*run, options) for mode, run in runs.items()}, checkpoint_id=folder / style)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = {
        mode: (get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options))
        for mode, (model, optimizer) in runs.items()
    }
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        torch.save(whole, folder / "whole")
    for mode, (_, optimizer) in runs.items():  # saving has disturbed nothing
        train(optimizer, range(SAVED_AFTER, END))
        assert_same(runs[mode], never_stopped(mode), mode)


def parts_of(model: nn.Module, optimizer: adamw_ext.AdamW, options: StateDictOptions) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer, options=options)
    return {"weights": weights, "state": state}


def resume(folder: Path, sharded: bool) -> None:
    for style, flags in SHARDED.items():
        options = StateDictOptions(**flags)
        runs = fresh(sharded)
        loaded = {mode: parts_of(*run, options) for mode, run in runs.items()}
        dcp.load(loaded, checkpoint_id=folder / style)
        for mode, (model, optimizer) in runs.items():
            weights, state = loaded[mode]["weights"], loaded[mode]["state"]
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
            check_resumed(mode, runs[mode], (style, mode))


def resume_whole(folder: Path, sharded: bool, styles: list[str]) -> None:
    for style in styles:
        options = StateDictOptions(full_state_dict=True, **WHOLE[style])
        reads = style == "whole" or distributed.get_rank() == 0
        loaded = torch.load(folder / "whole", weights_only=True) if reads else {}
        runs = fresh(sharded)
        for mode, (model, optimizer) in runs.items():
            weights, state = loaded.get(mode, ({}, {}))
            set_model_state_dict(model, weights, options=options)
            set_optimizer_state_dict(model, optimizer, state, options=options)
            check_resumed(mode, runs[mode], (style, mode))


def fresh(sharded: bool) -> dict[str, tuple[nn.Module, adamw_ext.AdamW]]:
    """New runs, which know neither weights nor learning rate."""
    runs = {mode: make(mode, sharded=sharded, lr=0.5) for mode in MODES}
    for model, _ in runs.values():
        forget(model)
    return runs


def check_resumed(mode: str, run: tuple[nn.Module, adamw_ext.AdamW], what: object) -> None:
    (group,) = run[1].param_groups
    (expected,) = never_stopped(mode)[1].param_groups
    for key in expected.keys() - {"params"}:
        assert type(group[key]) is type(expected[key]), (what, key)
        assert group[key] == expected[key], (what, key)
    assert {state["step"].item() for state in run[1].state.values()} == {SAVED_AFTER}, what
    train(run[1], range(SAVED_AFTER, END))
    assert_same(run, never_stopped(mode), what)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders, by what the checkpoints in them were saved from."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sharded", "plain")}
    processes.run(save, 2, folders["sharded"], True)
    processes.run(save, 1, folders["plain"], False, backend=None)
    return folders


@pytest.mark.parametrize("source", ["sharded", "plain"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_resume_a_run_bit_for_bit(saved: dict[str, Path], count: int, source: str) -> None:
    processes.run(resume, count, saved[source], True)


@pytest.mark.parametrize("source", ["sharded", "plain"])
def test_one_process_without_shards_resumes_a_run_bit_for_bit(saved: dict[str, Path], source: str) -> None:
    processes.run(resume, 1, saved[source], False, backend=None)


def test_whole(saved: dict[str, Path]) -> None:
    for count in (1, 2, 4):
        processes.run(resume_whole, count, saved["sharded"], True, ["whole", "broadcast"])
    processes.run(resume_whole, 1, saved["sharded"], False, ["whole"], backend=None)
