"""The cluster example ends as it must, its checks fail when they should, and no kill leaves half a checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from examples.cluster import LOSS_TOLERANCE, PARAM_TOLERANCE, compare, failures, plan, read_log
from examples.cluster_train import FULL, SHORT, newest_checkpoint, remove_partial_checkpoints
from examples.compare import distance
from tests.helpers import assert_same_bits

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")


# --- The example, once -----------------------------------------------------------------------------------------------


def test_a_killed_training_ends_with_every_bit_and_others_close_to_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.cluster", "--short", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "cluster.json").read_text())
    trainings = result["trainings"]
    assert result["failures"] == []
    died_before, checkpoint = plan(SHORT)

    first, second = trainings["killed"]["lives"]
    assert list(map(int, first["losses"])) == list(range(1, died_before))
    assert list(map(int, second["losses"])) == list(range(checkpoint + 1, SHORT.steps + 1))
    assert trainings["killed"]["killed"] == [first["pid"]] != [second["pid"]]

    finals = {name: torch.load(tmp_path / name / "final.pt", weights_only=True) for name in trainings}
    undisturbed, killed = finals["undisturbed"], finals["killed"]
    for name, expected in undisturbed["optimizer"]["state"].items():
        state = killed["optimizer"]["state"][name]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert_same_bits(list(state.values()), list(expected.values()), name)
        assert state["step"] == SHORT.steps
        assert state["exp_avg"].count_nonzero() > 0
    assert_same_bits(list(killed["model"].values()), list(undisturbed["model"].values()), "params")
    assert len(killed["optimizer"]["state"]) == len(killed["model"])

    for name, workers in (("on_1", 1), ("on_4", 4)):
        (life,) = trainings[name]["lives"]
        assert (life["workers"], life["first_step"], life["last_step"]) == (workers, checkpoint + 1, SHORT.steps)
        assert trainings[name]["loss_difference"] <= LOSS_TOLERANCE
        for key, param in finals[name]["model"].items():
            torch.testing.assert_close(param, undisturbed["model"][key], rtol=0, atol=1e-5)
    before, after = trainings["undisturbed"]["held_out_losses"]
    assert after < 0.85 * before
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in range(SHORT.checkpoint_every, SHORT.steps + 1, SHORT.checkpoint_every)
    ]


# --- Its checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SHORT, FULL], ids=["short", "full"])
def test_the_kill_comes_between_two_checkpoints(config: Any) -> None:
    died_before, checkpoint = plan(config)
    assert 0 < checkpoint < died_before - 1 < checkpoint + config.checkpoint_every <= config.steps
    assert checkpoint % config.checkpoint_every == 0


def life(workers: int, first: int, pid: int, last: int = SHORT.steps) -> dict[str, Any]:
    losses = {step: 5.0 - step / 20 for step in range(first, last + 1)}
    return {"workers": workers, "pid": pid, "losses": losses, "first_step": first, "last_step": last}


def good_records() -> dict[str, dict[str, Any]]:
    died_before, checkpoint = plan(SHORT)
    lives = {
        "undisturbed": [life(2, 1, 10)],
        "killed": [life(2, 1, 11, died_before - 1), life(2, checkpoint + 1, 12)],
        "on_1": [life(1, checkpoint + 1, 13)],
        "on_4": [life(4, checkpoint + 1, 14)],
    }
    records = {name: {"lives": lived, "killed": [], "held_out_losses": [5.0, 4.0]} for name, lived in lives.items()}
    records["killed"]["killed"] = [11]
    return records


def good_final() -> dict[str, Any]:
    state = {"a": {"step": torch.tensor(20.0), "exp_avg": torch.arange(3.0), "exp_avg_sq": torch.ones(3)}}
    return {"model": {"a": torch.ones(3)}, "optimizer": {"state": state, "param_groups": [{"lr": 0.1}]}, "step": 20}


def checked(folder: Path, records: dict[str, Any], finals: dict[str, Any]) -> list[str]:
    for name in records:
        (folder / name).mkdir()
        torch.save(finals[name], folder / name / "final.pt")
    return failures(compare(folder, records), SHORT)


def add(name: str, place: str, amount: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A change of one number in the final params or state of a training."""

    def change(records: dict[str, Any], finals: dict[str, Any]) -> None:
        final = finals[name]
        tensor = final["model"]["a"] if place == "param" else final["optimizer"]["state"]["a"][place]
        tensor.view(-1)[-1].add_(amount)

    return change


def lose_a_step(records: dict[str, Any], finals: dict[str, Any]) -> None:
    del records["on_4"]["lives"][0]["losses"][15]


def end_early(records: dict[str, Any], finals: dict[str, Any]) -> None:
    del records["undisturbed"]["lives"][0]["losses"][SHORT.steps]


def survive(records: dict[str, Any], finals: dict[str, Any]) -> None:
    records["killed"] |= {"lives": [life(2, 1, 11)], "killed": []}


def die_otherwise(records: dict[str, Any], finals: dict[str, Any]) -> None:
    records["killed"]["killed"] = []


def begin_anew(records: dict[str, Any], finals: dict[str, Any]) -> None:
    records["killed"]["lives"][1] = life(2, 1, 12)


def run_on_other_workers(records: dict[str, Any], finals: dict[str, Any]) -> None:
    records["on_4"]["lives"][0]["workers"] = 2


def change_a_loss(name: str, amount: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(records: dict[str, Any], finals: dict[str, Any]) -> None:
        records[name]["lives"][-1]["losses"][18] += amount

    return change


def change_a_group(records: dict[str, Any], finals: dict[str, Any]) -> None:
    finals["killed"]["optimizer"]["param_groups"][0]["lr"] = 0.2


def learn_nothing(records: dict[str, Any], finals: dict[str, Any]) -> None:
    records["undisturbed"]["held_out_losses"] = [5.0, 4.9]


def diverge(records: dict[str, Any], finals: dict[str, Any]) -> None:
    records["undisturbed"]["held_out_losses"] = [5.0, float("nan")]


FAULTS = {
    "a param's last bit": (add("killed", "param", 2**-23), r"other bits, first in checkpoint\['model'\]"),
    "a moment's last bit": (add("killed", "exp_avg_sq", 2**-23), r"other bits, first in .*\['exp_avg_sq'\]"),
    "a step count": (add("killed", "step", 1), r"other bits, first in .*\['step'\]"),
    "a hyperparameter": (change_a_group, r"other bits, first in .*\['lr'\]"),
    "a loss of the killed": (change_a_loss("killed", 1e-15), "other bits, first in its losses"),
    "a loss on 1": (change_a_loss("on_1", 2 * LOSS_TOLERANCE), "on_1: loss_difference"),
    "a loss that is NaN": (change_a_loss("on_4", float("nan")), "on_4: loss_difference"),
    "a param on 4": (add("on_4", "param", 2 * PARAM_TOLERANCE), "on_4: param_difference"),
    "a param that is NaN": (add("on_1", "param", float("nan")), "on_1: param_difference"),
    "a step left out": (lose_a_step, "on_4 has made other steps"),
    "an early end": (end_early, "undisturbed has made other steps"),
    "no kill": (survive, "killed has made other steps"),
    "an end without SIGKILL": (die_otherwise, r"killed: torchrun has seen the kills of \[\], expected \[11\]"),
    "no checkpoint taken": (begin_anew, "killed has made other steps"),
    "other workers": (run_on_other_workers, "on_4 has made other steps"),
    "nothing learned": (learn_nothing, "has not learned"),
    "divergence": (diverge, "has not learned"),
}


def test_the_checks_pass_where_nothing_is_wrong(tmp_path: Path) -> None:
    finals = {name: good_final() for name in good_records()}
    add("on_1", "param", PARAM_TOLERANCE / 2)(good_records(), finals)
    add("on_4", "exp_avg", 1e-3)(good_records(), finals)
    assert checked(tmp_path, good_records(), finals) == []


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_the_checks_fail_for(change: Callable[..., None], message: str, tmp_path: Path) -> None:
    records = good_records()
    finals = {name: good_final() for name in records}
    change(records, finals)
    assert re.search(message, "; ".join(checked(tmp_path, records, finals)))


def test_what_is_compared_has_the_same_names_and_shapes() -> None:
    tensors = {"a": torch.ones(3)}
    assert distance(tensors, {"a": torch.tensor([1.0, 1.0, 1.0 + 3**0.5 / 2])}) == pytest.approx(0.5)
    for other in ({"b": torch.ones(3)}, {"a": torch.ones(3, 1)}, {}):
        with pytest.raises(ValueError, match="other names or shapes"):
            distance(tensors, other)


def test_a_log_is_read_with_every_life_and_its_last_losses() -> None:
    start = {"life": 0, "from_step": 0, "workers": 2, "pid": 7}
    lines = [start, {"step": 0, "held_out_loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    lines += [{**start, "life": 1, "pid": 8}, {"step": 2, "loss": 3.5}, {"step": 2, "held_out_loss": 3.0}]
    record = read_log(lines)
    assert [life["losses"] for life in record["lives"]] == [{1: 4.0, 2: 3.0}, {2: 3.5}]
    assert [(life["pid"], life["first_step"], life["last_step"]) for life in record["lives"]] == [(7, 1, 2), (8, 2, 2)]
    assert record["held_out_losses"] == [5.0, 3.0]


# --- Checkpoints -----------------------------------------------------------------------------------------------------

SAVER = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from examples.cluster_train import save_checkpoint

class Content:
    def state_dict(self):
        return {f"tensor {i}": torch.full((1 << 20,), float(self.step)) for i in range(16)}
    def load_state_dict(self, state_dict):
        raise AssertionError("never loaded here")

folder = Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
content = Content()
for content.step in range(1, 1000):
    save_checkpoint(content, content.step, folder)
"""


class Loaded:
    """What :data:`SAVER` saves, for loading."""

    def __init__(self) -> None:
        self.tensors = {f"tensor {i}": torch.zeros(1 << 20) for i in range(16)}

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tensors = state_dict


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_kill_during_a_save_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    try:
        while newest_checkpoint(tmp_path) is None or not any(tmp_path.glob("partial-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    loaded = Loaded()
    dcp.load({"training": loaded}, checkpoint_id=newest)
    step = float(newest.name.removeprefix("step-"))
    assert all(tensor.eq(step).all() for tensor in loaded.tensors.values())

    remove_partial_checkpoints(tmp_path)
    assert not any(tmp_path.glob("partial-*"))
    assert newest_checkpoint(tmp_path) == newest


def test_the_newest_checkpoint_is_the_last_complete_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-000008", "step-000016", "partial-000024"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000016"
