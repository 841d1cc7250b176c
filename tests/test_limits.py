"""Limits, at sizes for every change: what `python -m benchmarks.limits` runs at full size."""

import json
import os
import sys

import pytest
import torch

from benchmarks import limits, limits_sizes, limits_steps, limits_subnormal, limits_values
from benchmarks.limits_subnormal import SUBNORMAL_HYPERS
from benchmarks.limits_values import MODES, PATHS, SKIPPING, SPECIAL_HYPERS, ZEROS
from tests.helpers import ISA_LEVELS
from tests.test_bits import Path

# What these tests prepare and compare is small: only steps get threads.
pytestmark = pytest.mark.usefixtures("one_thread")

# Every level, one thread and several.
FEW = [Path(), *(Path(isa, 2) for isa in ISA_LEVELS[1:]), Path(capturable=True, emulated_arguments=32764)]


# --- Sizes -----------------------------------------------------------------------------------------------------------


def test_every_element_of_a_large_tensor_is_updated_as_those_of_a_small_one(monkeypatch):
    monkeypatch.setattr(limits_sizes, "PERIOD", 10_007)
    limits_sizes.one_huge_tensor(20 * 10_007 + 77)


def test_a_tensor_larger_than_the_memory_is_not_tried(monkeypatch):
    monkeypatch.setattr(limits_sizes, "available_bytes", lambda: 2**30)
    with pytest.raises(SystemExit, match="are available"):
        limits_sizes.one_huge_tensor(1)


def test_many_tensors_have_the_bits_of_one():
    limits_sizes.many_tensors(3_000, steps=2)


def test_tensors_with_step_counts_of_their_own_have_the_bits_of_each_alone():
    limits_sizes.different_counts([400])


def test_many_groups_have_the_bits_of_each_alone():
    limits_sizes.many_groups(400, steps=3)


# --- Steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", limits_steps.FAST_BETAS + limits_steps.SLOW_BETAS)
def test_bias_corrections_are_those_of_60_digits_up_to_a_million_steps(beta):
    steps = [*range(1, 101), *range(101, 1_000_000, 4_999), 999_999, 1_000_000]
    limits_steps.scalars_of_steps(steps, [beta])


def test_a_step_count_stays_where_float32_ends_and_updates_go_on():
    limits_steps.steps_past_the_last_count()


def test_random_bits_stay_where_the_step_count_does():
    limits_steps.rounding_past_the_last_count()


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBNORMAL_HYPERS)
@pytest.mark.parametrize("mode", MODES)
def test_subnormal_numbers_are_flushed_on_every_path_as_in_the_calling_thread_or_on_none(mode, name):
    limits_subnormal.check_subnormal(mode, name, FEW)


def test_threads_made_where_subnormals_are_flushed_compute_as_their_caller():
    limits_subnormal.check_threads_made_otherwise()


def test_a_flushing_step_does_not_leave_other_work_flushing():
    limits_subnormal.check_other_work_keeps_its_arithmetic()


@pytest.mark.parametrize("name", SPECIAL_HYPERS)
@pytest.mark.parametrize("mode", MODES)
def test_nan_payloads_and_infinities_act_as_torchs_and_on_their_element_alone(mode, name):
    if name == "plain":
        limits_values.check_specials(mode, name, FEW)
    limits_values.check_specials(mode, name, [path for path in PATHS if path.threads == 1], spacing=37)


@pytest.mark.parametrize(("flags", "path"), SKIPPING, ids=["fused", "capturable", "emulated"])
@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_changes_no_bit_of_a_nan_either(mode, flags, path):
    limits_values.check_skipped_specials(mode, flags, path)


@pytest.mark.parametrize("mode", MODES)
def test_hyperparameters_of_zero_give_what_the_textbook_says(mode):
    paths = [Path(), Path(ISA_LEVELS[-1], capturable=True)]
    assert sum(limits_values.check_zeros(mode, hyper, paths) for hyper in ZEROS) > 0  # 0/0


# --- The record ------------------------------------------------------------------------------------------------------


def test_a_run_is_written_with_what_it_ran_on(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "runs_of", lambda elements, steps: {f"{elements} and {steps}": lambda: "fine"})
    monkeypatch.setattr(sys, "argv", ["limits", "--elements", "5", "--steps", "7", "--out", os.fspath(tmp_path)])
    limits.main()
    markdown, record = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert "| 5 and 7 | fine | 0.0 |" in markdown.read_text()
    result = json.loads(record.read_text())
    assert result["build"]["torch"] == torch.__version__
    assert [row["limit"] for row in result["rows"]] == ["5 and 7"]


def test_a_wrong_number_fails_the_run(monkeypatch):
    monkeypatch.setattr(limits_sizes.adamw_ext.AdamW, "step", lambda self: self.init_state())
    with pytest.raises(RuntimeError, match="did not move"):
        limits_sizes.one_huge_tensor(100)
    with pytest.raises((RuntimeError, AssertionError)):
        limits_sizes.many_groups(3)
