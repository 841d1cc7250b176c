"""torch.distributed.checkpoint loads into a template: the state that an optimizer has already. What it makes of it."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from tests import processes
from tests.checkpointed import (
    MODES,
    assert_same,
    forget,
    groups_of,
    like,
    make,
    make_model,
    make_optimizer,
    own,
    params_of,
    train,
)
from tests.helpers import assert_same_bits

EXPERT = (2, 5)  # the numbers of the last layer's params


def make_templates(sharded: bool) -> None:
    for mode in MODES:
        model, optimizer = make(mode, sharded=sharded)
        first = own(next(model.parameters())).view(-1)
        finfo = torch.finfo(first.dtype)
        for index, value in enumerate([-0.0, finfo.tiny / 2, finfo.max, float("inf"), float("nan")]):
            first[index : index + 1].fill_(value)
        before = [own(param).clone() for param in model.parameters()]
        rates = [group["lr"] for group in optimizer.param_groups]
        _init_optim_state(optimizer)
        assert_same_bits([own(param) for param in model.parameters()], before, mode)
        assert [float(rate) for rate in rates] == [0.05, 0.025]
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
        for param in model.parameters():
            state = {key: own(value) for key, value in optimizer.state[param].items()}
            assert state.pop("step").item() == 1
            if "master_param" in state:
                assert_same_bits([state.pop("master_param").to(param.dtype)], [own(param)], mode)
            assert all(not value.any() for value in state.values()), mode


@pytest.mark.parametrize(("count", "sharded"), [(1, False), (2, True)])
def test_the_step_that_makes_a_template_leaves_all_params_as_they_are(count: int, sharded: bool) -> None:
    """It has zero gradients, and lr 0."""
    processes.run(make_templates, count, sharded)


def test_what_was_initialised_is_a_template_without_a_step() -> None:
    """Otherwise asking for the state dict of a new run counts a step, of torch's own optimizer as well
    (pytorch#164929)."""
    for ours in (False, True):
        model = make_model()
        optimizer = make_either(ours, model)
        steps = {state["step"].item() for state in get_optimizer_state_dict(model, optimizer)["state"].values()}
        assert steps == {1}
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.init_state()
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert state.keys() == dict(model.named_parameters()).keys()
    assert {items["step"].item() for items in state.values()} == {0}


def save_with_expert(folder: Path, initialised: bool) -> None:
    """The last layer gets no gradient, and so no state but what init_state makes."""
    for mode in MODES:
        model, optimizer = make(mode, sharded=True)
        if initialised:
            optimizer.init_state()
        train(optimizer, range(3), without=EXPERT)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"weights": weights, "state": state}, checkpoint_id=folder / mode)


def load_with_expert(folder: Path, sharded: bool) -> None:
    for mode in MODES:
        whole = make(mode)
        train(whole[1], range(3), without=EXPERT)
        train(whole[1], range(3, 5))
        model, optimizer = make(mode, sharded=sharded, lr=0.5)
        forget(model)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"weights": weights, "state": state}, checkpoint_id=folder / mode)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        steps = [optimizer.state[param]["step"].item() for param in model.parameters()]
        assert steps == [3, 3, 3, 3, 0, 0]
        train(optimizer, range(3, 5))
        assert_same((model, optimizer), whole, mode)


def test_what_never_got_a_gradient_is_saved_once_initialised(tmp_path: Path) -> None:
    processes.run(save_with_expert, 2, tmp_path, True)
    processes.run(load_with_expert, 2, tmp_path, True)
    processes.run(load_with_expert, 1, tmp_path, False)


def make_either(ours: bool, model: nn.Module) -> torch.optim.AdamW:
    if ours:
        return make_optimizer(model)
    return torch.optim.AdamW(groups_of(model, 0.05, 0.025), betas=(0.8, 0.9))


def lack_expert(folder: Path, ours: bool) -> None:
    model = make_model()
    source = make_either(ours, model)
    train(source, range(3), without=EXPERT)
    weights, state = get_state_dict(model, source)
    assert len(state["state"]) == 4
    dcp.save({"state": state}, checkpoint_id=folder)
    loading = make_model()
    target = make_either(ours, loading)
    template = get_optimizer_state_dict(loading, target)
    with pytest.raises(dcp.CheckpointException, match=r"Missing key in checkpoint state_dict: state\.state\.2\.weight"):
        dcp.load({"state": template}, checkpoint_id=folder)
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter '2\.weight'"):
        set_optimizer_state_dict(loading, target, state)
    state = copy.deepcopy(state)  # torch's optimizer keeps the very tensors
    lenient = StateDictOptions(strict=False)
    set_state_dict(loading, target, model_state_dict=weights, optim_state_dict=state, options=lenient)
    for optimizer in (source, target):  # what was not loaded starts anew
        train(optimizer, range(3, 5))
    assert_same((loading, target), (model, source), "in memory")


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "adamw_ext"])
def test_what_never_got_a_gradient_is_missed_by_the_template_unless_initialised(tmp_path: Path, ours: bool) -> None:
    processes.run(lack_expert, 1, tmp_path, ours)


@pytest.mark.parametrize("full", [False, True], ids=["parts", "whole"])
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "adamw_ext"])
def test_state_of_params_that_were_frozen_later_is_saved_and_not_loaded(ours: bool, full: bool) -> None:
    """set_optimizer_state_dict leaves out what needs no gradient (pytorch#192202). What was frozen from the start has
    no state to lose."""
    model, resumed = make_model(), make_model()
    source, target = make_either(ours, model), make_either(ours, resumed)
    train(source, range(2))
    model[2].requires_grad_(False)
    resumed[2].requires_grad_(False)
    options = StateDictOptions(full_state_dict=full)
    weights, state = copy.deepcopy(get_state_dict(model, source, options=options))
    assert len(state["state"]) == 6
    set_state_dict(resumed, target, model_state_dict=weights, optim_state_dict=state, options=options)
    assert [bool(target.state.get(param)) for param in resumed.parameters()] == [True] * 4 + [False] * 2
    for param in model[2].parameters():
        del source.state[param]
    for run in ((model, source), (resumed, target)):
        train(run[1], range(2, 3), without=EXPERT)
        run[0][2].requires_grad_(True)
        train(run[1], range(3, 5))
    assert_same((resumed, target), (model, source), "unfrozen")


def save_moments(folder: Path, moment_dtype: torch.dtype | None) -> None:
    model = make_model(torch.bfloat16, sharded=True)
    optimizer = make_optimizer(model, moment_dtype=moment_dtype)
    train(optimizer, range(3))
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"state": state}, checkpoint_id=folder / "parts")
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    torch.save(whole, folder / f"whole{torch.distributed.get_rank()}")


def load_moments(folder: Path, moment_dtype: torch.dtype | None, kept: dict[str, torch.dtype]) -> None:
    """``kept``: the dtype that each way of loading goes through."""
    whole = torch.load(folder / "whole0", weights_only=True)
    for way, dtype in kept.items():
        model = make_model(torch.bfloat16, sharded=True)
        optimizer = make_optimizer(model, moment_dtype=moment_dtype)
        options = StateDictOptions(full_state_dict=way != "parts", broadcast_from_rank0=way == "broadcast")
        state = copy.deepcopy(whole)
        for group in state["param_groups"]:  # torch's loading stumbles over a key that is not here
            group.pop("moment_dtype", None)
        if way == "parts":
            state = get_optimizer_state_dict(model, optimizer)
            lenient = dcp.DefaultLoadPlanner(allow_partial_load=True)  # moment_dtype may not have been saved
            dcp.load({"state": state}, checkpoint_id=folder / "parts", planner=lenient)
        set_optimizer_state_dict(model, optimizer, state, options=options)
        for name, param in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[param][key]
                assert moment.dtype == (moment_dtype or dtype), (way, name, key)
                expected = like(whole["state"][name][key].to(dtype).to(moment.dtype), param)
                assert_same_bits([own(moment)], [own(expected)], (way, name, key))


def test_moments_are_rounded_to_the_dtype_of_the_template(tmp_path: Path) -> None:
    """DCP copies values into the tensors that are there, and so does a broadcast, before the optimizer sees them: set
    ``moment_dtype`` as it was when float32 moments of a bfloat16 model were saved. A whole state dict that all
    processes have keeps its dtype."""
    processes.run(save_moments, 2, tmp_path, torch.float32)
    rounded = {"parts": torch.bfloat16, "broadcast": torch.bfloat16, "whole": torch.float32}
    processes.run(load_moments, 2, tmp_path, None, rounded)
    processes.run(load_moments, 2, tmp_path, torch.float32, dict.fromkeys(rounded, torch.float32))


def test_moments_become_wider_without_loss(tmp_path: Path) -> None:
    processes.run(save_moments, 2, tmp_path, None)
    exact = dict.fromkeys(("parts", "broadcast", "whole"), torch.bfloat16)
    processes.run(load_moments, 2, tmp_path, torch.float32, exact)


def load_other_masters(folder: Path) -> None:
    for there, here in [("split", "fp32"), ("fp32", "split")]:
        source = make_model(torch.bfloat16, sharded=True)
        saved = make_optimizer(source, master_weights=there)
        model = make_model(torch.bfloat16, sharded=True)
        optimizer = make_optimizer(model, master_weights=here)
        for each in (saved, optimizer):
            train(each, range(2))
        dcp.save({"state": get_optimizer_state_dict(source, saved)}, checkpoint_id=folder / there)
        key = {"fp32": "master_param", "split": "param_remainder"}[here]
        with pytest.raises(dcp.CheckpointException, match=f"Missing key in checkpoint.*{key}"):
            dcp.load({"state": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / there)
        options = StateDictOptions(full_state_dict=True)
        whole = get_optimizer_state_dict(source, saved, options=options)
        message = r"loaded state of param '0\.weight' \(group 0, index 0\) must have one master, but has both"
        with pytest.raises(ValueError, match=message):
            set_optimizer_state_dict(model, optimizer, whole, options=options)


def test_a_master_of_another_form_is_refused_not_forgotten(tmp_path: Path) -> None:
    """set_optimizer_state_dict would add it to the one in the template."""
    processes.run(load_other_masters, 2, tmp_path)


def places(optimizer: torch.optim.Optimizer) -> list[int]:
    """Where all tensors lie that a captured step reads or writes."""
    state = [value for items in optimizer.state.values() for value in items.values()]
    numbers = [number for group in optimizer.param_groups for number in (group["lr"], *group["betas"])]
    return [own(tensor).data_ptr() for tensor in (*params_of(optimizer), *state, *numbers)]


def load_in_place(folder: Path) -> None:
    for mode in ("capturable", "float16"):
        model, optimizer = make(mode, sharded=True)
        train(optimizer, range(2))
        before = places(optimizer)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"weights": weights, "state": state}, checkpoint_id=folder / mode)
        options = StateDictOptions(full_state_dict=True)
        whole = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        for loaded in ("parts", "whole"):
            train(optimizer, range(2, 4))
            if loaded == "parts":
                weights, state = get_state_dict(model, optimizer)
                dcp.load({"weights": weights, "state": state}, checkpoint_id=folder / mode)
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
            else:
                set_state_dict(model, optimizer, model_state_dict=whole[0], optim_state_dict=whole[1], options=options)
            assert places(optimizer) == before, (mode, loaded)
            expected = make(mode)
            train(expected[1], range(2))
            assert_same((model, optimizer), expected, (mode, loaded))


def test_a_captured_step_stays_valid(tmp_path: Path) -> None:
    """Loading writes into the tensors that are there."""
    processes.run(load_in_place, 2, tmp_path)


def exchange(folder: Path, from_ours: bool) -> None:
    model = make_model(sharded=True)
    source = make_either(from_ours, model)
    train(source, range(3))
    weights, state = get_state_dict(model, source)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)
    other = make_model(sharded=True)
    forget(other)
    target = make_either(not from_ours, other)
    weights, state = get_state_dict(other, target)
    dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)
    set_state_dict(other, target, model_state_dict=weights, optim_state_dict=state)
    for optimizer in (source, target):
        train(optimizer, range(3, 5))
    for param, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert target.state[param]["step"].item() == 5
        torch.testing.assert_close(own(param), own(expected))


@pytest.mark.parametrize("from_ours", [False, True])
def test_checkpoints_go_to_torchs_optimizer_and_come_from_it(tmp_path: Path, from_ours: bool) -> None:
    processes.run(exchange, 2, tmp_path, from_ours)
