"""torch.classes.adamw_ext.AdamW: the bits of the Python class in every mode, in and out of scripts, through files."""

import copy
import gc
import io
import math
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import Trained

# TorchScript's own deprecation, and no other warning.
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported):DeprecationWarning"),
]

ScriptAdamW = torch.classes.adamw_ext.AdamW
SHAPES = [(70,), (3, 5), (), (0,), (2, 3, 4)]
STEPS = 4

# By name: dtype of the params, options.
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {"betas": (0.8, 0.95), "eps": 1e-5}),
    "complex64": (torch.complex64, {}),
    "float16": (torch.float16, {}),
    "amsgrad, maximize": (torch.float32, {"amsgrad": True, "maximize": True}),
    "clipped": (torch.float32, {"max_grad_norm": 0.3}),
    "capturable": (torch.float32, {"capturable": True, "max_grad_norm": 0.3}),
    "bfloat16": (torch.bfloat16, {}),
    "float32 moments": (torch.bfloat16, {"moment_dtype": torch.float32}),
    "bfloat16 moments": (torch.float32, {"moment_dtype": torch.bfloat16, "stochastic_rounding": True}),
    "fp32 master": (torch.bfloat16, {"master_weights": "fp32", "moment_dtype": torch.float32}),
    "float16 with fp32 master": (torch.float16, {"master_weights": "fp32", "moment_dtype": torch.float32}),
    "split": (torch.bfloat16, {"master_weights": "split", "amsgrad": True}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 2**40 + 3}),
    "split, stochastic": (torch.bfloat16, {"master_weights": "split", "stochastic_rounding": True}),
}
every_mode = pytest.mark.parametrize("mode", MODES)


def make_params(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradient(param: Tensor, step: int, index: int) -> Tensor | None:
    """None here and there."""
    if (step + index) % 4 == 3:
        return None
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def advance(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = gradient(param, step, index)
        optimizer.step()


def assert_same_state(ours: dict[int, dict[str, Tensor]], theirs: dict[int, dict[str, Tensor]]) -> None:
    assert ours.keys() == theirs.keys()
    for index in theirs:
        assert ours[index].keys() == theirs[index].keys()
        for key, value in theirs[index].items():
            assert ours[index][key].dtype == value.dtype
            assert torch.equal(ours[index][key], value), f"state {key!r} of param {index}"


def assert_same(ours: tuple[Any, list[Tensor]], theirs: tuple[Any, list[Tensor]]) -> None:
    """Params and state of two optimizers, bit for bit."""
    for index, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        assert torch.equal(a, b), f"param {index}"
    assert_same_state(ours[0].state_dict()["state"], theirs[0].state_dict()["state"])


def make_pair(mode: str) -> tuple[tuple[Any, list[Tensor]], tuple[adamw_ext.AdamW, list[Tensor]]]:
    """The script class and the Python class, each with params of its own, in two groups."""
    dtype, options = MODES[mode]
    ours, theirs = make_params(dtype), make_params(dtype)
    script = ScriptAdamW(ours[:2], lr=0.1, **options)
    script.add_param_group({"params": ours[2:], "lr": 0.03, "weight_decay": 0.5})
    python = adamw_ext.AdamW(theirs[:2], lr=0.1, **options)
    python.add_param_group({"params": theirs[2:], "lr": 0.03, "weight_decay": 0.5})
    return (script, ours), (python, theirs)


@every_mode
def test_it_gives_the_bits_of_the_python_class(mode):
    (script, ours), (python, theirs) = make_pair(mode)
    before = [param.detach().clone() for param in ours]
    advance(script, ours, range(STEPS))
    advance(python, theirs, range(STEPS))
    assert_same((script, ours), (python, theirs))
    assert not any(torch.equal(a, b) for a, b in zip(before, ours, strict=True) if a.numel())
    if "max_grad_norm" in MODES[mode][1]:
        assert script.grad_norm() == python.grad_norm > 0
        assert (script.grad_norm().shape, script.grad_norm().dtype) == ((), torch.float64)
    ours_groups, theirs_groups = script.param_groups(), python.state_dict()["param_groups"]
    for group in (*ours_groups, *theirs_groups):
        group.pop("moment_dtype", None)  # TorchScript's dtypes are ints
    assert ours_groups == theirs_groups


@pytest.mark.parametrize("mode", ["float32", "split, stochastic"])
def test_explicit_gradients_are_those_of_the_params(mode):
    (script, ours), (python, theirs) = make_pair(mode)
    for step in range(STEPS):
        script.step([gradient(param, step, index) for index, param in enumerate(ours)])
    advance(python, theirs, range(STEPS))
    assert_same((script, ours), (python, theirs))


def test_a_list_of_groups():
    params = make_params()
    script = ScriptAdamW.from_groups([{"params": params[:1], "lr": 0.5}, {"params": params[1:], "betas": (0.5, 0.6)}])
    assert [group["lr"] for group in script.param_groups()] == [0.5, 1e-3]
    assert [group["betas"] for group in script.param_groups()] == [(0.9, 0.999), (0.5, 0.6)]
    assert [group["params"] for group in script.param_groups()] == [[0], [1, 2, 3, 4]]


def test_a_group_that_is_added_has_the_constructors_defaults():
    params = make_params()
    script = ScriptAdamW(params[:1], lr=0.5, weight_decay=0.25)
    script.set_lr(0.1)
    script.add_param_group({"params": params[1:]})
    assert [(group["lr"], group["weight_decay"]) for group in script.param_groups()] == [(0.1, 0.25), (0.5, 0.25)]


def test_lr_and_weight_decay_can_be_set_for_all_groups_or_one():
    (script, ours), (python, theirs) = make_pair("float32")
    script.set_lr(0.2)
    script.set_lr(0.4, 1)
    script.set_weight_decay(0.3, 0)
    assert (script.get_lr(), script.get_lr(1)) == (0.2, 0.4)
    assert (script.get_weight_decay(), script.get_weight_decay(1)) == (0.3, 0.5)
    python.param_groups[0].update(lr=0.2, weight_decay=0.3)
    python.param_groups[1].update(lr=0.4)
    advance(script, ours, range(2))
    advance(python, theirs, range(2))
    assert_same((script, ours), (python, theirs))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    params = make_params()
    script = ScriptAdamW(params)
    params[0].grad = torch.ones_like(params[0])
    script.zero_grad(set_to_none)
    assert params[0].grad is None if set_to_none else torch.equal(params[0].grad, torch.zeros_like(params[0]))
    assert params[1].grad is None


def test_zero_grad_keeps_the_gradient_that_it_fills():
    param = torch.nn.Parameter(torch.ones(3))
    grad = param.grad = (param * 2).sum() * torch.ones(3)
    ScriptAdamW([param]).zero_grad(False)
    assert param.grad is grad
    assert grad.grad_fn is None
    assert torch.equal(grad, torch.zeros(3))


def test_a_gradient_scalers_numbers():
    (script, ours), (python, theirs) = make_pair("clipped")
    for found_inf in (0.0, 1.0, 0.0):
        for pair in zip(ours, theirs, strict=True):
            for param in pair:
                param.grad = torch.full_like(param, 8.0)
        script.step(None, torch.tensor(16.0), torch.tensor(found_inf))
        python.grad_scale, python.found_inf = torch.tensor(16.0), torch.tensor(found_inf)
        python.step()
    assert_same((script, ours), (python, theirs))
    assert torch.equal(ours[0].grad, theirs[0].grad)
    assert ours[0].grad[0] == 0.5
    assert script.skipped_steps() == python.skipped_steps == 1


@every_mode
def test_state_dicts_go_both_ways_and_training_goes_on_bit_for_bit(mode):
    (script, ours), (python, theirs) = make_pair(mode)
    advance(python, theirs, range(2))
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    python.param_groups[1]["lr"] = 0.07
    script.load_state_dict(**python.state_dict())
    assert script.get_lr(1) == 0.07
    advance(script, ours, range(2, 4))
    advance(python, theirs, range(2, 4))
    assert_same((script, ours), (python, theirs))

    loaded = make_params(MODES[mode][0])
    with torch.no_grad():
        for a, b in zip(loaded, ours, strict=True):
            a.copy_(b)
    resumed = adamw_ext.AdamW(loaded[:2], **MODES[mode][1])
    resumed.add_param_group({"params": loaded[2:]})
    resumed.load_state_dict(script.state_dict())
    advance(resumed, loaded, range(4, 6))
    advance(script, ours, range(4, 6))
    assert_same((script, ours), (resumed, loaded))


def test_loading_keeps_addresses_and_may_load_from_itself():
    params = make_params()
    script = ScriptAdamW(params)
    advance(script, params, range(2))
    before = script.state()
    copies = {i: {key: value.clone() for key, value in items.items()} for i, items in before.items()}
    swapped = {**script.state_dict()["state"]}
    script.load_state_dict(swapped, script.param_groups())
    assert_same_state(script.state(), copies)
    assert all(script.state()[i][key].data_ptr() == before[i][key].data_ptr() for i in before for key in before[i])


def test_loading_from_its_own_tensors_under_other_keys():
    params = make_params(shapes=[(4,), (4,)])
    script = ScriptAdamW(params)
    advance(script, params, range(2))
    state = script.state()
    expected = {i: {key: value.clone() for key, value in state[1 - i].items()} for i in state}
    script.load_state_dict({0: state[1], 1: state[0]}, script.param_groups())
    assert_same_state(script.state(), expected)


REAL_MODES = [mode for mode, (dtype, _) in MODES.items() if not dtype.is_complex and dtype != torch.float16]


def make_inputs(mode: str) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).to(MODES[mode][0])


@pytest.mark.parametrize("mode", REAL_MODES)
def test_a_scripted_training_step_has_the_bits_of_the_python_loop(mode):
    scripted, model, inputs = torch.jit.script(Trained(*MODES[mode])), Trained(*MODES[mode]), make_inputs(mode)
    optimizer = adamw_ext.AdamW(model.parameters(), lr=0.1, **MODES[mode][1])
    for _ in range(10):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        scripted.train_step(inputs)
    assert_same((scripted.optimizer, list(scripted.parameters())), (optimizer, list(model.parameters())))


def through_a_file(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("mode", REAL_MODES)
def test_a_saved_module_goes_on_bit_for_bit_when_loaded(mode):
    scripted, inputs = torch.jit.script(Trained(*MODES[mode])), make_inputs(mode)
    for _ in range(3):
        scripted.train_step(inputs)
    scripted.optimizer.set_lr(0.02)
    loaded = through_a_file(scripted)
    assert [a is b for a, b in zip(loaded.parameters(), loaded.optimizer.params(), strict=True)] == [True] * 4
    for _ in range(3):
        assert scripted.train_step(inputs) == loaded.train_step(inputs)
    ours, theirs = (loaded.optimizer, list(loaded.parameters())), (scripted.optimizer, list(scripted.parameters()))
    assert_same(ours, theirs)
    assert loaded.optimizer.param_groups() == scripted.optimizer.param_groups()


def test_a_module_that_was_loaded_can_be_saved_again_after_the_first_is_gone():
    scripted, inputs = torch.jit.script(Trained(*MODES["float32"])), make_inputs("float32")
    scripted.train_step(inputs)
    loaded = through_a_file(scripted)
    del scripted
    gc.collect()
    again = through_a_file(loaded)
    assert again.train_step(inputs) == loaded.train_step(inputs)


def test_pickle_keeps_state_groups_and_defaults():
    (script, ours), _ = make_pair("split, stochastic")
    advance(script, ours, range(2))
    loaded = pickle.loads(pickle.dumps(script))
    params = loaded.params()
    assert loaded.param_groups() == script.param_groups()
    for optimizer, own in ((script, ours), (loaded, params)):
        advance(optimizer, own, range(2, 4))
    assert_same((loaded, params), (script, ours))
    loaded.add_param_group({"params": make_params(torch.bfloat16)})
    assert loaded.param_groups()[2]["master_weights"] == "split"


def test_a_copy_that_would_step_the_originals_params_is_refused():
    scripted = torch.jit.script(Trained(*MODES["float32"]))
    for original in (scripted, scripted.optimizer, through_a_file(scripted)):
        with pytest.raises(RuntimeError, match=r"cannot be copied.*torch.jit.save"):
            copy.deepcopy(original)


def test_a_script_that_makes_its_own_optimizer_is_not_optimised_away():
    @torch.jit.script
    def train(params: list[Tensor], grads: list[Tensor | None], lr: float) -> None:
        optimizer = torch.classes.adamw_ext.AdamW([param for param in params], lr=lr)
        for _ in range(3):
            optimizer.step([grad for grad in grads])

    for _ in range(3):  # as long as the executor changes what it runs
        ours, theirs = make_params(), make_params()
        grads = [gradient(param, 0, index) for index, param in enumerate(ours)]
        train(ours, grads, 0.1)
        python = adamw_ext.AdamW(theirs, lr=0.1)
        for _ in range(3):
            for param, grad in zip(theirs, grads, strict=True):
                param.grad = grad
            python.step()
        assert all(map(torch.equal, ours, theirs))


def test_the_methods_can_be_called_from_scripts():
    @torch.jit.script
    def use(params: list[Tensor], found_inf: Tensor):
        group: dict[str, Any] = {"params": params, "lr": 0.1, "max_grad_norm": 0.5}
        optimizer = torch.classes.adamw_ext.AdamW.from_groups([group])
        optimizer.init_state()
        optimizer.set_lr(optimizer.get_lr() / 2, None)
        optimizer.set_weight_decay(optimizer.get_weight_decay() * 2)
        optimizer.step([torch.ones_like(param) for param in params])
        norm = optimizer.grad_norm()
        optimizer.step(None, None, found_inf)
        optimizer.zero_grad()
        optimizer.sync_hyperparameters()
        other = torch.classes.adamw_ext.AdamW(optimizer.params(), max_grad_norm=0.5)
        other.load_state_dict(optimizer.state(), optimizer.param_groups())
        return other.state_dict(), norm

    params = make_params()
    state_dict, norm = use(params, torch.tensor(1.0))
    assert norm == torch.tensor(sum(param.numel() for param in params), dtype=torch.float64).sqrt()
    assert state_dict["param_groups"][0]["lr"] == 0.05
    assert state_dict["param_groups"][0]["weight_decay"] == 0.02
    assert state_dict["state"][0]["step"] == 1


def test_two_threads_take_turns():
    params = make_params(shapes=[(5000,)])
    script = ScriptAdamW(params, lr=1e-4)
    grads = [torch.ones(5000)]

    def work():
        for _ in range(50):
            script.step(grads)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = make_params(shapes=[(5000,)])
    other = ScriptAdamW(expected, lr=1e-4)
    for _ in range(100):
        other.step(grads)
    assert script.state()[0]["step"] == 100
    assert_same((script, params), (other, expected))


def test_it_keeps_its_params_alive_and_lets_them_go_with_it():
    params = make_params()
    script, seen = ScriptAdamW(params), weakref.ref(params[0])
    grads = [torch.ones_like(param) for param in params]
    del params
    gc.collect()
    script.step(grads)
    assert script.state()[0]["step"] == 1
    del script
    gc.collect()
    assert seen() is None


def test_recording_gradients_changes_nothing():
    params = make_params()
    script = ScriptAdamW(params)
    with torch.enable_grad():
        script.step([torch.ones_like(param).requires_grad_() for param in params])
    assert all(param.is_leaf and param.requires_grad and param.grad_fn is None for param in params)
    assert not any(value.requires_grad for items in script.state().values() for value in items.values())


CONSTRUCTIONS = {
    "no params": (lambda p: ScriptAdamW([]), ValueError, "empty parameter list"),
    "no groups": (lambda p: ScriptAdamW.from_groups([]), ValueError, "empty parameter list"),
    "lr": (lambda p: ScriptAdamW(p, lr=-1.0), ValueError, "Invalid learning rate: -1"),
    "nan": (lambda p: ScriptAdamW(p, lr=float("nan")), ValueError, "Invalid learning rate: nan"),
    "eps": (lambda p: ScriptAdamW(p, eps=-1.0), ValueError, "Invalid epsilon value: -1"),
    "betas": (lambda p: ScriptAdamW(p, betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1: 1"),
    "weight_decay": (lambda p: ScriptAdamW(p, weight_decay=-1.0), ValueError, "Invalid weight_decay value: -1"),
    "max_grad_norm": (lambda p: ScriptAdamW(p, max_grad_norm=-1.0), ValueError, "Invalid max_grad_norm value: -1"),
    "seed": (lambda p: ScriptAdamW(p, seed=-1), ValueError, r"seed must be an int in \[0, 2\*\*63\), but is -1"),
    "master_weights": (lambda p: ScriptAdamW(p, master_weights="x"), ValueError, "'fp32', 'split' or None"),
    "integers": (lambda p: ScriptAdamW([torch.ones(2).int()]), RuntimeError, "must have a floating point or complex"),
    "no leaf": (lambda p: ScriptAdamW([p[0] * 2]), ValueError, "can't optimize a non-leaf Tensor"),
    "twice": (lambda p: ScriptAdamW([p[0], p[0]]), ValueError, "more than one parameter group, or twice"),
    "moment_dtype": (
        lambda p: ScriptAdamW(p, moment_dtype=torch.float64),
        ValueError,
        "moment_dtype must be torch.flo",
    ),
    "no dtype": (
        lambda p: ScriptAdamW.from_groups([{"params": p, "moment_dtype": 2**33}]),
        TypeError,
        "a dtype or None",
    ),
    "no 'params'": (lambda p: ScriptAdamW.from_groups([{"lr": 1.0}]), ValueError, "must have 'params'"),
    "params": (lambda p: ScriptAdamW.from_groups([{"params": 3}]), TypeError, "a tensor or a list of tensors"),
    "lr of a group": (lambda p: ScriptAdamW.from_groups([{"params": p, "lr": "x"}]), TypeError, "lr must be a number"),
    "betas of a group": (lambda p: ScriptAdamW.from_groups([{"params": p, "betas": 1.0}]), TypeError, "a pair"),
    "differentiable": (
        lambda p: ScriptAdamW.from_groups([{"params": p, "differentiable": True}]),
        ValueError,
        "by Python's adamw_ext.AdamW alone",
    ),
    "type": (lambda p: ScriptAdamW(3), (RuntimeError, TypeError), "params"),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_an_unusable_construction_is_refused(case):
    make, error, message = CONSTRUCTIONS[case]
    with pytest.raises(error, match=message):
        make(make_params())


MISUSES = {
    "too few": (lambda o, p, g: o.step(g[:-1]), ValueError, "each of the 5 params, but has 4"),
    "too many": (lambda o, p, g: o.step([*g, g[0]]), ValueError, "each of the 5 params, but has 6"),
    "no list": (lambda o, p, g: o.step(3), TypeError, "grads must be a list of tensors or None"),
    "no tensor": (lambda o, p, g: o.step([1, 2, 3, 4, 5]), TypeError, r"grads\[0\] must be a tensor or None"),
    "shape": (lambda o, p, g: o.step([torch.ones(3), *g[1:]]), RuntimeError, r"index 0\) must have shape \[70\]"),
    "dtype": (lambda o, p, g: o.step([g[0].int(), *g[1:]]), RuntimeError, "but has shape .*torch.int32"),
    "device": (lambda o, p, g: o.step([g[0].to("meta"), *g[1:]]), RuntimeError, "but has .* on meta"),
    "sparse": (lambda o, p, g: o.step([g[0].to_sparse(), *g[1:]]), RuntimeError, "does not support sparse gradients"),
    "scale": (lambda o, p, g: o.step(g, torch.tensor(0.0)), ValueError, "grad_scale must be positive and finite"),
    "scale's size": (lambda o, p, g: o.step(g, torch.ones(2)), RuntimeError, "grad_scale must hold 1 element"),
    "group": (lambda o, p, g: o.get_lr(7), IndexError, "no param group 7: there are 1"),
    "group to set": (lambda o, p, g: o.set_lr(0.1, 2**63 - 1), IndexError, "no param group 9223372036854775807"),
    "lr": (lambda o, p, g: o.set_lr(-1.0), ValueError, "Invalid learning rate: -1 in param group 0"),
    "norm": (lambda o, p, g: o.grad_norm(), RuntimeError, "max_grad_norm is set, but it is None"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_refused_and_changes_nothing(case):
    misuse, error, message = MISUSES[case]
    params = make_params()
    script = ScriptAdamW(params)
    advance(script, params, range(2))
    before = [param.detach().clone() for param in params]
    state = copy.deepcopy(script.state())
    grads = [torch.ones_like(param) for param in params]
    with pytest.raises(error, match=message):
        misuse(script, params, grads)
    assert all(map(torch.equal, params, before))
    assert_same_state(script.state(), state)
    script.step(grads)
    assert not torch.equal(params[0], before[0])


def test_a_first_step_that_is_refused_leaves_no_state():
    params = make_params()
    script = ScriptAdamW(params)
    with pytest.raises(RuntimeError, match="must have shape"):
        script.step([torch.ones(1)] * len(params))
    assert script.state() == {}


def test_memory_that_was_freed_is_refused():
    params = make_params()
    script = ScriptAdamW(params)
    grads = [torch.ones_like(param) for param in params]
    script.step(grads)
    params[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"param \(group 0, index 1\) needs 60 bytes of storage"):
        script.step(grads)


LOADS = {
    "param": (lambda s, g: ({**s, 9: s[0]}, g), "has a param 9, but there are 5 params"),
    "groups": (lambda s, g: (s, g * 2), "different number of parameter groups: 2, not 1"),
    "size": (lambda s, g: (s, [{**g[0], "params": [0]}]), "match the size of optimizer's group 0: 1 params, not 5"),
    "no step": (lambda s, g: ({**s, 0: {"exp_avg": s[0]["exp_avg"]}}, g), "'step' of param .* but is missing"),
    "step": (lambda s, g: ({**s, 0: {**s[0], "step": torch.tensor(0.5)}}, g), "whole number of updates, but is 0.5"),
    "infinity": (lambda s, g: ({**s, 0: {**s[0], "step": torch.tensor(math.inf)}}, g), "of updates, but is inf"),
    "shape": (lambda s, g: ({**s, 1: {**s[1], "exp_avg": torch.ones(3)}}, g), r"'exp_avg' of .*index 1\) must be of"),
    "dtype": (lambda s, g: ({**s, 1: {**s[1], "exp_avg": torch.ones(3, 5).int()}}, g), "a floating point dtype"),
    "master": (lambda s, g: ({**s, 1: {**s[1], "master_param": torch.ones(3, 5)}}, g), "a master of another kind"),
    "lr": (lambda s, g: (s, [{**g[0], "lr": -1.0}]), "Invalid learning rate: -1"),
}


@pytest.mark.parametrize("case", LOADS)
def test_an_unfit_state_dict_is_refused_and_changes_nothing(case):
    make, message = LOADS[case]
    params = make_params()
    script = ScriptAdamW(params, lr=0.25)
    advance(script, params, range(2))
    before, groups = copy.deepcopy(script.state()), script.param_groups()
    other = ScriptAdamW(make_params(), lr=0.5)
    advance(other, other.params(), range(3))
    with pytest.raises(ValueError, match=message):
        script.load_state_dict(*make(other.state(), other.param_groups()))
    assert_same_state(script.state(), before)
    assert script.param_groups() == groups


def test_unknown_keys_and_tuples_of_params_are_tolerated_in_groups():
    params = make_params()
    script = ScriptAdamW.from_groups([{"params": tuple(params), "lr": 0.5, "max_lr": 1.0, "initial_lr": 0.5}])
    assert len(script.params()) == len(params)
    assert script.get_lr() == 0.5


def test_a_loaded_dict_may_switch_amsgrad_on():
    params = make_params()
    python = adamw_ext.AdamW(make_params(), amsgrad=True)
    advance(python, python.param_groups[0]["params"], range(2))
    script = ScriptAdamW(params)
    advance(script, params, range(1))
    script.load_state_dict(**python.state_dict())
    assert script.param_groups()[0]["amsgrad"]
    assert_same_state(script.state(), python.state_dict()["state"])


MOVES = {
    "channels last": (torch.float32, {}, lambda p: p.to(memory_format=torch.channels_last)),
    "narrowed": (torch.float32, {"master_weights": "fp32"}, lambda p: p.bfloat16()),
    "widened": (torch.bfloat16, {"master_weights": "fp32", "moment_dtype": torch.float32}, lambda p: p.float()),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_param_that_is_moved_trains_on_as_in_python(move):
    dtype, options, moved = MOVES[move]
    ours, theirs = make_params(dtype, [(2, 3, 4, 5)]), make_params(dtype, [(2, 3, 4, 5)])
    script, python = ScriptAdamW(ours, **options), adamw_ext.AdamW(theirs, **options)
    for optimizer, (param,) in ((script, ours), (python, theirs)):
        param.grad = torch.ones_like(param)
        optimizer.step()
        param.grad = None
        param.data = moved(param.data)
        param.grad = torch.full_like(param, 2.0)
        if move == "narrowed":  # moments stay float32
            optimizer.step()
        optimizer.step()
    assert_same((script, ours), (python, theirs))


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {}], ids=str)
@pytest.mark.parametrize("make", [ScriptAdamW, adamw_ext.AdamW], ids=["script", "python"])
def test_a_mode_that_makes_tensors_without_memory_is_refused_and_leaves_no_trace(make, options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    param, twin = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(4, 6))
    script, other = make([param], **options), make([twin], **options)
    for each, optimizer in ((param, script), (twin, other)):
        each.grad = torch.ones(4, 6)
        optimizer.step()
        each.grad = torch.full((6, 4), 2.0).t()
    if not options:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(RuntimeError, match="makes tensors without memory"),
        ):
            script.step()
    else:
        fresh = make([torch.nn.Parameter(torch.ones(2))], **options)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(RuntimeError, match="makes tensors without memory"),
        ):
            fresh.skipped_steps() if make is ScriptAdamW else fresh.skipped_steps
        assert not int(fresh.skipped_steps() if make is ScriptAdamW else fresh.skipped_steps)
    script.step()
    other.step()
    assert torch.equal(param, twin)
    assert not torch.equal(param, torch.ones(4, 6))


def test_what_a_step_calls_may_read_the_optimizer_but_not_change_it():
    from torch.utils._python_dispatch import TorchDispatchMode

    params = make_params()
    script, seen = ScriptAdamW(params), []

    class Meddling(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(script.get_lr())
            for change in (script.step, script.zero_grad, script.init_state):
                with pytest.raises(RuntimeError, match="from within its own step"):
                    change()
            return func(*args, **(kwargs or {}))

    grads = [torch.ones_like(param) for param in params]
    with Meddling():
        script.step(grads)
    assert seen
    assert script.state()[0]["step"] == 1


def test_saving_in_one_thread_while_another_zeroes_gradients_does_not_hang():
    scripted = torch.jit.script(Trained(*MODES["float32"]))
    params, done = list(scripted.parameters()), threading.Event()

    def train():
        while not done.is_set():
            for param in params:
                param.grad = torch.ones_like(param)
                param.grad.tag = 1  # keeps the gradient's Python object, which is freed with the interpreter's lock
            scripted.optimizer.zero_grad()

    def save():
        for _ in range(100):
            torch.jit.save(scripted, io.BytesIO())
        done.set()

    threads = [threading.Thread(target=work, daemon=True) for work in (train, save)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert done.is_set()


def test_groups_may_be_added_while_others_read():
    script, done = ScriptAdamW(make_params()), threading.Event()

    def read():
        while not done.is_set():
            assert len(script.params()) >= len(SHAPES)
            script.param_groups()

    threads = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        script.add_param_group({"params": [torch.zeros(1)]})
    done.set()
    for thread in threads:
        thread.join(timeout=60)
    assert len(script.params()) == len(SHAPES) + 200
