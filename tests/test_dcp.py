"""torch.distributed.checkpoint (DCP): what any number of processes saved, any other number loads, and trains on as one
process that was never stopped, bit for bit."""

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
from tests.checkpointed import MODES, assert_same, forget, groups_of, make, make_model, train

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
        mode: (
            get_model_state_dict(model, options=options),
            get_optimizer_state_dict(model, optimizer, options=options),
        )
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


def resume(folder: Path, sharded: bool, styles: dict[str, dict[str, bool]] = SHARDED) -> None:
    for style, flags in styles.items():
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
            for items in state.get("state", {}).values():
                if "param_remainder" in items:  # of plain params int16, which neither gloo nor NCCL hands out
                    items["param_remainder"] = items["param_remainder"].int()
            set_optimizer_state_dict(model, optimizer, state, options=options)
            set_model_state_dict(model, weights, options=options)
            check_resumed(mode, runs[mode], (style, mode))


def fresh(sharded: bool) -> dict[str, tuple[nn.Module, adamw_ext.AdamW]]:
    """New runs, which know neither weights nor learning rate."""
    runs = {mode: make(mode, sharded=sharded, lr=0.5) for mode in MODES}
    for model, _ in runs.values():
        forget(model)
    return runs


def check_resumed(mode: str, run: tuple[nn.Module, adamw_ext.AdamW], what: object) -> None:
    for group, expected in zip(run[1].param_groups, never_stopped(mode)[1].param_groups, strict=True):
        assert group.keys() == expected.keys()
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


@pytest.mark.parametrize(("count", "source"), [(1, "sharded"), (2, "sharded"), (4, "sharded"), (2, "plain")])
def test_any_number_of_processes_resume_a_run(saved: dict[str, Path], count: int, source: str) -> None:
    processes.run(resume, count, saved[source], True)


@pytest.mark.parametrize("source", ["sharded", "plain"])
def test_one_process_resumes_a_run_without_shards(saved: dict[str, Path], source: str) -> None:
    processes.run(resume, 1, saved[source], False, backend=None)


@pytest.mark.parametrize("source", ["sharded", "plain"])
def test_whole_state_dicts_are_cut_for_shards(saved: dict[str, Path], source: str) -> None:
    processes.run(resume_whole, 2, saved[source], True, ["whole", "broadcast"])


def test_whole_state_dicts_load_without_shards(saved: dict[str, Path]) -> None:
    processes.run(resume_whole, 1, saved["sharded"], False, ["whole"], backend=None)


def save_and_train_on(folder: Path) -> None:
    runs = {mode: make(mode, sharded=True) for mode in MODES}
    for _, optimizer in runs.values():
        train(optimizer, range(SAVED_AFTER))
    saving = dcp.async_save(
        {mode: parts_of(*run, StateDictOptions()) for mode, run in runs.items()},
        checkpoint_id=folder / "sharded",
        process_group=distributed.new_group(backend="gloo"),  # the default one is busy with the norms of gradients
    )
    for mode, run in runs.items():
        train(run[1], range(SAVED_AFTER, END))
        assert_same(run, never_stopped(mode), mode)
    saving.result()


def test_what_is_saved_while_training_goes_on_is_the_state_at_the_call(tmp_path: Path) -> None:
    processes.run(save_and_train_on, 2, tmp_path)
    processes.run(resume, 1, tmp_path, False, {"sharded": SHARDED["sharded"]}, backend=None)


@pytest.mark.parametrize("mode", ["float32", "amsgrad", "capturable"])
def test_what_resumed_runs_are_compared_with_is_adamw(mode: str) -> None:
    model = make_model()
    groups = groups_of(model, 0.05, 0.025)
    train(torch.optim.AdamW(groups, betas=(0.8, 0.9), amsgrad=mode == "amsgrad"), range(END))
    for param, expected in zip(never_stopped(mode)[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(param, expected)
