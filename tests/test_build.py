"""What setup.py decides, without compiling."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import adamw_ext

ROOT = Path(__file__).parent.parent


def ask_setup(choice: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ADAMW_EXT_CUDA": choice}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("choice", ["auto", "0"])
def test_a_cpu_build_needs_no_cuda(choice):
    answer = ask_setup(choice)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split()[-1] == adamw_ext.__version__


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [("1", "but this version has no CUDA kernels yet"), ("yes", "must be auto, 0 or 1, but is 'yes'")],
)
def test_a_build_that_cannot_be_had_is_refused_in_a_sentence(choice, sentence):
    answer = ask_setup(choice)
    assert answer.returncode == 1
    assert sentence in answer.stderr
    assert "Traceback" not in answer.stderr
