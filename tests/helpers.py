"""What several test files need: the combinations and levels under test, forced paths, and comparison by bits."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from adamw_ext import _C, functional

# (param dtype, moment dtype) of every combination that has a kernel, and the levels that this processor can run.
COMBINATIONS = [
    (getattr(torch, param), getattr(torch, moment))
    for param, moment, master, rounding in _C.combinations()
    if (master, rounding) == ("none", "nearest")
]
ISA_LEVELS = _C.isa_levels()

# A complex tensor is updated as its real view: same kernels, two numbers an element.
COMPLEX_COMBINATIONS = [(dtype, dtype) for dtype in (torch.complex128, torch.complex64, torch.complex32)]

# For tests that run on both: what they prove of the GPU, their own logic proves on the CPU.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# Where the step counts are kept, as constructor arguments: on the CPU, or on the param's device.
MODES: dict[str, dict[str, bool]] = {"host_steps": {}, "capturable": {"capturable": True}, "fused": {"fused": True}}

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def name_of(value: object) -> str | None:
    """A test id for dtypes and pairs of them; None leaves the choice to pytest."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and all(isinstance(item, torch.dtype) for item in value):
        param, moment = (str(item).removeprefix("torch.") for item in value)
        return param if param == moment else f"{param}-{moment}-moments"
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the arithmetic runs in, for storage of this dtype."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


@torch.no_grad()
def functional_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    capturable: bool = False,
) -> None:
    """One step of the functional form, with hyperparameters as the optimizer has them."""
    functional.adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        amsgrad=amsgrad,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        capturable=capturable,
    )


@contextmanager
def running_on(*, isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    """New optimizers take this instruction set, and steps at most this many threads."""
    isa_before = os.environ.get("ADAMW_EXT_ISA")
    threads_before = torch.get_num_threads()
    try:
        if isa is not None:
            os.environ["ADAMW_EXT_ISA"] = isa
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads_before)
        if isa_before is None:
            os.environ.pop("ADAMW_EXT_ISA", None)
        else:
            os.environ["ADAMW_EXT_ISA"] = isa_before


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, with one pattern for all NaNs: payloads differ between processors."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.itemsize]).masked_fill(tensor.isnan(), -1)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: object = "") -> None:
    """Every tensor of one list has the bits of its counterpart in the other; a NaN equals any NaN."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        differs = bits(a) != bits(e)
        if differs.any():
            at = tuple(differs.nonzero()[0].tolist())
            values = [(torch.view_as_real(t) if t.is_complex() else t)[at].item() for t in (a.detach(), e.detach())]
            raise AssertionError(
                f"{what}: {int(differs.sum())} numbers of tensor {i} {tuple(a.shape)} differ, "
                f"first at {at}: {values[0]!r}, expected {values[1]!r}"
            )


def spread(count: int, dtype: torch.dtype, generator: torch.Generator, *, octaves: float = 6.0) -> Tensor:
    """Random numbers of both signs whose magnitudes spread over some powers of two around 1, stored as dtype."""
    signs = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    exponents = (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1) * octaves
    return (signs * torch.exp2(exponents)).to(dtype)


def on_cpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that later steps do not change."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is queued within goes to this stream, after all that was queued before and before all that follows."""
    if stream is None:
        yield
        return
    outer = torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


class Captured:
    """Work that can be replayed: a CUDA graph; on the CPU, the same call again. Making one runs nothing."""

    def __init__(
        self,
        work: Callable[[], object],
        device: str,
        *,
        stream: torch.cuda.Stream | None = None,  # None: the stream that torch captures on
        share_pool_with: "Captured | None" = None,
    ) -> None:
        self._replay: Callable[[], object] = work
        self.pool: tuple[int, int] | None = None
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=share_pool_with and share_pool_with.pool, stream=stream):
                work()
            self.pool = graph.pool()
            self._replay = graph.replay

    def replay(self) -> None:
        self._replay()


class Trained(torch.nn.Module):
    """A small model that holds its optimizer and steps itself, for scripts."""

    def __init__(self, dtype: torch.dtype, options: dict[str, object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 9, dtype=dtype)
        self.second = torch.nn.Linear(9, 1, dtype=dtype)
        self.optimizer = torch.classes.adamw_ext.AdamW(list(self.parameters()), lr=0.1, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(inputs)))

    @torch.jit.export
    def train_step(self, inputs: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self(inputs).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
