"""A function of a test in a forked process, whose crash or hang fails the test alone."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable

import pytest


def in_child(function: Callable[[], bytes | None], timeout: float = 30) -> bytes:
    """Runs function in a forked child, and returns the bytes that it returned. Fails if it raises, crashes or hangs."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about forks of a process with threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            answer = function() or b""
            status = 0
        except BaseException:
            answer = traceback.format_exc().encode()
        finally:
            os.write(write, answer[:60_000])
            os._exit(status)
    os.close(write)
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            pytest.fail(f"the child process hung for {timeout} s")
        time.sleep(0.005)
    with os.fdopen(read, "rb") as file:
        answer = file.read()
    assert not os.WIFSIGNALED(status), f"the child process died of signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 0, answer.decode()
    return answer
