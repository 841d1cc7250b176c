"""Fixtures that several test files use, and the skip of tests that need a GPU."""

from collections.abc import Iterator

import pytest
import torch

import adamw_ext
from tests.helpers import running_on


def why_no_cuda() -> str | None:
    """Which of the two things that tests marked `cuda` need is missing; None if neither is."""
    missing = []
    if not torch.cuda.is_available():
        missing.append("no NVIDIA GPU is available (torch.cuda.is_available() is False)")
    if not adamw_ext.build_info()["cuda kernels"]:
        missing.append("adamw_ext was built without CUDA kernels")
    return ", and ".join(missing) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    need_cuda = [item for item in items if item.get_closest_marker("cuda")]
    reason = why_no_cuda() if need_cuda else None
    if reason is not None:
        for item in need_cuda:
            item.add_marker(pytest.mark.skip(reason=f"needs CUDA: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in one line what was skipped for want of CUDA: nobody may take those tests for passed."""
    reports = terminalreporter.stats.get("skipped", [])
    skipped = [report.longrepr[2] for report in reports if "needs CUDA: " in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests marked cuda were skipped: {skipped[0].split(': ', 2)[2]}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny operations: on a busy machine, threads that wait for each other take most of the time."""
    with running_on(threads=1):
        yield


@pytest.fixture(autouse=True)
def _grad_mode_is_left_on() -> Iterator[None]:
    """A step that raises must not leave torch.no_grad() switched on."""
    yield
    is_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert is_on
