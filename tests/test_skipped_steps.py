"""`skipped_steps` counts what found_inf skips, on every path."""

import copy

import pytest
import torch

from adamw_ext import AdamW
from tests.helpers import DEVICES, MODES

FOUND = [0.0, 1.0, 2.0, float("nan"), 0.0, -1.0]  # four of them skip


def make(device: str, **flags: bool) -> AdamW:
    param = torch.nn.Parameter(torch.ones(100, device=device))
    param.grad = torch.ones_like(param)
    return AdamW([param], **flags)


def step(optimizer: AdamW, found: float) -> None:
    optimizer.found_inf = torch.tensor(found, device=optimizer.param_groups[0]["params"][0].device)
    optimizer.step()


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("device", DEVICES)
def test_every_skipped_step_is_counted_and_no_other(device: str, flags: dict[str, bool]) -> None:
    optimizer = make(device, **flags)
    count = optimizer.skipped_steps
    assert (count.dtype, count.shape, count.item()) == (torch.int64, (), 0)
    for i, found in enumerate(FOUND):
        step(optimizer, found)
        assert count.item() == sum(value != 0 for value in FOUND[: i + 1])
    assert optimizer.skipped_steps is count
    (state,) = optimizer.state.values()
    assert state["step"].item() == 2


@pytest.mark.parametrize("arguments", [4096, 32764])
def test_the_emulated_cuda_path_counts_once_for_many_launches(arguments: int) -> None:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2100)]
    for param in params:
        param.grad = torch.ones(1)
    optimizer = AdamW(params, capturable=True)
    optimizer.init_state()
    optimizer._stepper = optimizer._make_stepper([])
    optimizer._stepper.emulated_arguments = arguments
    for found in FOUND:
        step(optimizer, found)
    assert optimizer.skipped_steps.item() == 4
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}


def test_the_count_survives_a_new_stepper_and_is_not_copied() -> None:
    optimizer = make("cpu")
    step(optimizer, 1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    step(optimizer, 1.0)
    assert optimizer.skipped_steps.item() == 2
    assert copy.deepcopy(optimizer).skipped_steps.item() == 0


def test_a_scaler_that_hands_its_numbers_over_is_counted() -> None:
    optimizer = make("cpu", fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (param,) = optimizer.param_groups[0]["params"]
    for factor in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(param.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped_steps.item() == 1


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES.keys())
def test_gradients_may_come_and_go_at_a_skipped_step(flags: dict[str, bool]) -> None:
    """What is part of a step decides where every tensor lies in the table: also after a step that did not happen."""
    runs = []
    for skipped in (False, True):
        params = [torch.nn.Parameter(torch.ones(size)) for size in (1000, 70, 500, 3)]
        optimizer = AdamW(params, **flags)
        for missing in ([], [0], [0, 2], [1], []):
            for i, param in enumerate(params):
                param.grad = None if i in missing else torch.full_like(param, i + 1.0)
            if skipped:
                optimizer.found_inf = torch.ones(())
                optimizer.step()
                optimizer.found_inf = torch.zeros(())
            optimizer.step()
        runs.append([param.detach() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_count_that_a_user_has_emptied_is_made_anew() -> None:
    optimizer = make("cpu")
    step(optimizer, 1.0)
    optimizer.skipped_steps.untyped_storage().resize_(0)
    step(optimizer, 1.0)
    assert optimizer.skipped_steps.item() == 1
