"""Forked, spawned and data-loading processes: a child steps on with the same bits, whatever other threads did, and
loading data in other processes changes no numbers."""

import contextlib
import hashlib
import multiprocessing
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adamw_ext import AdamW
from tests.children import in_child
from tests.helpers import assert_same_bits
from tests.processes import PRELOADED
from tests.threads import Run

# Python's, about forks of a process with threads: what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def digest(*tensors: Tensor) -> bytes:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest().encode()


@contextlib.contextmanager
def stepping(step: Any) -> Iterator[None]:
    """While another thread steps without a pause."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            step()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.05)
    try:
        yield
    finally:
        stopped.set()
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(autouse=True, scope="module")
def _everything_imported() -> None:
    """torch imports its compiler when the first optimizer is made: here once, and not in every child."""
    AdamW([torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize("stepped_before", [True, False])
def test_a_forked_child_steps_on_and_gets_the_same_bits(stepped_before: bool) -> None:
    """An OpenMP runtime that has lost its threads in a fork never returns from its next parallel region."""
    run = Run().steps(1)
    if not stepped_before:
        run.optimizer = AdamW([run.param], lr=0.1)
        run.optimizer.init_state()

    def work() -> bytes:
        return digest(*run.steps(2).tensors)

    child = in_child(work)
    assert child == work()


def test_the_parent_steps_on_after_a_fork() -> None:
    run = Run().steps(1)
    in_child(lambda: b"")
    assert_same_bits(run.steps(1).tensors, Run().steps(2).tensors)


def test_a_child_forked_while_another_thread_steps_has_a_whole_number_of_steps() -> None:
    """The fork waits for the step: the child has neither half of an update nor a lock that nobody gives back."""
    run = Run(size=1 << 19).steps(1)

    def work() -> bytes:
        return f"{run.steps_made} {digest(*run.tensors).decode()} {digest(*run.steps(1).tensors).decode()}".encode()

    answers = []
    with stepping(run.optimizer.step):
        for _ in range(4):
            answers.append(in_child(work, timeout=20).decode().split())
    alone = Run(size=1 << 19)
    digests = {}
    for count in sorted({int(answer[0]) + more for answer in answers for more in (0, 1)}):
        while not alone.optimizer.state or alone.steps_made < count:
            alone.steps(1)
        digests[count] = digest(*alone.tensors).decode()
    for count, now, following in answers:
        assert (digests[int(count)], digests[int(count) + 1]) == (now, following)


def test_a_fork_waits_for_the_steps_of_several_optimizers_without_a_deadlock() -> None:
    """One of them steps another one from its closure, so turns are taken in both orders."""
    inner, outer = Run(1), Run(2)

    def nested() -> None:
        with outer.optimizer._turn:
            inner.optimizer.step()
        outer.optimizer.step(lambda: inner.optimizer.step())

    with stepping(nested), stepping(inner.optimizer.step):
        for _ in range(8):
            in_child(lambda: digest(*inner.steps(1).tensors), timeout=20)


def test_a_script_optimizer_forked_while_another_thread_steps_it_steps_or_says_why_not() -> None:
    """It must not wait for a thread that the child does not have."""
    param = torch.zeros(1 << 20)
    script = torch.classes.adamw_ext.AdamW([param])
    grads = [torch.ones(1 << 20)]

    def work() -> bytes:
        try:
            script.step(grads)
        except RuntimeError as error:
            assert "fork" in str(error)  # noqa: PT017  (a step that is made is right, too)
        return b""

    with stepping(lambda: script.step(grads)):
        for _ in range(5):
            in_child(work, timeout=5)


# --- multiprocessing -------------------------------------------------------------------------------------------------


def train_in_process(optimizer: AdamW | None, pipe: Any) -> None:
    """Two steps, of a given optimizer or of a new one; sends the digest."""
    torch.set_num_threads(1)
    run = Run(size=1 << 14)
    if optimizer is not None:
        run.optimizer = optimizer
        run.param = optimizer.param_groups[0]["params"][0]
        run.param.grad = Run(size=1 << 14).param.grad
    pipe.send_bytes(digest(*run.steps(2).tensors))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_of_every_start_method_have_the_bits_of_this_one(method: str) -> None:
    """With an optimizer of their own, and with one that has made a step here and was handed over."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    stepped = Run(size=1 << 14).steps(1)
    for optimizer, steps in ((None, 2), (stepped.optimizer, 3)):
        if method == "spawn" and optimizer is None:
            continue  # loads torch anew: once is enough
        near, far = context.Pipe()
        process = context.Process(target=train_in_process, args=(optimizer, far), daemon=True)
        process.start()
        assert near.poll(60), "the process sent nothing"
        answer = near.recv_bytes()
        process.join(30)
        assert process.exitcode == 0
        assert answer == digest(*Run(size=1 << 14).steps(steps).tensors)


# --- Data loaders ----------------------------------------------------------------------------------------------------


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(600, generator=torch.Generator().manual_seed(index))


class Fitted(Numbers):
    """Each item is a param after three steps of an optimizer, made in the process that loads the item."""

    def __getitem__(self, index: int) -> Tensor:
        param = torch.zeros(600, requires_grad=True)
        optimizer = AdamW([param], lr=0.1)
        for _ in range(3):
            param.grad = super().__getitem__(index) + param.detach()
            optimizer.step()
        return param.detach()


def train_on(workers: int, persistent: bool = False) -> list[Tensor]:
    """The model is large enough for steps to be shared among threads, which the workers are forked beside."""
    weight = torch.zeros(600, 300, requires_grad=True)
    optimizer = AdamW([weight], lr=0.01, max_grad_norm=1.0)
    loader = DataLoader(Numbers(), 3, num_workers=workers, persistent_workers=persistent)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            (batch @ weight - 1.0).square().mean().backward()
            optimizer.step()
    assert optimizer.state[weight]["step"] == 8
    return [weight.detach(), *optimizer.state[weight].values()]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_training_whose_data_other_processes_load_has_the_bits_of_one_that_loads_them_itself(
    persistent: bool,
) -> None:
    assert_same_bits(train_on(2, persistent), train_on(0))


def test_an_optimizer_in_a_loading_process_has_the_bits_of_one_in_this_process() -> None:
    Run().steps(1)  # threads that the workers do not have
    loaded = list(DataLoader(Fitted(), 3, num_workers=2))
    assert len(loaded) == 4
    assert_same_bits(loaded, list(DataLoader(Fitted(), 3)))
    assert all(bool((batch != 0).any()) for batch in loaded)
