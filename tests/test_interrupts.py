"""An interrupt or a garbage collection in the middle of a step leaves it made or not made; and optimizers are freed."""

import contextlib
import functools
import gc
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import adamw_ext
from tests.helpers import assert_same_bits
from tests.threads import MODES, Run, in_threads


def interrupt_line(number: int, work: Callable[[], object]) -> bool:
    """Raises KeyboardInterrupt before the numbered line of the package that work runs. Whether there was one."""
    root = os.path.dirname(adamw_ext.__file__)
    lines = itertools.count()

    def before_line(frame: Any, event: str, arg: object) -> Any:
        if event == "line" and next(lines) == number:
            raise KeyboardInterrupt
        return before_line

    sys.settrace(lambda frame, event, arg: before_line if frame.f_code.co_filename.startswith(root) else None)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("mode", ["float32", "stochastic"])
def test_an_interrupt_at_any_line_of_a_step_leaves_it_made_or_not_made(mode: str, steps_before: int) -> None:
    """Params moved and state lost, as after an interrupt between the update and its end, would be neither."""
    after = {count: Run(mode=mode, size=9).steps(count) for count in (0, 1, 2)}
    line, ended = 0, False
    while not ended:
        run = Run(mode=mode, size=9).steps(steps_before)
        ended = not interrupt_line(line, run.optimizer.step)
        made = run.steps_made if run.param in run.optimizer.state else 0
        assert made in (steps_before, steps_before + 1)
        assert_same_bits(run.tensors if made else [run.param], after[made].tensors if made else [after[0].param], line)
        assert_same_bits(run.steps(2 - made).tensors, after[2].tensors, line)
        line += 1
    assert line > 10


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_ctrl_c_during_long_steps_leaves_a_whole_number_of_them() -> None:
    run = Run(size=1 << 20)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupts = 0
    try:
        for delay in (0.011, 0.017, 0.023, 0.031):
            signal.setitimer(signal.ITIMER_REAL, delay)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    run.steps(1)
            interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts == 4
    run.steps(1)
    assert_same_bits(run.tensors, Run(size=1 << 20).steps(run.steps_made).tensors)


def test_garbage_collections_during_steps_change_nothing() -> None:
    """In the stepping thread at every allocation, and in another one."""
    expected = [Run(mode=mode).steps(4).tensors for mode in MODES]
    thresholds = gc.get_threshold()
    stopped = threading.Event()

    def collect() -> None:
        while not stopped.is_set():
            gc.collect(0)
            time.sleep(0)

    def step() -> None:
        try:
            gc.set_threshold(1)
            for mode, tensors in zip(MODES, expected, strict=True):
                assert_same_bits(Run(mode=mode).steps(4).tensors, tensors, mode)
        finally:
            gc.set_threshold(*thresholds)
            stopped.set()

    in_threads(step, collect)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_that_threads_have_stepped_is_freed_with_its_tensors(mode: str) -> None:
    run = Run(mode=mode)
    in_threads(*[functools.partial(run.steps, 2)] * 2)
    watched = [weakref.ref(tensor) for tensor in (run.param, *run.optimizer.state[run.param].values())]
    watched += [weakref.ref(run.optimizer), weakref.ref(run.optimizer._turn)]
    del run
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
