"""What the tests of several libraries need: a training's outcome, and its comparison with another one."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import assert_same_bits, on_cpu

SECONDS = 300.0  # processes that take longer hang; DeepSpeed compiles an operator first


@dataclass
class Outcome:
    """What a training left behind."""

    losses: list[float]
    params: list[Tensor]
    steps: list[int]  # of every param, from the optimizer's state
    state: list[Tensor]  # all else of the optimizer's state, in the order of its params


def outcome(
    losses: Sequence[float],
    model: nn.Module | Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    owners: Sequence[Tensor] | None = None,
) -> Outcome:
    """The outcome of a training, in copies. ``owners``: of state, by default all params of all groups; one that has
    none raises."""
    params = list(model.parameters()) if isinstance(model, nn.Module) else list(model)
    if owners is None:
        owners = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[owner] for owner in owners]
    assert states
    assert all(states)
    return Outcome(
        losses=[float(loss) for loss in losses],
        params=on_cpu(params),
        steps=[int(state["step"]) for state in states],
        state=on_cpu(state[key] for state in states for key in sorted(state) if key != "step"),
    )


def assert_trained_alike(
    ours: Outcome, theirs: Outcome, start: Sequence[Tensor], *, steps: int, rtol: float, atol: float
) -> None:
    """Both made so many steps, every param has moved, and losses and params agree up to rounding."""
    assert set(ours.steps) == set(theirs.steps) == {steps}
    assert len(ours.steps) == len(theirs.steps)
    assert len(ours.losses) == len(theirs.losses) > 1
    for i, (before, after) in enumerate(zip(start, ours.params, strict=True)):
        assert not torch.equal(before, after), f"param {i} {tuple(before.shape)} has not moved"
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=rtol, atol=atol)
    for a, b in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_continued(resumed: Outcome, unbroken: Outcome) -> None:
    """The resumed training has the bits of the one that never stopped, in its last losses, params and state."""
    assert resumed.losses
    assert resumed.losses == unbroken.losses[-len(resumed.losses) :]
    assert resumed.steps == unbroken.steps
    assert_same_bits(resumed.params, unbroken.params, "params")
    assert_same_bits(resumed.state, unbroken.state, "state")


def run_processes(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call work(rank, *arguments) in processes with the environment of torchrun; raises what they raise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.spawn(
        in_process, (work, processes, port, *arguments), nprocs=processes, join=False, daemon=True
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < deadline, f"{work.__name__} hangs"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def in_process(rank: int, work: Callable[..., None], processes: int, port: int, *arguments: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()
