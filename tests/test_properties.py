"""Any list of tensors, any history of steps: the same bits every way, the textbook's numbers, no byte beside.

Hypothesis draws the cases (tests/strategies.py), the same ones at every run; `python -m tests.long_properties` draws
many others, at random. A failing case is printed as data that can be pasted, after an import of tests.scenarios and
tests.ways, into :func:`check_same`.
"""

import dataclasses

import pytest
import torch
from hypothesis import event, given

from adamw_ext import _C
from tests.guarded import Guarded, Place
from tests.helpers import running_on
from tests.jobs import Job, done
from tests.scenarios import FUNCTIONAL_MODES, PLACELESS_MODES, Scenario
from tests.strategies import classes, functionals, scenarios, scripts
from tests.textbooks import Textbooks
from tests.ways import Class, Way, assert_same_results, results

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported):DeprecationWarning"),
]


def check_same(scenario: Scenario, way: Way) -> None:
    """The bits of the Python class on one thread and without vector instructions. Every run checks, after every step,
    that no byte has changed but those of params with gradients and of their state (tests/jobs.py)."""
    note(scenario)
    assert_same_results(results(scenario, way), results(scenario, Class()))


def note(scenario: Scenario) -> None:
    """For `python -m tests.long_properties`, which reports how many scenarios of which kinds there were."""
    done["scenarios"] += 1
    params = [spec for _, spec in scenario.params]
    done["scenarios, with max_grad_norm"] += scenario.clips
    done["scenarios, with grad_scale"] += scenario.unscales
    done["scenarios, with found_inf not 0"] += any(step.is_skipped for step in scenario.steps)
    done["scenarios, with idle params"] += any(step.idle for step in scenario.steps)
    done["scenarios, with NaN and infinities"] += "special" in (scenario.numbers, *(s.numbers for s in scenario.steps))
    done["scenarios, with several groups"] += len(scenario.groups) > 1
    done["scenarios, with more than 500 tensors"] += len(params) > 500
    done["scenarios, with empty tensors"] += any(0 in spec.shape for spec in params)
    done["scenarios, with strided or permuted params"] += any(spec.layout != "contiguous" for spec in params)
    for mode in sorted({group.mode for group in scenario.groups}):
        done[f"scenarios, mode {mode!r}"] += 1


@given(scenario=scenarios(), way=classes)
def test_the_class_has_the_same_bits_however_it_runs(scenario: Scenario, way: Class) -> None:
    check_same(scenario, way)


@given(scenario=scenarios(modes=PLACELESS_MODES, can_clip=False), way=classes)
def test_an_optimizer_for_each_param_has_the_bits_of_one_for_all(scenario: Scenario, way: Class) -> None:
    check_same(scenario, dataclasses.replace(way, is_apart=True))


@given(scenario=scenarios(modes=FUNCTIONAL_MODES, can_clip=False), way=functionals)
def test_the_functional_forms_have_the_bits_of_the_class(scenario: Scenario, way: Way) -> None:
    check_same(scenario, way)


@given(scenario=scenarios().map(Scenario.without_empty_groups), way=scripts)
def test_the_script_class_goes_on_with_the_bits_of_the_python_class(scenario: Scenario, way: Way) -> None:
    check_same(scenario, way)


@given(scenario=scenarios(modes=("split", "split, float32 moments", "at random, split")), way=classes)
def test_split_masters_have_the_bits_of_whole_ones(scenario: Scenario, way: Class) -> None:
    whole = [dataclasses.replace(group, mode=group.mode.replace("split", "fp32")) for group in scenario.groups]
    note(scenario)
    actual, expected = results(scenario, way), results(dataclasses.replace(scenario, groups=tuple(whole)), way)
    remainders = actual.pop("param_remainder", [])
    if remainders:
        actual["master_param"] = [
            _C.join_master(param, remainder) if param.dtype == torch.bfloat16 else torch.zeros(0)
            for param, remainder in zip(actual["param"], remainders, strict=True)
        ]
    assert_same_results(actual, expected)


@running_on(threads=1)
def check_bounds(scenario: Scenario, way: Class) -> Textbooks:
    """Of every step, from wherever it begins. tests/bounds.py says how much rounding is allowed."""
    note(scenario)
    job = Job(scenario, gives_state=way.is_guarded)
    textbooks = Textbooks(job)
    way.run(job, textbooks.watch)
    return textbooks


@given(scenario=scenarios(), way=classes)
def test_every_step_is_the_textbooks_but_for_rounding(scenario: Scenario, way: Class) -> None:
    textbooks = check_bounds(scenario, dataclasses.replace(way, is_dense=False, saved_after=None))
    done["numbers compared with the textbook"] += textbooks.checked
    done["numbers not compared: near overflow, not finite, or over a denominator of 0"] += (
        textbooks.total - textbooks.checked
    )
    event(f"{10 * textbooks.checked // max(textbooks.total, 1) * 10}% of the numbers can be claimed")


@pytest.mark.parametrize("where", ["before", "in a gap", "behind", "a tensor to be left alone"])
def test_a_stray_byte_is_noticed(where: str) -> None:
    """By the guards that all properties rely on."""
    places = [Place((5,), (2,), torch.float16, offset=3, has_gaps=True), Place((4, 2), (2, 1), torch.float64)]
    storage = Guarded(places, torch.Generator().manual_seed(0))
    strided, dense = storage.tensors
    with storage.only_written_in([True, True], "tensor"):
        strided.fill_(1.0)
        dense.fill_(1.0)
    strays = {
        "before": strided.as_strided((1,), (1,), strided.storage_offset() - 1),
        "in a gap": strided.as_strided((1,), (1,), strided.storage_offset() + 3),
        "behind": dense.as_strided((1,), (1,), dense.storage_offset() + 8),
        "a tensor to be left alone": dense[2:3, 1],
    }
    with pytest.raises(AssertionError, match="bytes were written"), storage.only_written_in([True, False], "tensor"):
        strays[where].view(torch.int16 if strays[where].itemsize == 2 else torch.int64).bitwise_xor_(1)
