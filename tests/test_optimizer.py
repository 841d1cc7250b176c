"""The drop-in surface: whatever a user does with torch.optim.AdamW works the same with adamw_ext.AdamW."""

import copy
import ctypes
import gc
import inspect
import io
import pickle
import platform
import tracemalloc
import warnings
import weakref

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from adamw_ext import AdamW

SHAPES = [(7,), (3, 5), (2, 3, 4), (), (130,)]


def make_params(dtype=torch.float64, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def make_grads(params, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(param.shape, generator=generator, dtype=param.dtype) for param in params]


def set_grads(params, seed):
    for param, grad in zip(params, make_grads(params, seed), strict=True):
        param.grad = grad


def assert_same_bits(ours, theirs):
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"tensor {index} differs"


def assert_close(ours, theirs):
    """float64 to the last few bits; float32 to a few units in the last place of the largest term."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        double = a.dtype in (torch.float64, torch.complex128)
        tolerance = {"rtol": 1e-10, "atol": 1e-12} if double else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, index=index: f"tensor {index}: {text}")


def assert_moved(params):
    starts = make_params(params[0].dtype, shapes=[param.shape for param in params])
    assert not any(torch.equal(param, start) for param, start in zip(params, starts, strict=True))


class Twins:
    """Equal params under adamw_ext.AdamW (``ours``) and under torch.optim.AdamW (``theirs``).

    ``arrange`` turns a list of params into the optimizer's first argument; ``theirs`` holds arguments for torch alone.
    """

    def __init__(self, arrange=list, *, dtype=torch.float64, shapes=SHAPES, theirs=None, **arguments):
        self.our_params = make_params(dtype, shapes=shapes)
        self.their_params = make_params(dtype, shapes=shapes)
        self.start = [param.detach().clone() for param in self.our_params]
        own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
        self.ours = AdamW(arrange(self.our_params), **own)
        self.theirs = torch.optim.AdamW(arrange(self.their_params), **{**arguments, **(theirs or {})})
        self.steps = 0

    def both(self):
        return (self.ours, self.our_params), (self.theirs, self.their_params)

    def step(self, count=1, without=()):
        """Steps both with equal gradients; the params at the indices in ``without`` get none."""
        for _ in range(count):
            for optimizer, params in self.both():
                set_grads(params, self.steps)
                for index in without:
                    params[index].grad = None
                optimizer.step()
            self.steps += 1

    def check(self):
        """Params and every item of the state agree, and the params have moved."""
        assert_close(self.our_params, self.their_params)
        assert not any(
            torch.equal(p, s) for p, s in zip(self.our_params, self.start, strict=True) if p.grad is not None
        )
        for ours, theirs in zip(self.our_params, self.their_params, strict=True):
            our_state, their_state = self.ours.state[ours], self.theirs.state[theirs]
            assert our_state.keys() == their_state.keys()
            assert_close(our_state.values(), their_state.values())


# --- The same numbers as torch ---------------------------------------------------------------------------------------

ARGUMENTS = {
    "defaults": {},
    "lr": {"lr": 0.3},
    "betas": {"lr": 0.1, "betas": (0.5, 0.7)},
    "zero_betas": {"lr": 0.1, "betas": (0.0, 0.0)},
    "eps": {"lr": 0.1, "eps": 0.5},
    "weight_decay": {"lr": 0.1, "weight_decay": 0.7},
    "no_weight_decay": {"lr": 0.1, "weight_decay": 0.0},
    "amsgrad": {"lr": 0.1, "amsgrad": True, "betas": (0.9, 0.3)},
    "maximize": {"lr": 0.1, "maximize": True},
    "all": {
        "lr": 0.2,
        "betas": (0.8, 0.6),
        "eps": 1e-3,
        "weight_decay": 0.3,
        "amsgrad": True,
        "maximize": True,
    },
}


@pytest.mark.parametrize("theirs", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_every_argument_means_what_it_means_in_torch(arguments, theirs):
    twins = Twins(**arguments, theirs=theirs)
    twins.step(6)
    twins.check()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_float32_follows_torch(amsgrad, fused):
    twins = Twins(dtype=torch.float32, lr=0.01, amsgrad=amsgrad, theirs={"fused": fused})
    twins.step(6)
    twins.check()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True, "betas": (0.9, 0.3)}, {"maximize": True}], ids=str)
def test_complex_params_follow_torch(dtype, arguments):
    twins = Twins(dtype=dtype, lr=0.1, **arguments, theirs={"foreach": False})
    twins.step(5)
    twins.check()


@pytest.mark.parametrize("flags", [{"foreach": None}, {"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
def test_foreach_is_accepted_and_changes_nothing(flags):
    plain, flagged = make_params(), make_params()
    optimizers = AdamW(plain, lr=0.1), AdamW(flagged, lr=0.1, **flags)
    for step in range(3):
        for optimizer, params in zip(optimizers, (plain, flagged), strict=True):
            set_grads(params, step)
            optimizer.step()
    assert optimizers[1].defaults["foreach"] == flags.get("foreach")
    assert_same_bits(flagged, plain)
    assert not torch.equal(plain[0], make_params()[0])


def test_groups_have_their_own_hyperparameters():
    def groups(params):
        return [
            {"params": params[:1], "lr": 0.3, "weight_decay": 0.0},
            {"params": params[1:3], "betas": (0.5, 0.6), "eps": 0.1},
            {"params": params[3:4], "amsgrad": True, "betas": (0.9, 0.2)},
            {"params": params[4:], "maximize": True, "lr": 0.01},
        ]

    twins = Twins(groups, lr=0.1)
    twins.step(6)
    twins.check()


def test_hyperparameters_changed_between_steps_take_effect():
    twins = Twins(lr=0.1)
    for change in ({"lr": 0.5}, {"betas": (0.3, 0.4)}, {"weight_decay": 0.9}, {"eps": 0.2}, {"maximize": True}):
        for optimizer, _ in twins.both():
            optimizer.param_groups[0].update(change)
        twins.step()
        twins.check()


def test_unknown_group_keys_are_tolerated():
    twins = Twins(lambda params: [{"params": params, "lr_scale": 0.5, "name": "all"}], lr=0.1)
    twins.step(2)
    twins.check()
    assert twins.ours.param_groups[0]["lr_scale"] == 0.5


def test_named_parameters():
    def named(params):
        return [(f"layer.{index}", param) for index, param in enumerate(params)]

    twins = Twins(named, lr=0.1)
    twins.step(3)
    twins.check()
    assert twins.ours.param_groups[0]["param_names"] == [f"layer.{index}" for index in range(len(SHAPES))]
    assert twins.ours.state_dict()["param_groups"] == twins.theirs.state_dict()["param_groups"]


def test_a_named_parameter_appended_to_its_group_is_updated():
    """torch never reads the names in step(), so a list of names that is too short must not matter either."""
    optimizers = []
    for cls in (AdamW, torch.optim.AdamW):
        params = make_params()
        optimizer = cls([("first", params[0])], lr=0.1)
        optimizers.append((optimizer, params))
        set_grads(params, 0)
        optimizer.step()
        optimizer.param_groups[0]["params"].append(params[1])
        optimizer.step()
    (_, ours), (_, theirs) = optimizers
    assert_close(ours, theirs)
    assert not torch.equal(ours[1], make_params()[1])


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr_is_read_at_every_step(shape, dtype):
    twins = Twins(lr=torch.full(shape, 0.1, dtype=dtype), theirs={"lr": 0.1})
    lr = twins.ours.param_groups[0]["lr"]
    for value in (0.1, 0.4, 0.025):
        lr.fill_(value)
        # torch gets the number: from a float32 tensor it computes 1 - lr * weight_decay in float32
        twins.theirs.param_groups[0]["lr"] = lr.item()
        twins.step()
        twins.check()
    assert twins.ours.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
def test_tensor_betas(shape):
    betas = (torch.full(shape, 0.8, dtype=torch.float64), torch.full(shape, 0.9, dtype=torch.float64))
    tensors, floats = make_params(), make_params()
    optimizers = AdamW(tensors, lr=0.1, betas=betas), torch.optim.AdamW(floats, lr=0.1, betas=(0.8, 0.9))
    for step in range(3):
        for optimizer, params in zip(optimizers, (tensors, floats), strict=True):
            set_grads(params, step)
            optimizer.step()
    assert_close(tensors, floats)
    for beta in optimizers[0].param_groups[0]["betas"]:
        beta.fill_(0.5)
    optimizers[1].param_groups[0]["betas"] = (0.5, 0.5)
    for optimizer, params in zip(optimizers, (tensors, floats), strict=True):
        set_grads(params, 3)
        optimizer.step()
    assert_close(tensors, floats)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_capturable_on_the_cpu_equals_eager_bit_for_bit(fused, amsgrad):
    plain, capturable = make_params(torch.float32), make_params(torch.float32)
    optimizers = (
        AdamW(plain, lr=0.1, amsgrad=amsgrad),
        AdamW(capturable, lr=0.1, amsgrad=amsgrad, capturable=True, fused=fused),
    )
    for step in range(4):
        for optimizer, params in zip(optimizers, (plain, capturable), strict=True):
            set_grads(params, step)
            optimizer.step()
    assert_same_bits(capturable, plain)
    assert not torch.equal(plain[0], make_params(torch.float32)[0])
    assert all(optimizers[1].state[param]["step"].item() == 4 for param in capturable)


# --- Params without gradients, later groups --------------------------------------------------------------------------


def test_every_param_keeps_its_own_step_count():
    """Frozen and expert params lag behind their group: their bias correction must be that of their own step."""
    twins = Twins(lr=0.1)
    twins.step(without=(1, 2))
    twins.step(without=(0, 2))
    twins.step(2, without=(3,))
    twins.step()
    twins.check()
    counts = [twins.ours.state[param]["step"].item() for param in twins.our_params]
    assert counts == [4, 4, 3, 3, 5]


def test_params_that_never_have_a_gradient_get_no_state_and_do_not_move():
    twins = Twins(lr=0.1)
    twins.step(3, without=(0, 4))
    assert_close(twins.our_params, twins.their_params)
    assert_same_bits([twins.our_params[0], twins.our_params[4]], [twins.start[0], twins.start[4]])
    assert set(twins.ours.state) == set(twins.our_params[1:4])


def test_a_step_without_any_gradient_does_nothing():
    params = make_params()
    optimizer = AdamW(params)
    optimizer.step()
    assert_same_bits(params, make_params())
    assert len(optimizer.state) == 0


def test_a_param_that_is_frozen_with_a_stale_gradient_is_updated_as_in_torch():
    twins = Twins(lr=0.1)
    twins.step(1)
    for _, params in twins.both():
        params[0].requires_grad_(False)
    twins.step(1)
    twins.check()


def test_a_group_added_after_the_first_step_starts_at_step_one():
    twins = Twins(lambda params: params[:3], lr=0.1)
    twins.step(3)
    for optimizer, params in twins.both():
        optimizer.add_param_group({"params": params[3:], "lr": 0.5, "amsgrad": True})
    twins.step(3)
    twins.check()
    assert [twins.ours.state[param]["step"].item() for param in twins.our_params] == [6, 6, 6, 3, 3]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    twins = Twins(lr=0.1)
    twins.step(2)
    for optimizer, params in twins.both():
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)
        optimizer.step()
    assert_close(twins.our_params, twins.their_params)
    steps = {twins.ours.state[param]["step"].item() for param in twins.our_params}
    assert steps == ({2} if set_to_none else {3})


def test_a_model_trains_as_with_torch():
    def train(cls):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 2)
        ).double()
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1)
        losses = []
        for step in range(10):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = model(torch.randn(5, 3, 8, 8, dtype=torch.float64)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    ours, theirs = train(AdamW), train(torch.optim.AdamW)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert ours[-1] < ours[0]


# --- Autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_gradients_flow_through_a_differentiable_step(amsgrad):
    def meta_gradient(cls):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
        param = weight.clone()
        param.retain_grad()
        optimizer = cls([param], lr=lr, amsgrad=amsgrad, differentiable=True)
        for step in range(1 if amsgrad else 2):  # torch's amsgrad overwrites what backward needs of the step before
            param.grad = (weight * torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64) + step).clone()
            optimizer.step()
        return torch.autograd.grad(param.square().sum(), [weight, lr]), param

    (ours, our_param), (theirs, their_param) = meta_gradient(AdamW), meta_gradient(torch.optim.AdamW)
    assert_close([our_param], [their_param])
    assert_close(ours, theirs)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


def test_a_differentiable_step_reads_no_number_out_of_a_tensor_that_requires_grad():
    lr = torch.tensor(0.1, requires_grad=True)
    param = torch.ones(3, requires_grad=True) * 1.0
    param.grad = torch.ones(3)
    optimizer = AdamW([param], lr=lr, differentiable=True)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    finally:
        torch.set_warn_always(False)
    assert param.grad_fn is not None
    assert param[0] < 1


def test_a_differentiable_group_and_a_plain_group_work_side_by_side():
    twins = Twins(lambda params: [{"params": params[:2]}, {"params": params[2:], "differentiable": True}], lr=0.1)
    twins.step(3)
    twins.check()


def test_autograd_notices_params_that_a_step_has_changed():
    params = [torch.nn.Parameter(torch.randn(3, 3)) for _ in range(2)]
    optimizer = AdamW(params)
    loss = (params[1] @ (params[0] @ torch.randn(3))).sum()
    loss.backward(retain_graph=True)
    versions = [param._version for param in params]
    optimizer.step()
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_param_without_a_gradient_keeps_its_version():
    params = make_params()
    optimizer = AdamW(params)
    set_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    assert [param._version > 0 for param in params] == [True, False, True, True, True]


@pytest.mark.parametrize("arguments", [{}, {"fused": True}, {"maximize": True}, {"amsgrad": True}], ids=str)
def test_gradients_are_not_modified(arguments):
    params = make_params(torch.float32)
    optimizer = AdamW(params, lr=0.1, **arguments)
    for step in range(2):
        set_grads(params, step)
        grads = [param.grad for param in params]
        versions = [grad._version for grad in grads]
        optimizer.step()
        assert_same_bits(grads, make_grads(params, step))
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        assert [grad._version for grad in grads] == versions
    assert_moved(params)


# --- Closures and hooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer_grad", [True, False])
def test_the_closure_is_called_once_with_grad_enabled_and_its_value_returned(outer_grad):
    params, twins = make_params(), make_params()
    ours, theirs = AdamW(params, lr=0.1), torch.optim.AdamW(twins, lr=0.1)
    calls = []

    def closure_of(optimizer, params):
        def closure():
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum(param.square().sum() for param in params)
            loss.backward()
            return loss

        return closure

    with torch.set_grad_enabled(outer_grad):
        for _ in range(3):
            losses = ours.step(closure_of(ours, params)), theirs.step(closure=closure_of(theirs, twins))
            torch.testing.assert_close(*losses)
        assert torch.is_grad_enabled() == outer_grad
    assert calls == [True] * 6
    assert_close(params, twins)
    marker = object()
    assert ours.step(lambda: marker) is marker
    assert ours.step() is None


def test_an_exception_in_the_closure_passes_through_and_changes_nothing():
    params = make_params()
    optimizer = AdamW(params, lr=0.1)
    set_grads(params, 0)

    def closure():
        raise ZeroDivisionError("in the closure")

    with pytest.raises(ZeroDivisionError, match="in the closure"):
        optimizer.step(closure)
    assert_same_bits(params, make_params())
    optimizer.step()
    assert not torch.equal(params[0], make_params()[0])


def test_step_hooks_run_around_the_step_in_torchs_order():
    order, params = [], make_params()
    optimizer = AdamW(params, lr=0.1)
    before = params[0].detach().clone()

    def note(name):
        def hook(hooked, args, kwargs):
            order.append((name, hooked is optimizer, torch.equal(params[0], before)))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        set_grads(params, 0)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert order == [
        ("global pre", True, True),
        ("pre", True, True),
        ("post", True, False),
        ("global post", True, False),
    ]
    optimizer.step()
    assert len(order) == 4


def test_a_pre_hook_can_replace_the_closure():
    params = make_params()
    optimizer = AdamW(params)
    optimizer.register_step_pre_hook(lambda hooked, args, kwargs: ((hooked, lambda: 42.0), {}))
    assert optimizer.step() == 42.0


def test_the_profiler_sees_the_step_under_torchs_name():
    params = make_params()
    optimizer = AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.events()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


# --- Learning rate schedulers ----------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.2, 0.1], total_steps=12),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=0.001),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[3]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_drive_it_as_they_drive_torch(make_scheduler, tensor_lr):
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    twins = Twins(lambda params: [{"params": params[:2]}, {"params": params[2:]}], lr=lr, theirs={"foreach": False})
    schedulers = [make_scheduler(optimizer) for optimizer, _ in twins.both()]
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # schedulers warn when they believe that step() was not called
        for _ in range(10):
            twins.step()
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
            ours, theirs = ([(float(g["lr"]), g["betas"]) for g in o.param_groups] for o, _ in twins.both())
            assert ours == theirs
            seen.add(ours[0])
    twins.check()
    assert len(seen) > 2


# --- Mixed precision -------------------------------------------------------------------------------------------------


def test_fused_makes_it_amp_aware_and_the_default_does_not():
    """An AMP-aware optimizer is handled differently by Accelerate and Lightning, so only fused=True is one."""
    params = make_params()
    assert not hasattr(AdamW(params), "_step_supports_amp_scaling")
    assert not hasattr(AdamW(params, foreach=True, capturable=True), "_step_supports_amp_scaling")
    assert AdamW(params, fused=True)._step_supports_amp_scaling is True
    for duplicate in (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
        assert not getattr(duplicate(AdamW(params)), "_step_supports_amp_scaling", False)
        assert duplicate(AdamW(params, fused=True))._step_supports_amp_scaling is True


def scaled_training(cls, *, fused, steps=8, overflow_at=(2,), unscale=False, first_scale=2.0**10):
    """Trains under a GradScaler. Returns per step (params, gradients after the step, step counts, scale)."""
    params = make_params(torch.float32)
    optimizer = cls(params, lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=first_scale, growth_interval=3)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        weights = make_grads(params, step)
        loss = sum((param * weight).sum() for param, weight in zip(params, weights, strict=True))
        scaler.scale(loss).backward()
        if step in overflow_at:
            params[2].grad.view(-1)[5] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        counts = [int(optimizer.state[p]["step"]) if optimizer.state[p] else 0 for p in params]
        grads = [param.grad.clone() for param in params]
        history.append(([p.detach().clone() for p in params], grads, counts, scaler.get_scale()))
    return history


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled_step", "unscale_first"])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("overflow_at", [(), (2,), (0, 1), (3, 4)], ids=str)
def test_grad_scaler_trains_as_with_torch(fused, overflow_at, unscale):
    ours = scaled_training(AdamW, fused=fused, overflow_at=overflow_at, unscale=unscale)
    theirs = scaled_training(torch.optim.AdamW, fused=fused, overflow_at=overflow_at, unscale=unscale)
    previous = make_params(torch.float32)
    for step, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(mine[0], yours[0])
        if step not in overflow_at:
            assert_close(mine[1], yours[1])
        assert mine[2:] == yours[2:]
        assert all(torch.equal(p, q) for p, q in zip(mine[0], previous, strict=True)) == (step in overflow_at)
        previous = mine[0]
    assert ours[-1][2] == [8 - len(overflow_at)] * len(SHAPES)


def test_a_skipped_step_leaves_params_moments_and_counts_bit_for_bit():
    params = make_params(torch.float32)
    optimizer = AdamW(params, lr=0.1, fused=True)
    set_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    set_grads(params, 1)
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    assert_same_bits(params, before[0])
    for index, state in optimizer.state_dict()["state"].items():
        assert_same_bits(state.values(), before[1][index].values())
    assert_same_bits([p.grad for p in params[1:]], make_grads(params, 1)[1:])
    optimizer.grad_scale = optimizer.found_inf = None
    set_grads(params, 1)
    optimizer.step()
    assert all(optimizer.state[param]["step"].item() == 2 for param in params)


# --- Copies ----------------------------------------------------------------------------------------------------------


def through_torch_save(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("when", [0, 3], ids=["before_the_first_step", "after_three_steps"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True}, {"fused": True}, {"capturable": True}], ids=str)
def test_a_copy_continues_bit_for_bit(duplicate, arguments, when):
    params = make_params(torch.float32)
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}], lr=0.1, **arguments)
    for step in range(when):
        set_grads(params, step)
        optimizer.step()
    copied_params, copied = duplicate((params, optimizer))
    assert type(copied) is AdamW
    for step in range(when, when + 3):
        for each, owner in ((params, optimizer), (copied_params, copied)):
            set_grads(each, step)
            owner.step()
    assert_same_bits(copied_params, params)
    assert not any(c.data_ptr() == p.data_ptr() for c, p in zip(copied_params, params, strict=True))
    for ours, theirs in zip(optimizer.state.values(), copied.state.values(), strict=True):
        assert_same_bits(ours.values(), theirs.values())
        assert ours["step"].item() == when + 3


# --- Construction ----------------------------------------------------------------------------------------------------


def test_the_constructors_arguments_are_torchs():
    ours = inspect.signature(AdamW.__init__).parameters
    theirs = inspect.signature(torch.optim.AdamW.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs) or set(theirs) <= set(ours)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    positional = [name for name, parameter in theirs.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


@pytest.mark.parametrize("method", ["step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"])
def test_the_methods_arguments_are_torchs(method):
    ours = inspect.signature(getattr(AdamW, method)).parameters.values()
    theirs = inspect.signature(getattr(torch.optim.AdamW, method)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_it_is_a_torch_optimizer_with_torchs_defaults_and_groups():
    params = make_params()
    ours, theirs = AdamW(params), torch.optim.AdamW(params)
    assert isinstance(ours, torch.optim.AdamW)
    assert isinstance(ours, torch.optim.Optimizer)
    assert type(ours).__name__ == "AdamW"
    assert ours.defaults == theirs.defaults
    assert ours.state_dict() == theirs.state_dict()
    assert repr(ours) == repr(theirs)


NAN = float("nan")
BAD_ARGUMENTS = {
    "lr_negative": {"lr": -1.0},
    "lr_nan": {"lr": NAN},
    "lr_string": {"lr": "0.1"},
    "lr_none": {"lr": None},
    "lr_tensor_negative": {"lr": torch.tensor(-1.0)},
    "lr_tensor_of_two": {"lr": torch.tensor([0.1, 0.2])},
    "lr_tensor_with_foreach": {"lr": torch.tensor(0.1), "foreach": True},
    "eps_negative": {"eps": -1e-8},
    "eps_nan": {"eps": NAN},
    "beta1_one": {"betas": (1.0, 0.999)},
    "beta1_negative": {"betas": (-0.1, 0.999)},
    "beta2_one": {"betas": (0.9, 1.0)},
    "beta2_nan": {"betas": (0.9, NAN)},
    "betas_mixed": {"betas": (torch.tensor(0.9), 0.999)},
    "betas_ints": {"betas": (0, 0)},
    "betas_one": {"betas": (0.9,)},
    "betas_float": {"betas": 0.9},
    "betas_tensor_with_foreach": {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    "betas_tensor_of_two": {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.99))},
    "weight_decay_negative": {"weight_decay": -0.1},
    "weight_decay_nan": {"weight_decay": NAN},
    "fused_and_foreach": {"fused": True, "foreach": True},
    "fused_and_differentiable": {"fused": True, "differentiable": True},
    "unknown_argument": {"momentum": 0.9},
    "too_many_positional": None,
}


def error_of(call):
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_raise_what_torch_raises(arguments):
    def construct(cls):
        if arguments is None:
            return cls(make_params(), 0.1, (0.9, 0.999), 1e-8, 0.01, False, False)
        return cls(make_params(), **arguments)

    (our_type, our_message), (their_type, their_message) = (
        error_of(lambda cls=cls: construct(cls)) for cls in (AdamW, torch.optim.AdamW)
    )
    assert our_type is their_type
    assert our_message == their_message


SHARED = torch.nn.Parameter(torch.zeros(2))
BAD_PARAMS = {
    "tensor": lambda: torch.zeros(2),
    "empty": list,
    "none": lambda: None,
    "not_tensors": lambda: [1.0, 2.0],
    "set": lambda: [{"params": {SHARED}}],
    "not_a_leaf": lambda: [SHARED * 2],
    "two_groups": lambda: [{"params": [SHARED]}, {"params": [SHARED]}],
    "some_names": lambda: [("a", SHARED), torch.nn.Parameter(torch.zeros(2))],
    "group_without_params": lambda: [{"lr": 0.1}],
    "mixed_groups_and_tensors": lambda: [{"params": [SHARED]}, torch.zeros(2)],
}


@pytest.mark.parametrize("make", BAD_PARAMS.values(), ids=BAD_PARAMS.keys())
def test_bad_params_raise_what_torch_raises(make):
    ours, theirs = (error_of(lambda cls=cls: cls(make())) for cls in (AdamW, torch.optim.AdamW))
    assert ours == theirs


def test_bad_groups_added_later_raise_what_torch_raises():
    def add(cls, group):
        optimizer = cls([SHARED])
        optimizer.add_param_group(group)

    for group in ([SHARED], {"params": [SHARED]}, {"params": [3]}):
        ours, theirs = (error_of(lambda cls=cls, g=group: add(cls, copy.copy(g))) for cls in (AdamW, torch.optim.AdamW))
        assert ours == theirs


# --- init_state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_init_state_creates_all_state_and_moves_nothing(amsgrad):
    params = make_params()
    params[1].requires_grad_(False)
    optimizer = AdamW([{"params": params[:3]}, {"params": params[3:]}], lr=0.1, amsgrad=amsgrad)
    optimizer.init_state()
    assert_same_bits(params, make_params())
    keys = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    for param in params:
        state = optimizer.state[param]
        assert state.keys() == keys
        assert all(not tensor.any() and not tensor.requires_grad for tensor in state.values())
        assert all(state[key].shape == param.shape and state[key].dtype == param.dtype for key in keys - {"step"})
        assert (state["step"].shape, state["step"].dtype) == ((), torch.float32)
    assert set(optimizer.state_dict()["state"]) == set(range(len(params)))


def test_init_state_changes_no_later_step():
    params, twins = make_params(), make_params()
    ours, theirs = AdamW(params, lr=0.1), AdamW(twins, lr=0.1)
    for step in range(4):
        ours.init_state()  # again and again: what exists stays
        set_grads(params, step)
        set_grads(twins, step)
        params[0].grad = twins[0].grad = None
        ours.step()
        theirs.step()
    assert_same_bits(params, twins)
    assert ours.state[params[0]]["step"].item() == 0
    assert ours.state[params[1]]["step"].item() == 4


def test_state_looks_as_torchs_does():
    twins = Twins(dtype=torch.bfloat16, lr=0.1, amsgrad=True)
    twins.step()
    assert_moved(twins.our_params)
    for ours, theirs in zip(twins.our_params, twins.their_params, strict=True):
        described = [
            [(key, t.shape, t.dtype, t.device, t.stride(), t.requires_grad) for key, t in state.items()]
            for state in (twins.ours.state[ours], twins.theirs.state[theirs])
        ]
        assert described[0] == described[1]


# --- What a step costs and leaves behind -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW, torch.optim.AdamW])
def test_an_optimizer_stepped_from_hooks_of_its_own_params_is_collected(cls):
    model = torch.nn.Linear(3, 3)
    optimizers = {param: cls([param], lr=0.1) for param in model.parameters()}

    def hook(param):
        optimizers[param].step()
        param.grad = None

    for param in optimizers:
        param.register_post_accumulate_grad_hook(hook)
    before = model.weight.detach().clone()
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
    assert not torch.equal(model.weight, before)
    watched = [weakref.ref(optimizer) for optimizer in optimizers.values()] + [weakref.ref(model.weight)]
    optimizers = model = hook = param = None
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)


def test_an_optimizer_and_its_params_are_freed_without_the_garbage_collector():
    torch.optim.AdamW(make_params())  # a process's first optimizer of torch's is kept by frames of torch's imports
    gc.collect()
    gc.disable()
    try:
        params = make_params()
        optimizer = AdamW(params)
        set_grads(params, 0)
        optimizer.step()
        assert_moved(params)
        moment = weakref.ref(optimizer.state[params[0]]["exp_avg"])
        param = weakref.ref(params[0])
        del params, optimizer
        assert moment() is None
        assert param() is None
    finally:
        gc.enable()


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_thousands_of_steps_leave_nothing_behind():
    params = make_params(torch.float32, shapes=[(64,)] * 40)
    optimizer = AdamW(params, lr=0.001)
    set_grads(params, 0)
    for _ in range(200):
        optimizer.step()
    gc.collect()
    objects = len(gc.get_objects())
    resident = resident_bytes() if platform.system() == "Linux" else 0
    for _ in range(3000):
        optimizer.step()
    gc.collect()
    assert len(gc.get_objects()) - objects < 20
    if platform.system() == "Linux":  # 1 KiB a step; fewer steps drown in the 2 MiB of a huge page, made of small ones
        assert resident_bytes() - resident < 3 << 20
    assert all(optimizer.state[param]["step"].item() == 3200 for param in params)


def tensor_bytes_allocated(optimizer):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    return sum(max(0, event.cpu_memory_usage) for event in profile.events() if event.name == "[memory]") + sum(
        max(0, event.self_cpu_memory_usage) for event in profile.key_averages()
    )


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True, "maximize": True}, {"fused": True}], ids=str)
def test_a_steady_step_allocates_no_tensor_memory(arguments):
    def allocated(cls):
        params = make_params(torch.float32, shapes=[(1000,)] * 3)
        optimizer = cls(params, **arguments)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        allocated = tensor_bytes_allocated(optimizer)
        assert_moved(params)
        assert optimizer.state[params[0]]["step"].item() == 4
        return allocated

    assert allocated(AdamW) == 0
    assert tensor_bytes_allocated(torch.optim.AdamW(first_use(), foreach=True)) > 0  # the counter does count


def first_use():
    params = make_params(torch.float32, shapes=[(1000,)] * 3)
    set_grads(params, 0)
    return params


def test_a_steady_step_makes_no_python_object_per_param():
    def peak(count):
        params = make_params(torch.float32, shapes=[(4,)] * count)
        optimizer = AdamW(params)
        set_grads(params, 0)
        for _ in range(3):
            optimizer.step()
        gc.collect()
        tracemalloc.start()
        try:
            optimizer.step()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            optimizer.step()
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
            assert all(optimizer.state[param]["step"].item() == 5 for param in params)

    assert peak(400) <= peak(4) + 1024


def test_a_steady_step_keeps_no_heap_memory():
    """Counted by the C library, so that memory of the extension which no Python tool sees is included."""

    class Counts(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
        ] + [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]

    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("this C library has no mallinfo2")
    mallinfo2.restype = Counts
    params = make_params(torch.float32, shapes=[(64,)] * 40)
    optimizer = AdamW(params)
    set_grads(params, 0)
    optimizer.step()

    def held():
        counts = mallinfo2()
        return counts.uordblks + counts.hblkhd

    for _ in range(100):
        optimizer.step()
    gc.collect()
    before = held()
    for _ in range(500):
        optimizer.step()
    gc.collect()
    assert held() - before < 16 << 10
    assert all(optimizer.state[param]["step"].item() == 601 for param in params)


def test_equal_runs_give_equal_bits():
    def run(threads):
        torch.set_num_threads(threads)
        params = make_params(torch.float32, shapes=[(100_000,), (3,), (5000,)])
        optimizer = AdamW(params, lr=0.1)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        return params

    threads = torch.get_num_threads()
    try:
        first, second, single = run(threads), run(threads), run(1)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(first, second)
    assert_same_bits(first, single)
    assert not torch.equal(first[0], make_params(torch.float32, shapes=[(100_000,)])[0])


def test_an_error_in_the_middle_of_a_step_does_not_make_it_happen_twice():
    """A launch can fail after others have changed params. Trying again would apply these twice, and silently."""

    class FailsInTheMiddle:
        started = True

        def __init__(self, stepper):
            self.stepper = stepper

        def step(self, *arguments):
            assert self.stepper.step(*arguments)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AdamW([param], lr=0.1)
    optimizer.step()
    assert optimizer._stepper.started
    optimizer._stepper = FailsInTheMiddle(optimizer._stepper)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 2


def test_a_refused_step_has_not_started():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AdamW([param], lr=0.1)
    optimizer.step()
    stepper = optimizer._stepper
    optimizer.state[param]["exp_avg"].resize_(2)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert not stepper.started
