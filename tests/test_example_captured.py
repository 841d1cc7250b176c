"""The example of a captured training loop learns, and ends with the bits of its eager run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import DEVICES


@pytest.mark.parametrize("device", DEVICES)
def test_the_captured_example_trains_with_the_bits_of_its_eager_run(device: str) -> None:
    command = [sys.executable, "-m", "examples.captured", "--short", "--steps", "8", "--device", device]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the same bits" in run.stdout
