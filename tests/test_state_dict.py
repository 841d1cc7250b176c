"""State dicts: they go to torch.optim.AdamW and back, and a resumed run has the bits of one that never stopped."""

import copy
import io
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from adamw_ext import AdamW

SHAPES = [(5,), (3, 4), (), (70,)]
FLAGS = ("foreach", "capturable", "fused", "differentiable")
NEWER_KEYS = (*FLAGS, "maximize", "amsgrad", "decoupled_weight_decay")  # what pickles of older torch versions lack


def make_params(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def take_steps(optimizer, params, first, count):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        before = params[-1].detach().clone()
        optimizer.step()
        assert not torch.equal(params[-1].detach(), before), "the step moved nothing"


def groups_of(params):
    return [{"params": params[:2], "lr": 0.1, "weight_decay": 0.3}, {"params": params[2:], "betas": (0.7, 0.8)}]


def trained(cls=AdamW, steps=3, dtype=torch.float64, **arguments):
    params = make_params(dtype)
    optimizer = cls(groups_of(params), lr=0.05, **arguments)
    take_steps(optimizer, params, 0, steps)
    return optimizer, params


def fresh_copy(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_bits(ours, theirs):
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b), f"tensor {index} differs"


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def snapshot(optimizer):
    """Everything that a refused load must leave alone: values, objects and addresses."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = {param: dict(optimizer.state[param]) for param in params if param in optimizer.state}
    return {
        "groups": copy.deepcopy(groups),
        "params": [(param, param.detach().clone()) for param in params],
        "state": [
            (param, key, value, value.clone(), value.data_ptr()) for param, items in state.items()
            for key, value in items.items()
        ],
        "keys": {param: list(items) for param, items in state.items()},
    }  # fmt: skip


def assert_as_in(before, optimizer):
    now = snapshot(optimizer)
    assert now["groups"] == before["groups"]
    assert now["keys"] == before["keys"]
    for (param, values), (_, old_values) in zip(now["params"], before["params"], strict=True):
        assert torch.equal(values, old_values), "a param has moved"
        assert param.dtype == old_values.dtype
    for (_, key, value, _, address), (_, _, old, old_values, old_address) in zip(
        now["state"], before["state"], strict=True
    ):
        assert value is old, key
        assert torch.equal(value, old_values), key
        assert address == old_address, key


# --- To torch and back -----------------------------------------------------------------------------------------------

MODES = {
    "plain": {},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "foreach": {"foreach": True},
    "single_tensor": {"foreach": False},
    "maximize": {"maximize": True},
    "fused_amsgrad": {"fused": True, "amsgrad": True},
}


@pytest.mark.parametrize("through_file", [False, True], ids=["dict", "file"])
@pytest.mark.parametrize("loader", MODES.values(), ids=[f"into_{mode}" for mode in MODES])
@pytest.mark.parametrize("saver", MODES.values(), ids=[f"from_{mode}" for mode in MODES])
def test_torchs_state_dict_loads_here_and_the_next_steps_match(saver, loader, through_file):
    theirs, their_params = trained(torch.optim.AdamW, **saver)
    state_dict = saved_and_loaded(theirs.state_dict()) if through_file else theirs.state_dict()
    params = fresh_copy(their_params)
    ours = AdamW(groups_of(params), **loader)
    ours.load_state_dict(state_dict)
    take_steps(ours, params, 3, 3)
    take_steps(theirs, their_params, 3, 3)
    assert_close(params, their_params)
    for param, twin in zip(params, their_params, strict=True):
        assert ours.state[param]["step"].item() == 6
        assert ours.state[param].keys() == theirs.state[twin].keys()


@pytest.mark.parametrize("loader", MODES.values(), ids=[f"into_{mode}" for mode in MODES])
@pytest.mark.parametrize("saver", [*MODES.values(), {"capturable": True}], ids=[f"from_{m}" for m in [*MODES, "capt"]])
def test_our_state_dict_loads_in_torch_and_the_next_steps_match(saver, loader):
    ours, params = trained(**saver)
    their_params = fresh_copy(params)
    theirs = torch.optim.AdamW(groups_of(their_params), **loader)
    state_dict = saved_and_loaded(ours.state_dict())
    if saver.get("capturable"):  # torch has no capturable step on the CPU and takes the flag from the dict
        for group in state_dict["param_groups"]:
            group["capturable"] = False
    theirs.load_state_dict(state_dict)
    take_steps(ours, params, 3, 3)
    take_steps(theirs, their_params, 3, 3)
    assert_close(params, their_params)


def test_a_round_trip_through_torch_continues_as_if_never_stopped():
    ours, params = trained(steps=2)
    middle_params = fresh_copy(params)
    middle = torch.optim.AdamW(groups_of(middle_params))
    middle.load_state_dict(saved_and_loaded(ours.state_dict()))
    take_steps(middle, middle_params, 2, 2)
    last_params = fresh_copy(middle_params)
    last = AdamW(groups_of(last_params))
    last.load_state_dict(saved_and_loaded(middle.state_dict()))
    take_steps(last, last_params, 4, 2)
    take_steps(ours, params, 2, 4)
    assert_close(last_params, params)


def test_a_state_dict_of_adam_still_gives_decoupled_weight_decay():
    """As torch.optim.AdamW: the class decides about that, not the checkpoint."""
    adam, _ = trained(torch.optim.Adam)
    params = make_params()
    twins = make_params()
    ours, theirs = AdamW(groups_of(params)), torch.optim.AdamW(groups_of(twins))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved_and_loaded(adam.state_dict()))
    assert all(group["decoupled_weight_decay"] is True for group in ours.param_groups)
    take_steps(ours, params, 3, 2)
    take_steps(theirs, twins, 3, 2)
    assert_close(params, twins)


def test_the_dict_looks_as_torchs_does():
    (ours, _), (theirs, _) = trained(), trained(torch.optim.AdamW)
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert list(mine["state"]) == list(yours["state"])
    for index in yours["state"]:
        for key, value in yours["state"][index].items():
            found = mine["state"][index][key]
            assert (type(found), found.dtype, found.shape, found.device) == (
                Tensor,
                value.dtype,
                value.shape,
                value.device,
            )


# --- Step counts and flags of other versions -------------------------------------------------------------------------

STEP_FORMS = {
    "float": float,
    "int": int,
    "0-d": lambda step: torch.tensor(float(step)),
    "1-element": lambda step: torch.tensor([float(step)]),
    "float64": lambda step: torch.tensor(float(step), dtype=torch.float64),
    "int64": lambda step: torch.tensor(int(step)),
    "bfloat16": lambda step: torch.tensor(float(step), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "stepped_before"])
@pytest.mark.parametrize("form", STEP_FORMS.values(), ids=STEP_FORMS.keys())
def test_step_may_be_stored_in_any_form(form, warm):
    optimizer, params = trained()
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = form(state["step"])
    resumed_params = fresh_copy(params)
    resumed = AdamW(groups_of(resumed_params))
    if warm:
        take_steps(resumed, resumed_params, 0, 1)
        for param, values in zip(resumed_params, params, strict=True):
            param.data.copy_(values)
    resumed.load_state_dict(state_dict)
    for param in resumed_params:
        step = resumed.state[param]["step"]
        assert (step.shape, step.dtype, step.device.type, step.item()) == ((), torch.float32, "cpu", 3)
    take_steps(optimizer, params, 3, 2)
    take_steps(resumed, resumed_params, 3, 2)
    assert_same_bits(resumed_params, params)


def without_newer_keys(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        for key in NEWER_KEYS:
            group.pop(key, None)
    for state in state_dict["state"].values():
        state["step"] = int(state["step"])
    return state_dict


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_a_state_dict_of_an_old_torch_loads(flags):
    optimizer, params = trained()
    resumed_params = fresh_copy(params)
    resumed = AdamW(groups_of(resumed_params), **flags)
    resumed.load_state_dict(without_newer_keys(optimizer.state_dict()))
    for group in resumed.param_groups:
        assert all(key in group for key in NEWER_KEYS)
        assert all(group[flag] == flags.get(flag, resumed.defaults[flag]) for flag in FLAGS)
    take_steps(optimizer, params, 3, 2)
    take_steps(resumed, resumed_params, 3, 2)
    assert_same_bits(resumed_params, params)


def test_an_optimizer_pickled_by_an_old_torch_is_restored():
    optimizer, params = trained()
    pickled = copy.deepcopy(optimizer.__getstate__())
    for group in pickled["param_groups"]:
        for key in NEWER_KEYS:
            group.pop(key, None)
    for state in pickled["state"].values():
        state["step"] = int(state["step"])
    restored = AdamW.__new__(AdamW)
    restored.__setstate__(pickled)
    restored_params = [param for group in restored.param_groups for param in group["params"]]
    take_steps(optimizer, params, 3, 2)
    take_steps(restored, restored_params, 3, 2)
    assert_same_bits(restored_params, params)


# --- What the constructor decided stays ------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [{}, {"fused": True}, {"capturable": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("theirs", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_loading_keeps_the_constructors_implementation_flags(ours, theirs):
    source, _ = trained(torch.optim.AdamW, **theirs)
    params = make_params()
    optimizer = AdamW(groups_of(params), **ours)
    optimizer.load_state_dict(source.state_dict())
    for group in optimizer.param_groups:
        assert {flag: group[flag] for flag in FLAGS} == {flag: optimizer.defaults[flag] for flag in FLAGS}
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == bool(ours.get("fused"))


def test_loading_takes_hyperparameters_from_the_dict():
    source, _ = trained(torch.optim.AdamW, amsgrad=True, maximize=True, eps=0.25)
    optimizer = AdamW(groups_of(make_params()))
    optimizer.load_state_dict(source.state_dict())
    for loaded, original in zip(optimizer.param_groups, source.param_groups, strict=True):
        for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            assert loaded[key] == original[key], key


@pytest.mark.parametrize("loaded", [0.5, torch.tensor(0.5), torch.tensor([0.5])], ids=["float", "0-d", "1-element"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
def test_a_tensor_lr_keeps_its_identity_and_takes_the_value(loaded, shape):
    lr = torch.full(shape, 0.1)
    params = make_params()
    optimizer = AdamW(params, lr=lr)
    take_steps(optimizer, params, 0, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["lr"] = loaded
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5
    twins = fresh_copy(params)
    reference = AdamW(twins, lr=0.5)
    state_dict["param_groups"][0]["lr"] = 0.5
    reference.load_state_dict(state_dict)
    for each, owner in ((params, optimizer), (twins, reference)):
        take_steps(owner, each, 1, 2)
    assert_same_bits(params, twins)


def test_a_tensor_lr_in_the_dict_is_copied_into_a_float_lr_optimizer():
    source_lr = torch.tensor(0.5)
    params = make_params()
    source = AdamW(params, lr=source_lr)
    take_steps(source, params, 0, 1)
    resumed_params = fresh_copy(params)
    resumed = AdamW(resumed_params, lr=0.1)
    resumed.load_state_dict(source.state_dict())
    assert resumed.param_groups[0]["lr"] is not source_lr
    assert float(resumed.param_groups[0]["lr"]) == 0.5
    take_steps(source, params, 1, 1)
    take_steps(resumed, resumed_params, 1, 1)
    assert_same_bits(resumed_params, params)


@pytest.mark.parametrize("named", ["optimizer", "dict", "both", "neither"])
def test_param_names_are_kept_as_torch_keeps_them(named):
    def build(cls, prefix, with_names):
        params = make_params()
        return cls([(f"{prefix}{i}", p) for i, p in enumerate(params)] if with_names else params)

    found = []
    for cls in (AdamW, torch.optim.AdamW):
        optimizer = build(cls, "mine", named in ("optimizer", "both"))
        optimizer.load_state_dict(build(cls, "loaded", named in ("dict", "both")).state_dict())
        found.append(optimizer.param_groups[0].get("param_names"))
    assert found[0] == found[1]
    expected = {"optimizer": "mine0", "dict": "loaded0", "both": "loaded0"}.get(named)
    assert (found[0] or [None])[0] == expected


# --- Moments of another dtype, layout or place -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "stepped_before"])
def test_float32_moments_of_a_half_precision_model_stay_float32(dtype, warm):
    """torch casts them to the param's dtype (pytorch#75224)."""

    def with_float32_moments(params):
        optimizer = AdamW(params, lr=0.05, amsgrad=True)
        optimizer.init_state()
        for state in optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                state[key] = state[key].float()
        return optimizer

    params = make_params(dtype)
    optimizer = with_float32_moments(params)
    take_steps(optimizer, params, 0, 3)
    resumed_params = fresh_copy(params)
    resumed = AdamW(resumed_params, amsgrad=True)
    if warm:
        take_steps(resumed, resumed_params, 0, 1)
        for param, values in zip(resumed_params, params, strict=True):
            param.data.copy_(values)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for param in resumed_params:
        assert {resumed.state[param][key].dtype for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {
            torch.float32
        }
    take_steps(optimizer, params, 3, 3)
    take_steps(resumed, resumed_params, 3, 3)
    assert_same_bits(resumed_params, params)
    assert not torch.equal(params[1], make_params(dtype)[1])


def test_moments_in_a_dtype_that_no_kernel_takes_are_cast_to_the_params_as_torch_does():
    source, _ = trained(torch.optim.AdamW, dtype=torch.float64)
    params = make_params(torch.float32)
    optimizer = AdamW(groups_of(params))
    optimizer.load_state_dict(source.state_dict())
    assert all(optimizer.state[param]["exp_avg"].dtype == torch.float32 for param in params)
    take_steps(optimizer, params, 3, 1)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "stepped_before"])
def test_a_contiguous_checkpoint_loads_into_a_channels_last_model(warm):
    shape = (4, 3, 5, 5)
    contiguous = make_params(shapes=[shape])
    source = AdamW(contiguous, lr=0.1)
    take_steps(source, contiguous, 0, 2)
    params = [torch.nn.Parameter(contiguous[0].detach().to(memory_format=torch.channels_last))]
    optimizer = AdamW(params)
    if warm:
        take_steps(optimizer, params, 0, 1)
        params[0].data.copy_(contiguous[0])
    optimizer.load_state_dict(source.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[params[0]][key]
        assert moment.stride() == params[0].stride()
        assert torch.equal(moment, source.state[contiguous[0]][key])
    take_steps(optimizer, params, 2, 2)
    take_steps(source, contiguous, 2, 2)
    assert_same_bits(params, contiguous)
    assert params[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fused", [None, True])
def test_loading_keeps_the_addresses_of_state_that_exists(fused):
    """A captured graph and a cached table hold pointers: they must stay valid after a resume."""
    source, _ = trained(amsgrad=True)
    optimizer, params = trained(steps=1, amsgrad=True, fused=fused)
    before = [(p, key, value, value.data_ptr()) for p in params for key, value in optimizer.state[p].items()]
    optimizer.load_state_dict(saved_and_loaded(source.state_dict()))
    for param, key, value, address in before:
        assert optimizer.state[param][key] is value
        assert value.data_ptr() == address
    for index, param in enumerate(params):
        assert_same_bits(optimizer.state[param].values(), source.state_dict()["state"][index].values())


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "stepped_before"])
@pytest.mark.parametrize("cls", [AdamW, torch.optim.AdamW], ids=["ours", "torchs"])
def test_loading_shares_nothing_with_the_loaded_dict(cls, warm):
    source, _ = trained(cls, amsgrad=True)
    state_dict = copy.deepcopy(source.state_dict())
    kept = copy.deepcopy(state_dict)
    optimizer, params = trained(steps=1 if warm else 0, amsgrad=True)
    optimizer.load_state_dict(state_dict)
    take_steps(optimizer, params, 3, 2)
    for index, state in state_dict["state"].items():
        assert_same_bits(state.values(), kept["state"][index].values())
    assert state_dict["param_groups"] == kept["param_groups"]
    before = snapshot(optimizer)
    for state in state_dict["state"].values():
        for value in state.values():
            value.fill_(99.0)
    for group in state_dict["param_groups"]:
        group["lr"] = 99.0
    assert_as_in(before, optimizer)


def test_an_optimizer_can_load_its_own_live_state_dict():
    optimizer, params = trained()
    twin, twin_params = trained()
    optimizer.load_state_dict(optimizer.state_dict())
    take_steps(optimizer, params, 3, 2)
    take_steps(twin, twin_params, 3, 2)
    assert_same_bits(params, twin_params)


def test_a_live_state_dict_with_two_params_exchanged_loads():
    """The loaded tensors are the ones to be overwritten: all must be read before any is written."""
    params = make_params(shapes=[(6,), (6,)])
    optimizer = AdamW(params, lr=0.1)
    take_steps(optimizer, params, 0, 2)
    params[0].grad = None
    optimizer.step()
    live = optimizer.state_dict()
    expected = copy.deepcopy(live["state"])
    live["state"] = {0: live["state"][1], 1: live["state"][0]}
    optimizer.load_state_dict(live)
    assert_same_bits(optimizer.state[params[0]].values(), expected[1].values())
    assert_same_bits(optimizer.state[params[1]].values(), expected[0].values())


def test_loading_before_and_after_the_first_step_gives_the_same_bits():
    source, source_params = trained()
    results = []
    for warm in (0, 2):
        optimizer, params = trained(steps=warm)
        for param, values in zip(params, source_params, strict=True):
            param.data.copy_(values)
        optimizer.load_state_dict(source.state_dict())
        take_steps(optimizer, params, 3, 3)
        results.append(params)
    take_steps(source, source_params, 3, 3)
    assert_same_bits(results[0], source_params)
    assert_same_bits(results[1], source_params)


# --- Resume is bitwise -----------------------------------------------------------------------------------------------

RESUME = """
import sys, torch
from tests.test_state_dict import groups_of, make_params, take_steps
from adamw_ext import AdamW
for name, arguments in torch.load(sys.argv[1] + "/cases.pt", weights_only=True).items():
    saved = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    params = make_params(saved["params"][0].dtype)
    for param, values in zip(params, saved["params"]):
        param.data.copy_(values)
    optimizer = AdamW(groups_of(params), **arguments)
    optimizer.load_state_dict(saved["optimizer"])
    take_steps(optimizer, params, saved["step"], 4)
    torch.save({"params": [p.data for p in params], "state": optimizer.state_dict()["state"]},
               f"{sys.argv[1]}/{name}.resumed.pt")
"""


def test_a_run_resumed_in_a_new_process_has_the_bits_of_one_that_never_stopped(tmp_path):
    cases = {
        "float32": (torch.float32, {}),
        "amsgrad": (torch.float32, {"amsgrad": True}),
        "fused": (torch.float64, {"fused": True, "maximize": True}),
        "bfloat16": (torch.bfloat16, {"capturable": True}),
    }
    torch.save({name: arguments for name, (_, arguments) in cases.items()}, tmp_path / "cases.pt")
    runs = {}
    for name, (dtype, arguments) in cases.items():
        optimizer, params = runs[name] = trained(steps=5, dtype=dtype, **arguments)
        saved = {"params": [param.data for param in params], "optimizer": optimizer.state_dict(), "step": 5}
        torch.save(saved, tmp_path / f"{name}.pt")
    command = [sys.executable, "-c", RESUME, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    for name, (optimizer, params) in runs.items():
        take_steps(optimizer, params, 5, 4)
        resumed = torch.load(tmp_path / f"{name}.resumed.pt", weights_only=True)
        assert_same_bits([param.data for param in params], resumed["params"])
        for index, state in optimizer.state_dict()["state"].items():
            assert_same_bits(state.values(), resumed["state"][index].values())
            assert state["step"].item() == 9


# --- Part of the state -----------------------------------------------------------------------------------------------


def test_state_of_some_params_loads_and_the_others_start_at_step_one():
    source, source_params = trained()
    state_dict = source.state_dict()
    del state_dict["state"][0], state_dict["state"][3]
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        params = fresh_copy(source_params)
        optimizer = cls(groups_of(params))
        optimizer.load_state_dict(state_dict)
        assert set(optimizer.state) == {params[1], params[2]}
        take_steps(optimizer, params, 3, 2)
        results.append(params)
        assert [optimizer.state[param]["step"].item() for param in params] == [2, 5, 5, 2]
    assert_close(*results)


def test_loading_an_empty_state_forgets_the_state_that_was_there():
    optimizer, params = trained()
    reset = fresh_copy(params)
    reference = AdamW(groups_of(reset), lr=0.05)
    empty = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    optimizer.load_state_dict(empty)
    assert not optimizer.state
    take_steps(optimizer, params, 3, 2)
    take_steps(reference, reset, 3, 2)
    assert_same_bits(params, reset)


def test_state_of_an_index_that_is_no_param_is_kept_as_torch_keeps_it():
    source, _ = trained()
    kept = []
    for cls in (AdamW, torch.optim.AdamW):
        optimizer = cls(groups_of(make_params()))
        state_dict = copy.deepcopy(source.state_dict())
        state_dict["state"]["global"] = {"seen": torch.tensor(7.0), "note": "x"}
        optimizer.load_state_dict(state_dict)
        kept.append(optimizer.state["global"])
    assert kept[0] == kept[1] == {"seen": torch.tensor(7.0), "note": "x"}


def test_extra_state_keys_survive_a_load():
    source, source_params = trained()
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["state"][0].update(ema=torch.full((5,), 2.0, dtype=torch.float64), seen=7, nested={"a": [1, 2]})
    params = fresh_copy(source_params)
    optimizer = AdamW(groups_of(params))
    optimizer.load_state_dict(state_dict)
    state = optimizer.state[params[0]]
    assert torch.equal(state["ema"], torch.full((5,), 2.0, dtype=torch.float64))
    assert (state["seen"], state["nested"]) == (7, {"a": [1, 2]})
    assert state["ema"] is not state_dict["state"][0]["ema"]
    take_steps(optimizer, params, 3, 1)
    take_steps(source, source_params, 3, 1)
    assert_same_bits(params, source_params)
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "ema", "seen", "nested"}


def load_and_step(optimizer, params, state_dict):
    optimizer.load_state_dict(state_dict)
    take_steps(optimizer, params, 3, 1)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_a_missing_state_key_is_refused_by_name_at_the_latest_by_the_step(key):
    source, _ = trained()
    state_dict = copy.deepcopy(source.state_dict())
    del state_dict["state"][1][key]
    params = make_params()
    optimizer = AdamW(groups_of(params))
    with pytest.raises((ValueError, KeyError, RuntimeError), match=f"index 1.*'{key}'|'{key}'.*index 1"):
        load_and_step(optimizer, params, state_dict)
    assert_same_bits([param.data for param in params], [param.data for param in make_params()])


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_a_missing_hyperparameter_is_refused_by_name_at_the_latest_by_the_step(key):
    source, _ = trained()
    state_dict = copy.deepcopy(source.state_dict())
    del state_dict["param_groups"][1][key]
    params = make_params()
    optimizer = AdamW(groups_of(params))
    with pytest.raises((ValueError, KeyError), match=f"group 1.*'{key}'"):
        load_and_step(optimizer, params, state_dict)
    assert_same_bits([param.data for param in params], [param.data for param in make_params()])


def test_amsgrad_state_that_is_missing_is_refused_by_the_step():
    source, _ = trained()
    state_dict = copy.deepcopy(source.state_dict())
    for group in state_dict["param_groups"]:
        group["amsgrad"] = True
    params = make_params()
    optimizer = AdamW(groups_of(params))
    with pytest.raises((ValueError, KeyError, RuntimeError), match="max_exp_avg_sq"):
        load_and_step(optimizer, params, state_dict)
    assert_same_bits([param.data for param in params], [param.data for param in make_params()])


# --- Refusals --------------------------------------------------------------------------------------------------------


def set_item(index, key, value):
    def change(state_dict):
        state_dict["state"][index][key] = value(state_dict["state"][index][key]) if callable(value) else value

    return change


def drop_group(state_dict):
    state_dict["param_groups"].pop()


def add_group(state_dict):
    state_dict["param_groups"].append(copy.deepcopy(state_dict["param_groups"][0]))


def drop_param(state_dict):
    state_dict["param_groups"][1]["params"].pop()


def add_param(state_dict):
    state_dict["param_groups"][1]["params"].append(4)


BAD_DICTS = {
    "one_group_less": (drop_group, "number of parameter groups"),
    "one_group_more": (add_group, "number of parameter groups"),
    "one_param_less": (drop_param, "doesn't match the size of optimizer's group"),
    "one_param_more": (add_param, "doesn't match the size of optimizer's group"),
    "exp_avg_of_another_shape": (set_item(1, "exp_avg", lambda t: t[:, :2]), r"'exp_avg'.*index 1.*\(3, 4\).*\(3, 2\)"),
    "exp_avg_transposed": (set_item(1, "exp_avg", lambda t: t.t()), r"'exp_avg'.*index 1.*\(3, 4\).*\(4, 3\)"),
    "exp_avg_sq_of_another_shape": (set_item(3, "exp_avg_sq", lambda t: t[1:]), "'exp_avg_sq'.*group 1, index 1"),
    "max_exp_avg_sq_of_another_shape": (set_item(3, "max_exp_avg_sq", lambda t: t[1:]), "'max_exp_avg_sq'.*index 1"),
    "exp_avg_none": (set_item(1, "exp_avg", None), "'exp_avg'.*index 1"),
    "exp_avg_float": (set_item(2, "exp_avg", 1.0), "'exp_avg'.*group 1, index 0"),
    "step_missing": (lambda state_dict: state_dict["state"][1].pop("step"), "'step'.*index 1"),
    "step_string": (set_item(1, "step", "three"), "'step'.*index 1"),
    "step_none": (set_item(1, "step", None), "'step'.*index 1"),
    "step_list": (set_item(1, "step", [3]), "'step'.*index 1"),
    "step_of_two": (set_item(1, "step", torch.ones(2)), "'step'.*index 1"),
    "step_empty": (set_item(1, "step", torch.ones(0)), "'step'.*index 1"),
    "step_complex": (set_item(1, "step", torch.tensor(1 + 2j)), "'step'.*index 1"),
    "step_meta": (set_item(1, "step", torch.ones((), device="meta")), "'step'.*index 1"),
    "step_nan": (set_item(1, "step", torch.tensor(float("nan"))), "'step'.*index 1"),
    "step_nan_float": (set_item(1, "step", float("nan")), "'step'.*index 1"),
    "step_infinite": (set_item(1, "step", torch.tensor(float("inf"))), "'step'.*index 1"),
    "step_negative": (set_item(1, "step", -1), "'step'.*index 1"),
    "step_fractional": (set_item(1, "step", 2.5), "'step'.*index 1"),
    "exp_avg_meta": (set_item(1, "exp_avg", lambda t: t.to("meta")), "'exp_avg'.*index 1"),
    "exp_avg_sparse": (set_item(1, "exp_avg", lambda t: t.to_sparse()), "'exp_avg'.*index 1"),
    "exp_avg_complex": (set_item(1, "exp_avg", lambda t: t.to(torch.complex128)), "'exp_avg'.*index 1"),
    "state_is_a_list": (lambda state_dict: state_dict["state"].update({1: [1, 2]}), "index 1"),
    "state_is_a_tensor": (lambda state_dict: state_dict["state"].update({1: torch.ones(3)}), "index 1"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("change", "message"), BAD_DICTS.values(), ids=BAD_DICTS.keys())
def test_a_dict_that_does_not_fit_is_refused_with_valueerror_and_changes_nothing(change, message):
    source, _ = trained(amsgrad=True, steps=5)
    bad = copy.deepcopy(source.state_dict())
    bad["state"][0]["exp_avg"] += 1.0  # loaded before the item at fault, were it loaded
    change(bad)
    optimizer, params = trained(amsgrad=True)
    twin, twin_params = trained(amsgrad=True)
    before = snapshot(optimizer)
    try:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    finally:
        assert_as_in(before, optimizer)
    take_steps(optimizer, params, 3, 2)
    take_steps(twin, twin_params, 3, 2)
    assert_same_bits(params, twin_params)


def test_a_refused_load_leaves_a_tensor_lr_alone():
    params = make_params()
    lr = torch.tensor(0.1)
    optimizer = AdamW(params, lr=lr)
    take_steps(optimizer, params, 0, 1)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["lr"] = 0.5
    bad["state"][3]["step"] = torch.tensor(1 + 2j)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        optimizer.load_state_dict(bad)
    assert lr.item() == pytest.approx(0.1)


def test_named_params_are_named_in_refusals():
    params = make_params()
    optimizer = AdamW([(f"layer.{i}", param) for i, param in enumerate(params)])
    take_steps(optimizer, params, 0, 1)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][2]["exp_avg"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"'layer\.2'"):
        optimizer.load_state_dict(bad)


# --- Hooks -----------------------------------------------------------------------------------------------------------


def test_load_hooks_run_in_order_and_may_change_or_replace_the_dict():
    source, _ = trained()
    order = []
    optimizer, params = trained(steps=1)

    def in_place(hooked, state_dict):
        order.append("in place")
        assert hooked is optimizer
        assert all(isinstance(value, Tensor) for value in state_dict["state"][0].values())
        state_dict["state"] = {**state_dict["state"], 0: {**state_dict["state"][0], "step": torch.tensor(40.0)}}

    def replace(hooked, state_dict):
        order.append("replace")
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][1]["exp_avg"].fill_(5.0)
        state_dict["param_groups"][0]["lr"] = 0.75
        return state_dict

    def after(hooked):
        order.append("after")
        assert hooked.param_groups[0]["lr"] == 0.75
        assert all(isinstance(value, Tensor) for value in hooked.state[params[2]].values())
        hooked.state[params[2]]["step"].fill_(50.0)

    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(source.state_dict())
    assert order == ["in place", "replace", "after"]
    assert [optimizer.state[param]["step"].item() for param in params] == [40, 3, 50, 3]
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], torch.full((3, 4), 5.0, dtype=torch.float64))
    assert [state["step"].item() for state in source.state_dict()["state"].values()] == [3, 3, 3, 3]
    take_steps(optimizer, params, 3, 1)
    assert [optimizer.state[param]["step"].item() for param in params] == [41, 4, 51, 4]


def test_a_hook_may_rename_keys_of_another_format():
    source, source_params = trained()
    foreign = copy.deepcopy(source.state_dict())
    for state in foreign["state"].values():
        state["m"], state["v"] = state.pop("exp_avg"), state.pop("exp_avg_sq")
    params = fresh_copy(source_params)
    optimizer = AdamW(groups_of(params))

    @optimizer.register_load_state_dict_pre_hook
    def rename(hooked, state_dict):
        for state in state_dict["state"].values():
            state["exp_avg"], state["exp_avg_sq"] = state.pop("m"), state.pop("v")

    optimizer.load_state_dict(foreign)
    take_steps(optimizer, params, 3, 2)
    take_steps(source, source_params, 3, 2)
    assert_same_bits(params, source_params)


def test_state_dict_hooks_run_as_in_torch():
    optimizer, _ = trained()
    order = []
    optimizer.register_state_dict_pre_hook(lambda hooked: order.append("pre"))
    optimizer.register_state_dict_post_hook(lambda hooked, state_dict: {**state_dict, "extra": 1})
    state_dict = optimizer.state_dict()
    assert (order, state_dict["extra"]) == (["pre"], 1)
    other, _ = trained(steps=0)
    other.load_state_dict(state_dict)
    assert other.state_dict()["state"][0]["step"].item() == 3


def test_no_hook_of_ours_is_left_behind():
    optimizer, _ = trained()
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError):
            optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert optimizer._optimizer_load_state_dict_pre_hooks == OrderedDict()


# --- torch.distributed.checkpoint in one process ---------------------------------------------------------------------


def distributed_state_dict():
    from torch.distributed.checkpoint import state_dict  # takes a second to import

    return state_dict


class Net(torch.nn.Module):
    def __init__(self, with_unused=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 3).double()
        self.second = torch.nn.Linear(3, 2).double()
        if with_unused:
            self.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return self.second(self.first(x).relu())


def train_net(net, optimizer, first, count):
    for step in range(first, first + count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(6, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("arguments", [{}, {"fused": True}, {"amsgrad": True}, {"lr": torch.tensor(0.1)}], ids=str)
def test_distributed_checkpoint_helpers_save_and_restore(arguments):
    """_init_optim_state of torch.distributed.checkpoint steps once with zero gradients and lr 0: nothing may move.

    It asks for the state of every param, of those that are never used too: init_state() provides it.
    """

    def build():
        net = Net()
        return net, AdamW(net.parameters(), **{"lr": 0.1, **copy.deepcopy(arguments)})

    net, optimizer = build()
    optimizer.init_state()
    train_net(net, optimizer, 0, 3)
    saved = copy.deepcopy(distributed_state_dict().get_optimizer_state_dict(net, optimizer))
    assert set(saved["state"]) == {name for name, _ in net.named_parameters()}

    resumed_net, resumed = build()
    resumed_net.load_state_dict(net.state_dict())
    before = copy.deepcopy(list(resumed_net.parameters()))
    distributed_state_dict().get_optimizer_state_dict(
        resumed_net, resumed
    )  # initialises the state of an optimizer that never stepped
    assert_same_bits(list(resumed_net.parameters()), before)
    assert all(not resumed.state[param]["exp_avg"].any() for param in resumed_net.parameters())
    assert float(resumed.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
    distributed_state_dict().set_optimizer_state_dict(resumed_net, resumed, saved)
    train_net(net, optimizer, 3, 3)
    train_net(resumed_net, resumed, 3, 3)
    assert_same_bits(list(resumed_net.parameters()), list(net.parameters()))
    assert resumed.state[resumed_net.first.weight]["step"].item() == 6
    assert resumed.state[resumed_net.unused]["step"].item() == 0


def test_distributed_checkpoint_restores_torchs_state_into_ours():
    theirs_net, ours_net = Net(with_unused=False), Net(with_unused=False)
    theirs = torch.optim.AdamW(theirs_net.parameters(), lr=0.1)
    train_net(theirs_net, theirs, 0, 3)
    ours_net.load_state_dict(theirs_net.state_dict())
    ours = AdamW(ours_net.parameters(), lr=0.1)
    distributed_state_dict().set_optimizer_state_dict(
        ours_net, ours, copy.deepcopy(distributed_state_dict().get_optimizer_state_dict(theirs_net, theirs))
    )
    train_net(theirs_net, theirs, 3, 3)
    train_net(ours_net, ours, 3, 3)
    assert_close(list(ours_net.parameters()), list(theirs_net.parameters()))
