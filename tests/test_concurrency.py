"""Threads: an optimizer each, or one that several use, gives numbers of some serial order, never of a mixture."""

import contextlib
import copy
import math
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.helpers import assert_same_bits, functional_step, running_on
from tests.threads import LARGE, MODES, Run, in_threads

REFUSALS = (RuntimeError, ValueError, TypeError, KeyError)


@pytest.fixture
def _hasty_switches() -> Iterator[None]:
    """Threads change places as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# --- An optimizer each -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [2, 8])
def test_threads_with_an_optimizer_each_get_the_bits_of_one_thread(threads: int, mode: str) -> None:
    rounds = 12
    runs = [Run(seed, mode) for seed in range(threads)]
    in_threads(*(lambda run=run: run.steps(rounds) for run in runs))
    for seed, run in enumerate(runs):
        assert run.steps_made == rounds
        assert_same_bits(run.tensors, Run(seed, mode).steps(rounds).tensors, seed)


def test_the_functional_form_in_threads_has_the_bits_of_one_thread() -> None:
    def train(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        param, grad = (torch.randn(LARGE, generator=generator) for _ in range(2))
        lists = [[param], [grad], [torch.zeros(LARGE)], [torch.zeros(LARGE)], [], [torch.tensor(0.0)]]
        for _ in range(8):
            functional_step(*lists, lr=0.1)
        return [tensors[0] for tensors in lists if tensors]

    results: dict[int, list[Tensor]] = {}
    in_threads(*(lambda seed=seed: results.update({seed: train(seed)}) for seed in range(4)))
    for seed in range(4):
        assert_same_bits(results[seed], train(seed), seed)
        assert results[seed][-1] == 8


def test_script_optimizers_in_threads_have_the_bits_of_the_python_class() -> None:
    runs = [Run(seed) for seed in range(4)]
    scripts = [torch.classes.adamw_ext.AdamW([run.param], lr=0.1) for run in runs]
    in_threads(*(lambda script=script: [script.step() for _ in range(8)] for script in scripts))
    for seed, (run, script) in enumerate(zip(runs, scripts, strict=True)):
        state = script.state()[0]
        expected = Run(seed).steps(8)
        assert_same_bits([run.param, state["exp_avg"], state["step"]], [expected.tensors[i] for i in (0, 2, 1)], seed)


@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_threads_may_change_between_steps(mode: str) -> None:
    run = Run(mode=mode)
    numbers = (1, 2, 7, 1, 3, 2)
    for threads in numbers:
        with running_on(threads=threads):
            run.steps(1)
    with running_on(threads=1):
        assert_same_bits(run.tensors, Run(mode=mode).steps(len(numbers)).tensors)


# --- One optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [2, 8])
def test_threads_that_step_one_optimizer_take_turns(threads: int, mode: str) -> None:
    run = Run(mode=mode)
    rounds = 24 // threads
    in_threads(*[lambda: run.steps(rounds)] * threads)
    assert run.steps_made == rounds * threads
    assert_same_bits(run.tensors, Run(mode=mode).steps(rounds * threads).tensors)


def test_threads_that_make_the_first_step_of_one_optimizer() -> None:
    expected = Run().steps(2).tensors
    for _ in range(10):
        run = Run()
        in_threads(*[lambda run=run: run.steps(1)] * 2)
        assert_same_bits(run.tensors, expected)


def test_a_load_comes_before_a_step_of_another_thread_or_after_it() -> None:
    """A load writes into the state's own memory, which a step must not be reading."""
    run = Run(size=1 << 19).steps(3)
    saved = copy.deepcopy(run.optimizer.state_dict())
    start = run.param.detach().clone()

    def restored() -> Run:
        with torch.no_grad():
            run.param.copy_(start)
        run.optimizer.load_state_dict(saved)
        return run.steps(2)

    def load() -> None:
        run.optimizer.load_state_dict(saved)

    restored().steps(1)
    load()
    loaded_last = [tensor.clone() for tensor in run.tensors]
    restored()
    load()
    loaded_first = [tensor.clone() for tensor in run.steps(1).tensors]
    for number in range(15):
        restored()
        in_threads(lambda: run.steps(1), lambda n=number: (time.sleep(n % 5 * 2e-4), load()))
        assert_same_bits(run.tensors, loaded_last if run.steps_made == 3 else loaded_first, number)


@pytest.mark.usefixtures("_hasty_switches", "one_thread")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_sees_all_gradients_or_none_while_another_thread_zeroes_them(set_to_none: bool) -> None:
    params = [torch.zeros(3, requires_grad=True) for _ in range(300)]
    optimizer = AdamW(params)
    for _ in range(15):
        optimizer.state.clear()
        optimizer.init_state()
        for param in params:
            param.grad = torch.ones(3)
        in_threads(optimizer.step, lambda: optimizer.zero_grad(set_to_none))
        exp_avgs = {optimizer.state[param]["exp_avg"][0].item() for param in params}
        steps = {optimizer.state[param]["step"].item() for param in params}
        assert len(exp_avgs) == len(steps) == 1


@pytest.mark.usefixtures("_hasty_switches", "one_thread")
def test_groups_may_be_added_while_another_thread_steps() -> None:
    """Each param has made as many steps as its optimizer since it was added, with the bits of these."""

    def make(number: int) -> Tensor:
        param = torch.full((5,), float(number), requires_grad=True)
        param.grad = torch.full((5,), 1.0 + number)
        return param

    optimizer = AdamW([make(0)], lr=0.1)
    added = threading.Event()

    def add() -> None:
        for number in range(1, 60):
            optimizer.add_param_group({"params": [make(number)]})
        added.set()

    def step() -> None:
        while not added.is_set():
            optimizer.step()
        optimizer.step()

    in_threads(add, step)
    params = [group["params"][0] for group in optimizer.param_groups]
    counts = [int(optimizer.state[param]["step"]) for param in params]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    for number in (0, 10, 59):
        expected = make(number)
        alone = AdamW([expected], lr=0.1)
        for _ in range(counts[number]):
            alone.step()
        assert_same_bits([params[number]], [expected])


def test_what_is_read_while_another_thread_steps_is_of_some_step() -> None:
    """The norms are those of gradients that were there, and a state dict has all of the state or none."""
    param = torch.zeros(LARGE, requires_grad=True)
    optimizer = AdamW([param], max_grad_norm=1.0)
    stopped = threading.Event()
    norms = {0.0, *(math.sqrt(LARGE) * size for size in (1, 2))}

    def step() -> None:
        try:
            for number in range(40):
                param.grad = torch.full((LARGE,), 1.0 + number % 2)
                optimizer.step()
        finally:
            stopped.set()

    def read() -> None:
        while not stopped.is_set():
            assert optimizer.grad_norm.item() in norms
            assert optimizer.skipped_steps == 0
            state = optimizer.state_dict()["state"]
            assert not state or state[0].keys() == {"step", "exp_avg", "exp_avg_sq"}

    in_threads(step, read)
    assert optimizer.state[param]["step"] == 40


def test_memory_that_another_thread_drops_during_a_step_stays_alive_for_it() -> None:
    """A long step lets other threads run. They may drop every reference to its memory: it must not write to what the
    allocator has given to others since. (Only the gradient is kept: reading ``.grad`` while another thread destroys it
    crashes in torch itself, with or without an optimizer.)"""
    for _ in range(10):
        run = Run(size=1 << 20).steps(1)
        grad = run.param.grad
        stepping = threading.Event()
        bystanders: list[Tensor] = []

        def drop(run: Run = run, stepping: threading.Event = stepping, bystanders: list[Tensor] = bystanders) -> None:
            stepping.wait()
            run.param.grad = None
            run.param.data = torch.zeros(3)
            run.optimizer.state.clear()
            bystanders.extend(torch.full((1 << 20,), 5.0) for _ in range(4))

        def step(run: Run = run, stepping: threading.Event = stepping) -> None:
            stepping.set()
            with contextlib.suppress(*REFUSALS):
                run.optimizer.step()

        in_threads(drop, step)
        assert grad.shape == (1 << 20,)
        assert all((tensor == 5.0).all() for tensor in bystanders)


def test_another_thread_runs_python_during_a_long_step() -> None:
    run = Run(size=1 << 20).steps(1)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    def work() -> None:
        try:
            run.steps(20)
        finally:
            stop.set()

    in_threads(count, work)
    assert counted[0] > 20
