"""GradScaler's contract on the device: grad_scale and found_inf are read by the kernels, never by the host.

An overflow leaves params, moments, gradients and step counts as they were; otherwise gradients are divided by the
scale, in place too, with the bits of the CPU.
"""

import pytest
import torch
from torch import Tensor

import adamw_ext
from adamw_ext import functional
from tests.helpers import COMBINATIONS, COMPLEX_COMBINATIONS, DEVICES, MODES, assert_same_bits, name_of, on_cpu
from tests.test_bits import FEW_SIZES
from tests.test_cuda_parity import HYPER, STEPS, Combination, Job

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

NON_ZERO = (1.0, 2.0, -1.0, 1e-40, torch.inf, torch.nan)  # found_inf is a sum over devices: 2.0 is one of its values


def train_scaled(job: Job, grad_scale: Tensor | None, overflows: dict[int, float] | None) -> list[Tensor]:
    """Steps with these attributes, as GradScaler sets them; found_inf is 0 where overflows has no other value."""
    found_inf = None if overflows is None else torch.zeros((), device=job.device)
    for step, grads in enumerate(job.grads):
        for param, grad in zip(job.params, grads, strict=True):
            param.grad = grad
        if found_inf is not None and overflows is not None:
            found_inf.fill_(overflows.get(step, 0.0))
        job.optimizer.grad_scale, job.optimizer.found_inf = grad_scale, found_inf
        job.optimizer.step()
        del job.optimizer.grad_scale, job.optimizer.found_inf
    return job.results


@pytest.mark.parametrize("scale", [1.0, 1024.0, 3.0])
@pytest.mark.parametrize("combination", [*COMBINATIONS, *COMPLEX_COMBINATIONS], ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_unscaled_in_place_with_the_bits_of_the_cpu(
    device: str, combination: Combination, scale: float
) -> None:
    """Also when maximizing, whose sign belongs to the update and not to the gradient."""
    for maximize in (False, True):
        untouched = Job(combination, FEW_SIZES, maximize=maximize)
        cpu_job = Job(combination, FEW_SIZES, maximize=maximize)
        expected = train_scaled(cpu_job, torch.tensor(scale), None)
        assert torch.equal(expected[1].nan_to_num(), untouched.results[1].nan_to_num()) == (scale == 1.0)
        for mode, flags in MODES.items():
            for shape in ((), (1,)):
                job = Job(combination, FEW_SIZES, device=device, maximize=maximize, **flags)
                results = train_scaled(job, torch.full(shape, scale, device=device), {})
                assert_same_bits(results, expected, (mode, maximize, shape))


@pytest.mark.parametrize("value", NON_ZERO)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_any_non_zero_found_inf_skips_the_step(device: str, mode: str, value: float) -> None:
    combination = (torch.bfloat16, torch.float32)
    grad_scale = torch.tensor(8.0, device=device)
    untouched = Job(combination, FEW_SIZES).results
    job = Job(combination, FEW_SIZES, device=device, **MODES[mode])
    assert_same_bits(train_scaled(job, grad_scale, dict.fromkeys(range(STEPS), value)), untouched)


@pytest.mark.parametrize("overflows", [{0: 1.0}, {1: 2.0}, {0: 1.0, 2: 2.0}], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_steps_around_an_overflow_have_the_bits_of_the_cpu(
    device: str, combination: Combination, overflows: dict[int, float]
) -> None:
    """The steps after it count on from the steps before it."""
    cpu_job = Job(combination, FEW_SIZES, amsgrad=True)
    expected = train_scaled(cpu_job, torch.tensor(4.0), overflows)
    assert expected[-1].tolist() == [float(i % 3) + STEPS - len(overflows) for i in range(len(FEW_SIZES))]
    for mode, flags in MODES.items():
        job = Job(combination, FEW_SIZES, device=device, amsgrad=True, **flags)
        assert_same_bits(train_scaled(job, torch.tensor(4.0, device=device), overflows), expected, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_at_the_very_first_step_leaves_the_count_at_zero(device: str, mode: str) -> None:
    """In all groups: in TransformerEngine, after such a step, later groups stay one step ahead."""

    def train(device: str, first: float, **flags: bool) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.full((size,), 0.5, device=device)) for size in (3, 40, 0)]
        optimizer = adamw_ext.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], **HYPER, **flags)
        for found_inf in (first, 0.0, 0.0):
            for param in params:
                param.grad = torch.full_like(param, 0.25)
            optimizer.found_inf = torch.tensor(found_inf, device=device)
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        assert [state["step"].item() for state in states] == [2.0 if first else 3.0] * 3
        return on_cpu([*params, *(state[key] for state in states for key in ("exp_avg", "exp_avg_sq"))])

    expected = train("cpu", 1.0)
    assert not torch.equal(expected[0], train("cpu", 0.0)[0])
    assert_same_bits(train(device, 1.0, **MODES[mode]), expected)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_the_functional_form_takes_grad_scale_and_found_inf(device: str, capturable: bool) -> None:
    @torch.no_grad()
    def train(device: str, capturable: bool) -> list[Tensor]:
        combination = (torch.float32, torch.float32)
        job = Job(combination, FEW_SIZES, device=device, capturable=capturable)
        for step, grads in enumerate(job.grads):
            functional.adamw(
                job.params,
                grads,
                job.state["exp_avg"],
                job.state["exp_avg_sq"],
                [],
                job.steps,
                grad_scale=torch.tensor(16.0, device=device),
                found_inf=torch.tensor(2.0 if step == 1 else 0.0, device=device),
                amsgrad=False,
                beta1=0.9,
                beta2=0.99,
                lr=0.01,
                weight_decay=0.1,
                eps=1e-8,
                maximize=False,
                capturable=capturable,
            )
        return job.results

    expected = train_scaled(Job((torch.float32, torch.float32), FEW_SIZES), torch.tensor(16.0), {1: 2.0})
    assert_same_bits(train(device, capturable), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_grad_scaler_drives_every_mode_to_the_same_bits(device: str) -> None:
    """fused=True is AMP-aware and reads the scaler's tensors itself; for the others the scaler unscales and skips."""

    def train(**flags: bool) -> list[Tensor]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(9, 7).to(device))
        optimizer = adamw_ext.AdamW([weight], **HYPER, **flags)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
        for step in range(8):
            optimizer.zero_grad()
            inputs = torch.randn(5, 9, generator=torch.Generator().manual_seed(step)).to(device)
            loss = (inputs @ weight).square().mean() * (torch.inf if step in (0, 4) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[weight]["step"].item() == 6
        assert scaler.get_scale() == 2.0**10  # twice doubled, twice halved
        return on_cpu([weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]])

    expected = train()
    for flags in (MODES["capturable"], MODES["fused"], {"capturable": True, "fused": True}):
        assert_same_bits(train(**flags), expected, flags)
