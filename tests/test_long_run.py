"""The long run notices what it is there for: errors, growth, and resumes that are not the run that never stopped."""

import gc
import json

import pytest
import torch

from benchmarks import long_run, long_training
from benchmarks.long_training import FOREACH, FUSED, OURS, Fed, LongRun, Memory, Plan, Resumes, feed, follow
from tests.helpers import running_on

PLAN = Plan(steps=24, width=16, resumes=2)
AT = (3, 5)  # resumes that overlap


@pytest.fixture(autouse=True)
def _settings_are_left_as_they_were():
    """Runs set them for a process of their own."""
    deterministic, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    filled = fills.fill_uninitialized_memory
    with running_on(threads=1):
        yield
    torch.use_deterministic_algorithms(deterministic)
    fills.fill_uninitialized_memory = filled
    gc.unfreeze()


@pytest.fixture(scope="module")
def result():
    """What a whole run gives, made in this process."""
    with running_on(threads=1):
        free = {name: follow(name, PLAN) for name in (OURS, FUSED, FOREACH)}
        for name, moved in long_run.MOVED.items():
            free[name] = follow(OURS, PLAN, moved, AT if name == long_run.RESUMED else ())
        measured = {"plan": vars(PLAN), "seed": 7, "seconds": 1.0, "fed": feed(PLAN), "free": free}
    return {**long_run.conditions(), **measured}


def test_a_run_has_nothing_to_complain_of(result):
    long_run.summarise(result, PLAN)
    # So short a run has no chance to drift, and memory may still settle.
    assert [text for text in result["failures"] if "losses end" not in text and "grew" not in text] == []


def test_errors_are_those_of_other_roundings_and_grow(result):
    errors = result["fed"]["errors"]
    assert set(errors) == PLAN.logged_steps
    for name in (OURS, FUSED, FOREACH):
        first, last = (errors[step][name]["all"] for step in (1, PLAN.steps))
        assert 0 < first["rms"] < last["rms"] < 1e-6
        assert last["rms"] < last["max"] < 1e-5
    rounded = errors[PLAN.steps]["one rounding"]["all"]["rms"]
    assert rounded < errors[PLAN.steps][OURS]["all"]["rms"]


@pytest.mark.parametrize("fault", ["skipped", "wrong lr", "dropped tensor"])
def test_a_wrong_step_shows_in_the_errors(fault):
    run = LongRun(OURS, PLAN.config)
    fed = Fed(run.model, PLAN.config)
    ours = fed.optimizers[OURS]
    step = ours.step

    def broken() -> None:
        if fault == "skipped" and fed.steps == 3:
            return
        if fault == "wrong lr":
            ours.param_groups[0]["lr"] *= 1.01
        if fault == "dropped tensor":
            ours.param_groups[0]["params"][1].grad = None
        step()

    ours.step = broken
    run.optimizer, run.scheduler = fed, long_training.warmup_then_cosine(fed.oracle, PLAN.config)
    for _ in range(6):
        run.train_step()
    errors = fed.errors()
    assert errors[OURS]["all"]["rms"] > 20 * errors[FUSED]["all"]["rms"]


def test_resumes_are_compared_and_have_the_same_bits(result):
    resumes = result["free"][long_run.RESUMED]["resumes"]
    assert sorted(resumes["steps"]) == list(AT)
    assert resumes["differences"] == []


@pytest.mark.parametrize("lost", ["exp_avg", "step"])
def test_a_resume_that_loses_state_is_noticed(lost):
    run = LongRun(OURS, PLAN.config)
    resumes = Resumes(run, OURS, {2})
    resume = LongRun.resume

    def forgetful(self, path):
        resume(self, path)
        for state in self.optimizer.state.values():
            state[lost].zero_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LongRun, "resume", forgetful)
        for _ in range(2 + long_training.STEPS_AFTER_RESUME):
            run.train_step()
            resumes.after_step()
    assert resumes.compared == [2]
    assert any(f"'{lost}'" in place for place in resumes.differences)


def test_resuming_leaves_the_run_as_it_was():
    """The run that is left at random steps is the run that never was."""
    ends = []
    for at in (set(), {1, 2}):
        run = LongRun(OURS, PLAN.config)
        resumes = Resumes(run, OURS, at)
        for _ in range(4):
            run.train_step()
            resumes.after_step()
        ends.append(run.train_losses)
    assert ends[0] == ends[1]


def test_what_is_left_behind_is_counted():
    memory, left = Memory(), []
    memory.sample(0)
    for _ in range(3):
        left += [torch.zeros(1), [[]]]
    memory.sample(1)
    samples = memory.lists()
    assert samples["tensors"][1] - samples["tensors"][0] == 3
    assert samples["objects"][1] - samples["objects"][0] == 3 + 2 * 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda run: run["fed"].update(textbook_distance=1e-9), "off the textbook"),
        (lambda run: run["fed"]["errors"][PLAN.steps][OURS]["all"].update(rms=1.0), "larger than that of torch fused"),
        (lambda run: run["free"][OURS]["memory"]["objects"].append(10**9), "objects"),
        (lambda run: run["free"][OURS]["memory"]["resident_bytes"].extend([10**12] * 20), "resident memory grew"),
        (lambda run: run["free"][long_run.RESUMED]["resumes"]["differences"].append("here"), "here"),
        (lambda run: run["free"][long_run.RESUMED]["resumes"]["steps"].pop(), "only 1 resumes"),
        (lambda run: run["free"][FUSED]["losses"].update(last_train=99.0), "further apart than chance"),
    ],
)
def test_each_check_can_fail(result, change, complaint):
    changed = json.loads(json.dumps(result))
    changed["fed"]["errors"] = {int(step): errors for step, errors in changed["fed"]["errors"].items()}
    change(changed)
    long_run.summarise(changed, PLAN)
    assert any(complaint in failure for failure in changed["failures"])
    assert "**Failed**" in long_run.markdown(changed)


def test_report_and_picture_are_made(result, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.long_run_picture import draw

    long_run.summarise(result, PLAN)
    text = long_run.markdown(result)
    assert "the same bits every time" in text
    assert f"| all | {OURS} |" in text
    draw(result, tmp_path / "long-run.png")
    assert (tmp_path / "long-run.png").read_bytes().startswith(b"\x89PNG")
