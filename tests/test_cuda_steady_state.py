"""A steady-state step waits for nothing and allocates nothing on the device, in every mode and when replayed."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import DEVICES, MODES, Captured, assert_same_bits, on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
WARM, STEPS = 3, 5


@contextlib.contextmanager
def synchronising_is_an_error(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocations(device: str) -> tuple[int, int]:
    """How many tensors the device's allocator has served so far, and how often it has asked the driver for memory."""
    if device == "cpu":
        return 0, 0
    stats = torch.cuda.memory_stats()
    return stats["allocation.all.allocated"], stats["num_device_alloc"]


class Loop:
    """A training loop over many small tensors of several dtypes, whose gradients alternate between two places.

    A further param is never used: it has no gradient, and no state.
    """

    def __init__(self, device: str, *, lr: float | Tensor = 1e-2, **flags: object) -> None:
        generator = torch.Generator().manual_seed(0)
        numbers = [torch.randn(3, 1 + i % 50, generator=generator) for i in range(120)]
        rows = [row.to(device, DTYPES[i % len(DTYPES)]) for i, row in enumerate(numbers)]
        self.params = [torch.nn.Parameter(row[0].clone()) for row in rows]
        self.grads = [[row[1 + place].clone() for row in rows] for place in range(2)]
        unused = torch.nn.Parameter(torch.ones(5, device=device))
        groups = [{"params": [unused, *self.params[:50]]}, {"params": self.params[50:], "weight_decay": 0.3}]
        self.optimizer = adamw_ext.AdamW(groups, lr=lr, **flags)
        self.number = 0

    def hand_out_gradients(self) -> None:
        for param, grad in zip(self.params, self.grads[self.number % 2], strict=True):
            param.grad = grad

    def step(self, change: Callable[["Loop"], None] = lambda loop: None) -> None:
        self.hand_out_gradients()
        change(self)
        self.optimizer.step()
        self.number += 1

    @property
    def results(self) -> list[Tensor]:
        states = [self.optimizer.state[param] for param in self.params]
        return on_cpu([*self.params, *(state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step"))])


def leave_alone(loop: Loop) -> None:
    pass


def change_floats(loop: Loop) -> None:
    for index, group in enumerate(loop.optimizer.param_groups):
        group["lr"] = 0.1 / (1 + loop.number + index)
        group["betas"] = (0.9 - loop.number / 100, 0.99)


def fill_tensor_lr(loop: Loop) -> None:
    loop.optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + loop.number))  # shared by the groups


def set_scaler_tensors(loop: Loop) -> None:
    for tensor, value in ((loop.optimizer.grad_scale, 2.0), (loop.optimizer.found_inf, loop.number % 3 == 1)):
        tensor.fill_(value)


def leave_out_gradients(loop: Loop) -> None:
    for param in loop.params[loop.number % 5 :: 7]:
        param.grad = None


# What the loop does before each step, and the modes that must take it without waiting for the device: a host step reads
# a tensor lr and found_inf on the host.
ON_DEVICE = ("capturable", "fused")
CASES = {
    "floats that stay": (leave_alone, tuple(MODES)),
    "floats that change": (change_floats, tuple(MODES)),
    "gradients that come and go": (leave_out_gradients, tuple(MODES)),
    "a tensor lr": (fill_tensor_lr, ON_DEVICE),
    "a scaler's tensors": (set_scaler_tensors, ON_DEVICE),
}
EVERY_CASE = [pytest.param(change, mode, id=f"{case}-{mode}") for case, (change, ms) in CASES.items() for mode in ms]


def make_loop(device: str, change: Callable[[Loop], None], **flags: object) -> Loop:
    lr = torch.tensor(0.1, device=device) if change is fill_tensor_lr else 1e-2
    loop = Loop(device, lr=lr, **flags)
    if change is set_scaler_tensors:
        loop.optimizer.grad_scale = torch.ones((), device=device)
        loop.optimizer.found_inf = torch.zeros((), device=device)
    return loop


def expected_results(change: Callable[[Loop], None], steps: int) -> list[Tensor]:
    loop = make_loop("cpu", change)
    for _ in range(steps):
        loop.step(change)
    return loop.results


@pytest.mark.parametrize(("change", "mode"), EVERY_CASE)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_for_nothing_and_allocates_nothing(device: str, change: Callable[[Loop], None], mode: str) -> None:
    """Steps behind the first few, which create the state, learn every pattern of gradients, and load the kernels."""
    loop = make_loop(device, change, **MODES[mode])
    warm = 5 * 7 if change is leave_out_gradients else WARM
    for _ in range(warm):
        loop.step(change)
    before = allocations(device)
    with synchronising_is_an_error(device):
        for _ in range(STEPS):
            loop.step(change)
    assert allocations(device) == before
    assert_same_bits(loop.results, expected_results(change, warm + STEPS))


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_and_syncing_hyperparameters_wait_for_nothing_and_allocate_nothing(device: str) -> None:
    loop = Loop(device, capturable=True)
    loop.optimizer.init_state()
    loop.hand_out_gradients()
    captured = Captured(loop.optimizer.step, device)

    def replay() -> None:
        change_floats(loop)
        loop.optimizer.sync_hyperparameters()
        captured.replay()
        loop.number += 1

    for _ in range(WARM):
        replay()
    before = allocations(device)
    with synchronising_is_an_error(device):
        for _ in range(STEPS):
            replay()
    assert allocations(device) == before

    twin = Loop("cpu")
    twin.hand_out_gradients()
    for _ in range(WARM + STEPS):
        change_floats(twin)
        twin.optimizer.step()
        twin.number += 1
    assert_same_bits(loop.results, twin.results)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_waits_for_nothing(mode: str) -> None:
    """It allocates the state, and may load kernels, but reads nothing back from the device."""
    loop = Loop("cuda", **MODES[mode])
    with synchronising_is_an_error("cuda"):
        loop.step()
    assert_same_bits(loop.results, expected_results(leave_alone, 1))


@pytest.mark.cuda
def test_the_guard_against_waiting_is_in_force() -> None:
    """The tests above would notice a step that reads from the device."""
    tensor = torch.ones((), device="cuda")
    with synchronising_is_an_error("cuda"), pytest.raises(RuntimeError, match="synchronizing"):
        tensor.item()
    before = allocations("cuda")
    del tensor
    torch.empty(1, device="cuda")
    assert allocations("cuda")[0] == before[0] + 1
