"""Tensors of more than 2**31 elements, where 32-bit counts and offsets wrap around.

Their numbers repeat with a period, so that the whole result is compared with the CPU's for one period.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import DEVICES, MODES, assert_same_bits, bits, on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2
HYPER = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
# Elements of a period, and of the whole. On the CPU only the logic of this file is looked at.
PERIOD, COUNT = {"cpu": 1 << 8, "cuda": 1 << 20}, {"cpu": (1 << 12) + 1, "cuda": (1 << 31) + 1}
BYTES = 4 * 2 * COUNT["cuda"] + (1 << 30)


@pytest.fixture
def room() -> Iterator[None]:
    """Enough free memory, which is given back at once."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < BYTES:
            pytest.skip(f"needs {BYTES / 2**30:.0f} GiB of free GPU memory, but there are {free / 2**30:.0f}")
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def period(role: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(role)).to(torch.bfloat16)


def repeated(one_period: Tensor, count: int, device: str) -> Tensor:
    tensor = torch.empty(count, dtype=one_period.dtype, device=device)
    rows(tensor, one_period.numel()).copy_(one_period.to(device))  # to every row
    rest = count % one_period.numel()
    tensor[count - rest :] = one_period[:rest].to(device)
    return tensor


def rows(tensor: Tensor, length: int) -> Tensor:
    return tensor[: tensor.numel() // length * length].view(-1, length)


def train(count: int, one_period: int, device: str, **flags: bool) -> Iterator[Tensor]:
    """The params and moments after some steps. Small tensors stand before and behind the one that counts."""
    params = [torch.nn.Parameter(repeated(period(0, one_period), size, device)) for size in (one_period + 3, count, 77)]
    optimizer = adamw_ext.AdamW(params, **HYPER, **flags)
    for param in params:
        param.grad = repeated(period(1, one_period), param.numel(), device)
    for step in range(STEPS):
        if step:
            for param in params:
                param.grad.neg_()
        optimizer.step()
    for param in params:
        yield from (param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"])


def assert_repeats(tensor: Tensor, one_period: Tensor) -> None:
    """Bit for bit, in parts: a comparison needs memory."""
    length = one_period.numel()
    expected = bits(one_period).to(tensor.device)
    differing = [int((bits(part) != expected).sum()) for part in rows(tensor, length).split(128)]
    assert not any(differing), f"{sum(differing)} elements differ, in parts {[i for i, n in enumerate(differing) if n]}"
    rest = tensor.numel() % length
    assert_same_bits(on_cpu([tensor[tensor.numel() - rest :]]), [one_period[:rest]], "the end")


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_more_than_2_to_the_31_elements_are_updated(device: str, mode: str) -> None:
    """Every one of them, and the tensors around theirs (TE#2918, apex#1654, DeepSpeed#7640)."""
    length, count = PERIOD[device], COUNT[device]
    expected = [tensor.clone() for tensor in train(length, length, "cpu")][3:6]
    assert not torch.equal(expected[0], period(0, length))
    seen = 0
    for i, tensor in enumerate(train(count, length, device, **MODES[mode])):
        assert_repeats(tensor, expected[i % 3])
        seen += tensor.numel()
    assert seen == 3 * (length + 3 + count + 77)


def test_one_wrong_element_is_noticed() -> None:
    """By the comparison that the test above relies on."""
    one_period = period(0, 64)
    for wrong in (0, 64 * 200, 64 * 300 + 4):
        tensor = repeated(one_period, 64 * 300 + 5, "cpu")
        assert_repeats(tensor, one_period)
        tensor[wrong] += 1
        with pytest.raises(AssertionError):
            assert_repeats(tensor, one_period)
