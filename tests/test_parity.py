"""Training to the end of a cosine schedule: every precision mode reaches float32's loss, plain bfloat16 does not."""

import copy

import pytest

from benchmarks import parity
from benchmarks.parity import BOUNDS, MOVED, MUST_FAIL, PLAIN_EXCESS, REFERENCE

NEAREST_MOMENTS, RANDOM_MOMENTS = "bf16, split master", "bf16, split master, SR"


@pytest.fixture(scope="module")
def result():
    return parity.measure()


def test_the_reference_learns_most_of_what_there_is_to_learn(result):
    start = sum(result["loss_at_start"]) / len(result["loss_at_start"])
    learnt = (start - result["modes"][REFERENCE]["loss"]) / (start - result["entropy"])
    assert 0.7 < learnt < 1.0


@pytest.mark.parametrize("mode", BOUNDS)
def test_final_loss_is_that_of_float32_within_the_modes_bound(mode, result):
    assert abs(result["modes"][mode]["excess"]) <= BOUNDS[mode]


@pytest.mark.parametrize("mode", MUST_FAIL)
def test_plain_bfloat16_is_far_worse_or_else_nothing_is_tested(mode, result):
    assert result["modes"][mode]["excess"] > PLAIN_EXCESS


def test_both_kinds_of_master_train_to_the_same_bits(result):
    losses = [result["modes"][f"bf16, {kind} master, fp32 moments"]["losses"] for kind in ("fp32", "split")]
    assert losses[0] == losses[1]


def test_moments_rounded_to_nearest_cost_what_moments_rounded_at_random_do_not(result):
    nearest, random = (result["modes"][mode]["excess"] for mode in (NEAREST_MOMENTS, RANDOM_MOMENTS))
    assert abs(random) <= BOUNDS[MOVED] < nearest


@pytest.mark.slow
def test_four_times_as_many_steps_keep_the_bounds():
    modes = parity.measure(steps=4 * parity.STEPS)["modes"]
    excesses = {name: mode["excess"] for name, mode in modes.items()}
    assert {name for name, bound in BOUNDS.items() if abs(excesses[name]) > bound} == set()
    assert min(excesses[name] for name in MUST_FAIL) > PLAIN_EXCESS
    # Rounding moments to nearest costs more the longer the run is: why the default moments of bf16 have no bound.
    assert excesses[NEAREST_MOMENTS] > 0.001


def test_the_report_says_which_bounds_are_broken(result):
    assert "NO" not in parity.markdown({**result, "date": "today", "build": parity.adamw_ext.build_info()})
    broken = copy.deepcopy(result)
    broken["modes"]["bf16, SR"]["excess"] = 0.0021
    broken["modes"]["bf16"]["excess"] = 0.009
    text = parity.markdown({**broken, "date": "today", "build": parity.adamw_ext.build_info()})
    assert "| <= 0.20%: NO |" in text
    assert "| > +1%: NO |" in text
