"""Bugs that other AdamW implementations had or have, each a test here. Where there is a public issue, it is cited.

Those that need a GPU, other gradient dtypes, master weights or clipping come with the issues that add these.
"""

import copy
import os

import pytest
import torch

import adamw_ext
from adamw_ext import AdamW
from tests.reference import Textbook


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_params(shapes, dtype=torch.float32):
    return [torch.nn.Parameter(random(shape, index, dtype)) for index, shape in enumerate(shapes)]


def set_grads(params, step, scale=1.0):
    for index, param in enumerate(params):
        param.grad = random(param.shape, 1000 * (step + 1) + index, param.dtype) * scale


def assert_matches(params, textbook):
    for index, (param, expected) in enumerate(zip(params, textbook.params, strict=True)):
        torch.testing.assert_close(
            param.detach().double(), expected, rtol=1e-5, atol=1e-6, msg=lambda text, i=index: f"param {i}: {text}"
        )


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_strides_differ(fused):
    """torch 2.13 CPU fused walks param and gradient in memory order, whatever their strides: wrong values."""
    start = random((6, 4), 0)
    param = torch.nn.Parameter(start.clone())
    optimizer, textbook = AdamW([param], lr=0.1, fused=fused), Textbook([start], lr=0.1)
    for step in range(3):
        param.grad = random((4, 6), step).t()
        textbook.step([param.grad])
        optimizer.step()
    assert_matches([param], textbook)


@pytest.mark.parametrize("fused", [None, True])
def test_strided_param_writes_nothing_outside(fused):
    """torch 2.13 CPU fused writes a param buf[::2] as if it were contiguous: over its neighbours."""
    buffer = torch.full((200,), 9.0)
    param = torch.nn.Parameter(buffer[20:180:2])
    start = random((80,), 0)
    param.data.copy_(start)
    optimizer, textbook = AdamW([param], lr=0.1, fused=fused), Textbook([start], lr=0.1)
    for step in range(3):
        set_grads([param], step)
        textbook.step([param.grad])
        optimizer.step()
    assert_matches([param], textbook)
    assert (buffer[21:180:2] == 9.0).all()
    assert (buffer[:20] == 9.0).all()
    assert (buffer[180:] == 9.0).all()


@pytest.mark.parametrize("fused", [None, True])
def test_expanded_gradient(fused):
    """torch 2.13 CPU fused reads an expanded gradient as if it were contiguous: out of bounds."""
    start = random((5, 40), 0)
    param = torch.nn.Parameter(start.clone())
    optimizer, textbook = AdamW([param], lr=0.1, fused=fused), Textbook([start], lr=0.1)
    for step, shape in enumerate([(1, 40), (5, 1), (1, 1)]):
        param.grad = random(shape, step).expand(5, 40)
        textbook.step([param.grad])
        optimizer.step()
    assert_matches([param], textbook)


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 8.0])
def test_found_inf_of_two_skips_the_step(found_inf):
    """found_inf is a sum over devices: torch 2.13 CPU fused skips at exactly 1, updates at 2, and params become NaN."""
    params = make_params([(5,), (3, 4)])
    optimizer = AdamW(params, lr=0.1, fused=True)
    set_grads(params, 0)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    for param in params:
        param.grad.fill_(float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
    optimizer.step()
    for param, old in zip(params, before[0], strict=True):
        assert torch.equal(param, old)
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before[1][index][key]), key
    optimizer.found_inf.zero_()
    set_grads(params, 1)
    optimizer.step()
    assert all(optimizer.state[param]["step"].item() == 2 for param in params)
    assert not any(torch.equal(param, old) for param, old in zip(params, before[0], strict=True))


@pytest.mark.parametrize("zero_lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_capturable_lr_zero_zero_grad_stays_finite(zero_lr):
    """torch's capturable branch divides by lr: with lr = 0 and a zero gradient, 0 * inf makes the param NaN.

    A warm-up that starts at lr = 0 does this, and so does torch.distributed.checkpoint when it creates state.
    """
    params = make_params([(5,), (3, 4)])
    optimizer = AdamW(params, lr=copy.copy(zero_lr), capturable=True)
    before = copy.deepcopy(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(2):
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
        assert optimizer.state[param]["step"].item() == 2
    optimizer.param_groups[0]["lr"] = 0.1
    set_grads(params, 0)
    optimizer.step()
    assert all(
        param.isfinite().all() and not torch.equal(param, old) for param, old in zip(params, before, strict=True)
    )


def test_nonfused_checkpoint_into_fused_with_grad_scaler():
    """torch takes fused=False from the checkpoint, keeps _step_supports_amp_scaling, and the first scaled step fails:
    AssertionError: Expected grad_scale and found_inf to be None."""
    source_params = make_params([(5,), (3, 4)])
    source = torch.optim.AdamW(source_params, lr=0.1)
    set_grads(source_params, 0)
    source.step()

    params = [torch.nn.Parameter(param.detach().clone()) for param in source_params]
    optimizer = AdamW(params, lr=0.1, fused=True)
    optimizer.load_state_dict(source.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    loss = sum((param * random(param.shape, 7)).sum() for param in params)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()

    for param in source_params:
        param.grad = random(param.shape, 7)
    source.step()
    for ours, theirs in zip(params, source_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert optimizer.state[ours]["step"].item() == 2


def test_state_addresses_survive_load_state_dict():
    """torch replaces the state tensors: a captured graph goes on with the memory of the old ones."""
    params = make_params([(5,), (3, 4)])
    optimizer = AdamW(params, lr=0.1, capturable=True, amsgrad=True)
    set_grads(params, 0)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    tensors = [
        (param, key, tensor, tensor.data_ptr()) for param in params for key, tensor in optimizer.state[param].items()
    ]
    set_grads(params, 1)
    optimizer.step()
    optimizer.load_state_dict(checkpoint)
    for param, key, tensor, address in tensors:
        assert optimizer.state[param][key] is tensor
        assert tensor.data_ptr() == address
    assert [optimizer.state[param]["step"].item() for param in params] == [1.0, 1.0]


# --- apex and TransformerEngine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("empty_shape", [(0,), (0, 3), (4, 0, 2)], ids=str)
def test_empty_tensor_last_in_list_te_3207(where, empty_shape):
    """TransformerEngine#3207, #3202: with an empty tensor last, the updates of the last chunk were dropped, or its
    metadata was read out of bounds."""
    shapes = [(5,), (3, 4), (1000,), (70,)]
    shapes.insert(where, empty_shape)
    params = make_params(shapes)
    textbook = Textbook(params, lr=0.1)
    optimizer = AdamW(params, lr=0.1)
    for step in range(3):
        set_grads(params, step)
        textbook.step([param.grad for param in params])
        optimizer.step()
    assert_matches(params, textbook)
    assert [optimizer.state[param]["step"].item() for param in params] == [3.0] * 5


def test_only_empty_tensors():
    params = make_params([(0,), (0, 2)])
    optimizer = AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2.0, 2.0]


@pytest.mark.parametrize("capturable", [False, True])
def test_capturable_keeps_float32_moments_te_1863(capturable):
    """TransformerEngine#1863: the capturable kernel rounded float32 moments to the param's dtype at every step."""
    start = random((100,), 0).bfloat16()
    param = torch.nn.Parameter(start.clone())
    optimizer, textbook = AdamW([param], lr=0.01, capturable=capturable), Textbook([start], lr=0.01)
    optimizer.init_state()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][key] = torch.zeros(100)
    for step in range(20):
        set_grads([param], step, scale=1e-3)
        textbook.step([param.grad])
        optimizer.step()
    for key, expected in (("exp_avg", textbook.exp_avgs[0]), ("exp_avg_sq", textbook.exp_avg_sqs[0])):
        moment = optimizer.state[param][key]
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment.double(), expected, rtol=1e-4, atol=1e-9)
        assert not torch.equal(moment, moment.bfloat16().float()), "rounded to bfloat16"


def test_20321_tensors_te_3418():
    """TransformerEngine#3418: that many tensors failed."""
    count = 20_321
    values, grads = random((count, 3), 0), random((count, 3), 1)
    params = [torch.nn.Parameter(row) for row in values.clone().unbind()]
    optimizer, textbook = AdamW(params, lr=0.1), Textbook([values], lr=0.1)
    for param, grad in zip(params, grads.unbind(), strict=True):
        param.grad = grad
    for _ in range(2):
        optimizer.step()
        textbook.step([grads])
    assert_matches([torch.stack([param.detach() for param in params])], textbook)
    assert all(state["step"].item() == 2 for state in optimizer.state.values())


def test_groups_without_gradients_stay_in_step_te_1986():
    """TransformerEngine#1986: a step in which a group had no gradients put its step count out of line."""
    params = make_params([(5,), (6,), (7,)])
    textbooks = [Textbook([param], lr=0.1) for param in params]
    optimizer = AdamW([{"params": [param]} for param in params], lr=0.1)
    for step, active in enumerate([(0, 1, 2), (0,), (1, 2), (), (0, 2), (0, 1, 2)]):
        set_grads(params, step)
        for index, param in enumerate(params):
            if index not in active:
                param.grad = None
            textbooks[index].step([param.grad])
        optimizer.step()
    for param, textbook in zip(params, textbooks, strict=True):
        assert_matches([param], textbook)
    assert [optimizer.state[param]["step"].item() for param in params] == [4.0, 3.0, 4.0]


def test_first_step_overflow_keeps_groups_in_step():
    """apex: when the very first step overflowed, only the first group took its step count back; the later groups
    stayed one step ahead for ever."""
    params = make_params([(5,), (6,), (7,)])
    textbook = Textbook(params, lr=0.1)
    optimizer = AdamW([{"params": [param]} for param in params], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(4):
        optimizer.zero_grad()
        weights = [random(param.shape, 50 + 10 * step + index) for index, param in enumerate(params)]
        scaler.scale(sum((p * w).sum() for p, w in zip(params, weights, strict=True))).backward()
        if step == 0:
            params[0].grad[2] = float("inf")
        else:
            textbook.step(weights)
        scaler.step(optimizer)
        scaler.update()
        assert [optimizer.state[param]["step"].item() for param in params] == [float(step)] * 3
    assert_matches(params, textbook)


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True], ids=["one_tensor", "in_total"])
def test_more_than_two_to_the_31_elements_te_2918_apex_1654_deepspeed_7640(split):
    """TransformerEngine#2918, apex#1654, DeepSpeed#7640: 32-bit indices made a fault, or no update."""
    count = 2**31 + 70_000
    needed = 3.2 * 2 * count  # param and moments; the gradient is never written, so its pages take no memory
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, found {available / 2**30:.0f}")
    sizes = [count // 2, count - count // 2] if split else [count]
    params = [torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in sizes]
    optimizer = AdamW(params, lr=0.5, weight_decay=0.0)
    for param in params:
        param.grad = torch.zeros(param.numel(), dtype=torch.bfloat16)
    places = sorted(
        {0, 1, sizes[0] - 1, sizes[0] // 2, min(2**31, sizes[0]) - 1, *({2**31, count - 1} if not split else {0})}
    )
    for param in params:
        for place in places:
            param.grad[min(place, param.numel() - 1)] = 1.0
    optimizer.step()
    for param in params:
        touched = sorted({min(place, param.numel() - 1) for place in places})
        assert [param[place].item() for place in touched] == [-0.5] * len(touched)
        assert int(torch.count_nonzero(param.detach())) == len(touched)


# --- DeepSpeed CPUAdam -----------------------------------------------------------------------------------------------


def test_noncontiguous_params_are_updated_deepspeed():
    """DeepSpeed's CPUAdam worked on a contiguous copy of such a param and threw it away."""
    starts = [random((6, 4), 0), random((6, 4), 1), random((2, 3, 4, 5), 2)]
    params = [
        torch.nn.Parameter(starts[0].t().contiguous().t()),
        torch.nn.Parameter(torch.stack([starts[1]] * 3, -1)[..., 1]),
        torch.nn.Parameter(starts[2].to(memory_format=torch.channels_last)),
    ]
    assert not any(param.is_contiguous() for param in params)
    optimizer, textbook = AdamW(params, lr=0.1), Textbook(starts, lr=0.1)
    for step in range(3):
        set_grads(params, step)
        textbook.step([param.grad for param in params])
        optimizer.step()
    assert_matches(params, textbook)


def test_every_param_keeps_its_own_step_deepspeed_8471():
    """DeepSpeed#8471: only the step count of the last active param advanced."""
    params = make_params([(5,), (6,), (7,), (8,)])
    textbook = Textbook(params, lr=0.1)
    optimizer = AdamW(params, lr=0.1)
    pattern = [(0, 1, 2, 3), (0, 3), (1, 3), (0, 1), (2,), (0, 1, 2, 3)]
    for step, active in enumerate(pattern):
        set_grads(params, step)
        for index, param in enumerate(params):
            if index not in active:
                param.grad = None
        textbook.step([param.grad for param in params])
        optimizer.step()
    assert_matches(params, textbook)
    assert [optimizer.state[param]["step"].item() for param in params] == textbook.steps == [4, 4, 3, 4]


def test_the_binary_runs_without_vector_extensions_deepspeed_1886(monkeypatch):
    """DeepSpeed#1886: a binary built with -march=native dies with SIGILL on another processor. Here one binary holds a
    loop that every processor runs, and the wider ones give its bits."""
    assert adamw_ext.build_info()["isa_levels"][0] == "baseline"
    results = []
    for isa in (None, "baseline"):
        if isa is None:
            monkeypatch.delenv("ADAMW_EXT_ISA", raising=False)
        else:
            monkeypatch.setenv("ADAMW_EXT_ISA", isa)
        params = make_params([(1000,), (33,)])
        optimizer = AdamW(params, lr=0.1)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        results.append(params)
    for default, baseline in zip(*results, strict=True):
        assert torch.equal(default, baseline)
    assert not torch.equal(results[0][0], make_params([(1000,)])[0])


# --- Others ----------------------------------------------------------------------------------------------------------


def test_weight_decay_of_bfloat16_params_is_applied_before_rounding():
    """Optimizers for bfloat16 that decay the param in place first lose the decay: lr * wd = 1e-4 of a number is less
    than half of its last bit. Here decay and update are added in float32 and rounded once."""
    start = (random((20_000,), 0) + 3.0).bfloat16()
    grad = random((20_000,), 1).bfloat16()
    param = torch.nn.Parameter(start.clone())
    param.grad = grad
    optimizer = AdamW([param], lr=1e-2, weight_decay=1e-2)
    optimizer.init_state()
    textbook = Textbook([start], lr=1e-2, weight_decay=1e-2)
    for seed, key, expected in ((2, "exp_avg", textbook.exp_avgs), (3, "exp_avg_sq", textbook.exp_avg_sqs)):
        optimizer.state[param][key] = random((20_000,), seed).abs()
        expected[0] = optimizer.state[param][key].double()
    optimizer.state[param]["step"].fill_(1000.0)
    textbook.steps = [1000]
    optimizer.step()
    textbook.step([grad])
    exact = textbook.params[0].float().bfloat16()
    without_decay = (textbook.params[0] + 1e-4 * start.double()).float().bfloat16()
    assert (param == exact).double().mean() > 0.999  # but for ties of the last bit
    assert (without_decay == exact).double().mean() < 0.99  # the decay does decide the last bit of some


@pytest.mark.parametrize("capturable", [False, True])
def test_step_and_lr_are_not_baked_flashoptim(capturable):
    """FlashOptim: the values of step and lr at the time of the first capture are used for ever."""
    lr = torch.tensor(0.1)
    params = make_params([(5,), (6,)])
    textbook = Textbook(params, lr=0.1)
    optimizer = AdamW(params, lr=lr, capturable=capturable)
    for step, value in enumerate([0.1, 0.5, 0.02]):
        lr.fill_(value)
        textbook.lr = value
        set_grads(params, step)
        textbook.step([param.grad for param in params])
        optimizer.step()
    assert_matches(params, textbook)
    for param in params:
        optimizer.state[param]["step"].fill_(100.0)
    textbook.steps = [100, 100]
    set_grads(params, 9)
    textbook.step([param.grad for param in params])
    optimizer.step()
    assert_matches(params, textbook)


def test_frozen_params_state_on_resume():
    """Frozen, unused and expert params without a gradient have no state in the checkpoint, and strict loaders fail.
    init_state() creates it; their first update after the resume is still their step one."""

    def build():
        params = make_params([(5,), (6,), (7,)])
        return params, AdamW(params, lr=0.1), Textbook(params, lr=0.1)

    params, optimizer, textbook = build()
    optimizer.init_state()
    for step in range(3):
        set_grads(params, step)
        params[1].grad = None
        textbook.step([param.grad for param in params])
        optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    assert [checkpoint["state"][index]["step"].item() for index in range(3)] == [3.0, 0.0, 3.0]

    resumed_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = AdamW(resumed_params, lr=0.1)
    resumed.load_state_dict(checkpoint)
    for step in range(3, 5):
        set_grads(resumed_params, step)
        textbook.step([param.grad for param in resumed_params])
        resumed.step()
    assert_matches(resumed_params, textbook)
    assert [resumed.state[param]["step"].item() for param in resumed_params] == [5.0, 2.0, 5.0]


def test_default_is_not_amp_aware_accelerate_4242():
    """accelerate#4242: an optimizer with _step_supports_amp_scaling is stepped with scaled gradients it never unscales
    where the framework keeps grad_scale from it. Only fused=True asks for that contract."""
    params = make_params([(5,)])
    assert not getattr(AdamW(params), "_step_supports_amp_scaling", False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    textbook = Textbook(params, lr=0.1)
    optimizer = AdamW(params, lr=0.1)
    weight = random((5,), 3)
    scaler.scale((params[0] * weight).sum()).backward()
    scaler.step(optimizer)
    textbook.step([weight])
    assert_matches(params, textbook)


def test_float32_moments_of_a_bfloat16_model_survive_a_load_pytorch_75224():
    """pytorch#75224: load_state_dict casts the state to the dtype of the param."""
    params = make_params([(5,)], torch.bfloat16)
    optimizer = AdamW(params, lr=0.1)
    optimizer.init_state()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[params[0]][key] = torch.zeros(5)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].any()
    resumed = AdamW([torch.nn.Parameter(params[0].detach().clone())], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    (state,) = resumed.state.values()
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], optimizer.state[params[0]][key])
