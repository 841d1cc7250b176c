"""Gradients of another dtype than their param: float32, bfloat16 and float16 in every combination.

The gradient is widened, exactly, to what the arithmetic runs in. So its bits are those of the same numbers in another
dtype that can hold them.
"""

import itertools

import pytest
import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.helpers import (
    COMBINATIONS,
    DEVICES,
    ISA_LEVELS,
    assert_same_bits,
    functional_step,
    name_of,
    running_on,
    spread,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [
    (param, moment, grad)
    for (param, moment), grad in itertools.product(COMBINATIONS, DTYPES)
    if param != torch.float64 and grad != param
]
SIZES = (1, 0, 3, 64, 65, 1023, 1024, 1025, 5000)
STEPS = 3
HYPER = {"lr": 1e-2, "weight_decay": 0.1}
EMULATED = (0, 4096, 32764)
MIXED_ID = {"ids": lambda value: name_of(value)}


def numbers(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """One tensor for each size, each beginning one element into its memory; numbers that every dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in SIZES:
        exact = spread(size, torch.float64, generator, octaves=3).to(torch.float16).to(torch.bfloat16)
        memory = torch.empty(size + 1, dtype=dtype)
        made.append(memory[1:].copy_(exact))
    return made


class Run:
    """Params and state of one combination, and the steps made with gradients of some dtype."""

    def __init__(self, param: torch.dtype, moment: torch.dtype, *, amsgrad: bool = False) -> None:
        self.params = numbers(0, param)
        self.moments = [[t.abs() if i else t for t in numbers(i + 1, moment)] for i in range(3 if amsgrad else 2)]
        self.steps = [torch.zeros(()) for _ in SIZES]
        self.amsgrad = amsgrad

    def optimizer(self, **flags: bool) -> AdamW:
        optimizer = AdamW([p.requires_grad_() for p in self.params], amsgrad=self.amsgrad, **HYPER, **flags)
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for i, param in enumerate(self.params):
            state = {key: moments[i] for key, moments in zip(keys, self.moments, strict=False)}
            optimizer.state[param] = {"step": self.steps[i], **state}
        return optimizer

    def train(self, grad: torch.dtype, *, emulated: int = 0, scale: float | None = None, **flags: bool) -> "Run":
        """The optimizer's steps."""
        optimizer = self.optimizer(**flags)
        optimizer._stepper = optimizer._make_stepper([])
        optimizer._stepper.emulated_arguments = emulated
        self.grads = [numbers(10 + step, grad) for step in range(STEPS)]
        for grads in self.grads:
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale)
            for param, g in zip(self.params, grads, strict=True):
                param.grad_dtype = grad
                param.grad = g
            optimizer.step()
        return self

    @property
    def results(self) -> list[Tensor]:
        return [*self.params, *itertools.chain(*self.moments), *self.steps]


needs_grad_dtype = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype: .grad has its param's dtype"
)


@needs_grad_dtype
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize(("param", "moment", "grad"), MIXED, **MIXED_ID)
def test_a_gradient_has_the_bits_of_its_numbers_in_the_params_dtype(
    param: torch.dtype, moment: torch.dtype, grad: torch.dtype, amsgrad: bool
) -> None:
    """On every instruction set, with host steps and capturable, and on the emulated CUDA path."""
    expected = Run(param, moment, amsgrad=amsgrad).train(param).results
    assert not torch.equal(expected[-len(SIZES) - 1], Run(param, moment, amsgrad=amsgrad).results[-len(SIZES) - 1])
    for isa, emulated in itertools.chain(itertools.product(ISA_LEVELS, (0,)), (("avx2", 4096), ("avx2", 32764))):
        if isa not in ISA_LEVELS:
            continue
        with running_on(isa=isa):
            for capturable in (False, True):
                run = Run(param, moment, amsgrad=amsgrad).train(grad, emulated=emulated, capturable=capturable)
                assert_same_bits(run.results, expected, (isa, emulated, capturable))


@needs_grad_dtype
@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize(("param", "moment", "grad"), MIXED, **MIXED_ID)
def test_a_gradient_of_another_dtype_is_unscaled_in_place(
    param: torch.dtype, moment: torch.dtype, grad: torch.dtype, emulated: int
) -> None:
    plain = Run(param, moment).train(grad)
    scaled = Run(param, moment).train(grad, emulated=emulated, scale=4.0, capturable=True)
    assert_same_bits(list(itertools.chain(*scaled.grads)), [g / 4 for g in itertools.chain(*plain.grads)])
    host = Run(param, moment).train(grad, scale=4.0)
    assert_same_bits(host.results, scaled.results)
    assert_same_bits(list(itertools.chain(*host.grads)), list(itertools.chain(*scaled.grads)))


@pytest.mark.parametrize("grad", [torch.float32, torch.float16], ids=name_of)
def test_a_wider_gradient_is_not_rounded_to_the_params_dtype(grad: torch.dtype) -> None:
    """1 + 2**-9 is 1 in bfloat16. The float32 moment shows what the kernel has seen."""
    param, grads = torch.ones(70, dtype=torch.bfloat16), torch.full((70,), 1 + 2.0**-9, dtype=grad)
    moments = [torch.zeros(70), torch.zeros(70)]
    functional_step([param], [grads], [moments[0]], [moments[1]], [], [torch.zeros(())], lr=0.1, betas=(0.5, 0.5))
    assert torch.equal(moments[0], 0.5 * grads.float())
    assert torch.equal(moments[1], 0.5 * grads.float() ** 2)


@pytest.mark.parametrize(("param", "moment", "grad"), MIXED, **MIXED_ID)
def test_the_functional_form_takes_gradients_of_another_dtype(
    param: torch.dtype, moment: torch.dtype, grad: torch.dtype
) -> None:
    results = []
    for dtype in (param, grad):
        run = Run(param, moment)
        functional_step(run.params, numbers(10, dtype), *run.moments, [], run.steps, lr=1e-2, weight_decay=0.1)
        results.append(run.results)
    assert_same_bits(results[1], results[0])


def test_a_gradient_of_other_strides_and_dtype_is_read_correctly() -> None:
    start, grad = torch.randn(5, 7), torch.randn(7, 5, dtype=torch.bfloat16).t()
    results = []
    for g in (grad, grad.float().contiguous()):
        param, state = start.clone(), [torch.zeros(5, 7), torch.zeros(5, 7)]
        functional_step([param], [g], [state[0]], [state[1]], [], [torch.zeros(())], lr=0.1, weight_decay=0.0)
        results.append([param, *state])
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.complex64),
        (torch.complex64, torch.float32),
        (torch.float32, torch.int32),
    ],
    ids=str,
)
def test_gradients_that_no_kernel_reads_are_refused_by_name(param: torch.dtype, grad: torch.dtype) -> None:
    tensors = [torch.ones(3, dtype=param) for _ in range(3)]
    with pytest.raises(RuntimeError, match=rf"the gradient of params\[0\].*{param}.*{grad}"):
        functional_step(
            [tensors[0]],
            [torch.ones(3, dtype=grad)],
            [tensors[1]],
            [tensors[2]],
            [],
            [torch.zeros(())],
            lr=0.1,
            weight_decay=0.0,
        )
    assert all(torch.equal(tensor, torch.ones(3, dtype=param)) for tensor in tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("param", "moment", "grad"), MIXED, **MIXED_ID)
def test_every_device_has_the_bits_of_the_cpu(
    param: torch.dtype, moment: torch.dtype, grad: torch.dtype, device: str
) -> None:
    """Tensors that begin one element into their memory, on the device too; steps counted there."""
    results = []
    for place in ("cpu", device):
        run = Run(param, moment)
        roles = [run.params, numbers(10, grad), *run.moments]
        params, grads, exp_avgs, exp_avg_sqs = [[shifted(t, place) for t in tensors] for tensors in roles]
        steps = [step.to(place) for step in run.steps]
        functional_step(params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=1e-2, weight_decay=0.1)
        results.append([tensor.cpu() for tensor in (*params, *exp_avgs, *exp_avg_sqs, *steps)])
    assert_same_bits(results[1], results[0])


def shifted(tensor: Tensor, device: str) -> Tensor:
    """A copy that begins one element into its memory."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
    return memory[1:].copy_(tensor)
