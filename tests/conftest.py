"""Fixtures that several test files use."""

from collections.abc import Iterator

import pytest

from tests.helpers import running_on


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny operations: on a busy machine, threads that wait for each other take most of the time."""
    with running_on(threads=1):
        yield
