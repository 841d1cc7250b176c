"""A process that ends while it uses an optimizer ends as it should, says nothing, and does not hang."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exits import BEGIN, FOREVER, PROGRAMS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[int, float, str]]:
    command = [sys.executable, "-m", "tests.exits"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_process_ends_as_it_should_with(name: str, results: dict[str, tuple[int, float, str]]) -> None:
    _, expected_status, expected_end = PROGRAMS[name]
    status, _, stderr = results[name]
    assert (status, stderr.strip().rpartition("\n")[2]) == (expected_status, expected_end), stderr


def test_a_process_whose_threads_share_the_steps_of_a_daemon_ends_without_a_word() -> None:
    """Not forked, so that steps use as many threads as there are."""
    program = BEGIN + FOREVER.format("optimizer.step()")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
