"""Runs a function in several real processes that talk over gloo on this machine's loopback.

The processes are forked from a server that has loaded torch: the first call of a test run waits seconds for that
server, every later one starts within a tenth of a second.
"""

import faulthandler
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

# What the server loads before it forks. None of these starts a thread: a forked process would be without it.
PRELOADED = [
    "adamw_ext",
    "pytest",
    "tests.helpers",
    "torch._dynamo",  # DDP and FSDP load it when they are first used, which takes seconds
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor",
    "torch.nn.parallel",
]


def run(
    work: Callable[..., Any],
    processes: int,
    *args: Any,
    seconds: float = 60.0,
    backend: str | None = "gloo",
    **kwargs: Any,
) -> list[Any]:
    """Call work(*args, **kwargs) in each of several new processes, and return their results in the order of ranks.

    Args:
        work: a function of a module, called with one thread, this process's environment variables, and RANK, LOCAL_RANK
            and WORLD_SIZE as under torchrun. It and its arguments are pickled.
        processes: how many.
        seconds: how long they may take together.
        backend: of the process group that exists when work is called. None: there is none; work may call
            :func:`start_group`, or start RPC at :func:`rendezvous`.

    Returns:
        What work returned, through torch.save.

    Raises:
        RuntimeError: a process raised, died or hangs; the message has its rank and traceback. None of them lives on.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        crew, pipes = [], []
        try:
            for rank in range(processes):
                pipe, far_end = forking.Pipe()
                variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment = {**os.environ, **variables, "TESTS_RENDEZVOUS": folder}
                job = (far_end, environment, seconds, backend, work, args, kwargs)
                crew.append(forking.Process(target=serve, args=job, daemon=True))
                pipes.append(pipe)
                crew[-1].start()
                far_end.close()
            return collect(crew, pipes, seconds, Path(folder))
        finally:
            for process in crew:
                if process.pid is not None:
                    process.kill()
                    process.join()


def rendezvous() -> str:
    """In a process of run: an init_method by which all of them find each other."""
    return f"file://{os.environ['TESTS_RENDEZVOUS']}/store"


def start_group(backend: str = "gloo", seconds: float = 60.0) -> None:
    """In a process of run(..., backend=None): initialise the default process group, of all processes."""
    torch.distributed.init_process_group(
        backend,
        init_method=rendezvous(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=seconds),
    )


def serve(
    pipe: connection.Connection,
    environment: dict[str, str],
    seconds: float,
    backend: str | None,
    work: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """In the new process: do the work, send how it went, and wait for the end.

    It does not end by itself, as others may still need its side of a connection; nor by returning, because destructors
    of process groups and DDP can hang.
    """
    os.environ.clear()
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo")
    trace = open(trace_path(Path(environment["TESTS_RENDEZVOUS"]), int(environment["RANK"])), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, trace, all_threads=True)
    torch.set_num_threads(1)
    try:
        if backend is not None:
            start_group(backend, seconds)
        buffer = io.BytesIO()
        torch.save(work(*args, **kwargs), buffer)
        pipe.send((None, buffer.getvalue()))
    except BaseException:
        pipe.send((traceback.format_exc(), b""))
    try:
        pipe.recv()  # until killed, or until the process that started this one is gone
    finally:
        os._exit(1)


def collect(
    crew: list[multiprocessing.process.BaseProcess],
    pipes: list[connection.Connection],
    seconds: float,
    folder: Path,
) -> list[Any]:
    """Wait for all results, or for the first sign that not all will come."""
    deadline = time.monotonic() + seconds
    results: dict[int, Any] = {}
    while len(results) < len(crew):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            hanging = [rank for rank in range(len(crew)) if rank not in results]
            where = "\n".join(f"rank {rank}:\n{where_it_is(crew[rank], folder, rank)}" for rank in hanging)
            raise RuntimeError(f"ranks {hanging} of {len(crew)} hang after {seconds} s\n{where}")
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                error, result = pipe.recv()
            except (EOFError, ConnectionResetError):
                crew[rank].join()
                raise RuntimeError(f"rank {rank} of {len(crew)} died: exit code {crew[rank].exitcode}") from None
            if error is not None:
                raise RuntimeError(f"rank {rank} of {len(crew)} raised\n{error}")
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
    return [results[rank] for rank in range(len(crew))]


def trace_path(folder: Path, rank: int) -> Path:
    return folder / f"trace{rank}"


def where_it_is(process: multiprocessing.process.BaseProcess, folder: Path, rank: int) -> str:
    """The stacks of a process's threads, as it writes them when signalled."""
    path = trace_path(folder, rank)
    if not path.exists():
        return "not started"
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return path.read_text()
