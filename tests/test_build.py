"""What setup.py decides, without compiling."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adamw_ext

ROOT = Path(__file__).parent.parent


def ask_setup(choice: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ADAMW_EXT_CUDA": choice, **variables}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("choice", ["auto", "0"])
def test_a_cpu_build_needs_no_cuda(choice):
    answer = ask_setup(choice)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split()[-1] == adamw_ext.__version__


def assert_refused(answer: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert answer.returncode == 1
    assert sentence in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_unknown_choice_is_refused_in_a_sentence():
    assert_refused(ask_setup("yes"), "must be auto, 0 or 1, but is 'yes'")


def test_an_unknown_sanitizer_is_refused_in_a_sentence():
    assert_refused(ask_setup("0", ADAMW_EXT_SANITIZE="memory"), "must be address or thread, but is 'memory'")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_cuda_kernels_for_a_torch_without_cuda_are_refused_in_a_sentence():
    assert_refused(ask_setup("1"), "ADAMW_EXT_CUDA=1, but torch")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_a_toolkit_without_headers_is_refused_in_a_sentence(tmp_path):
    assert_refused(ask_setup("1", CUDA_HOME=str(tmp_path)), "CUDA_HOME to the toolkit's root")
