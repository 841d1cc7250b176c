"""Thousands of random bad inputs: none kills the process, and what is refused changes nothing. See tests/fuzzing."""

import os
import random

import pytest
import torch

from tests.fuzzing.cases import ENTRANCES, Subject, try_call
from tests.fuzzing.observe import Broken
from tests.fuzzing.run import fuzz, load_entrances

SEEDS = int(
    os.environ.get("TESTS_FUZZING_SEEDS", "215")
)  # of each entrance; fewer on slow builds (tests/sanitizers.py)


@pytest.fixture(scope="module")
def tally():
    load_entrances()
    return fuzz(list(ENTRANCES), first=0, count=SEEDS)


def test_nothing_that_is_handed_over_kills_the_process_or_changes_anything_by_a_refusal(tally):
    assert tally.broken == []


def test_every_entrance_is_tried_and_refuses_some_and_accepts_some(tally):
    assert set(tally.counts) == set(ENTRANCES)
    assert "TESTS_FUZZING_SEEDS" in os.environ or sum(counts.total() for counts in tally.counts.values()) >= 5000
    for name, counts in tally.counts.items():
        assert sum(counts.values()) == SEEDS, name
        assert counts["accepted"] >= SEEDS // 20, name
        assert counts["refused"] >= (0 if name == "setstate_of_older_versions" else SEEDS // 20), name


# --- The harness notices faults --------------------------------------------------------------------------------------


def moves_a_param(optimizer):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].view(-1)[:1].add_(1.0)


def counts_a_step(optimizer):
    for items in optimizer.state.values():
        items["step"] += 1


def drops_state(optimizer):
    optimizer.state.clear()


def changes_lr(optimizer):
    optimizer.param_groups[0]["lr"] = 0.7


def scales_a_gradient(optimizer):
    optimizer.param_groups[0]["params"][0].grad.mul_(0.5)


def writes_beside_a_param(optimizer):
    param = optimizer.param_groups[0]["params"][0]
    torch.empty(0).set_(param.untyped_storage())[0] = 1.0


def dies_of_an_assertion(optimizer):
    raise AssertionError("internal")


FAULTS = (
    moves_a_param,
    counts_a_step,
    drops_state,
    changes_lr,
    scales_a_gradient,
    writes_beside_a_param,
    dies_of_an_assertion,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_refusal_that_changes_something_is_noticed(fault):
    torch.manual_seed(0)
    subject = Subject(random.Random(1), dtype=torch.float32)
    subject.good_step()
    subject.give_grads()

    def refuse():
        fault(subject.optimizer)
        raise RuntimeError("too late")

    with pytest.raises(Broken):
        try_call(subject, refuse)


def test_a_case_that_kills_its_process_is_named_and_the_run_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("TESTS_FUZZING_DIES_AT", "1")
    tally = fuzz(["step_scaling"], first=0, count=3)
    assert [(name, seed) for name, seed, _ in tally.broken] == [("step_scaling", 1)]
    assert "Aborted" in tally.broken[0][2]
    assert sum(tally.counts["step_scaling"].values()) == 3
