"""What torch itself dies of reading is refused in words, wherever it is handed over: tensors whose memory was freed,
the data of nested tensors in plain ones, tensors that have leaked out of vmap. Found by tests/fuzzing."""

import decimal
import fractions

import pytest
import torch

import adamw_ext.jit
from adamw_ext import _C, AdamW, checkpoint, functional
from adamw_ext.messages import show
from tests.children import in_child
from tests.helpers import assert_same_bits

REFUSALS = (RuntimeError, ValueError, TypeError)
ScriptAdamW = torch.classes.adamw_ext.AdamW


def freed(shape=()):
    tensor = torch.full(shape, 0.5)
    tensor.untyped_storage().resize_(0)
    return tensor


def data_of_nested(shape):
    return torch.nested.nested_tensor([torch.ones(shape)], layout=torch.jagged)


def leaked(tensor):
    return torch._C._functorch._add_batch_dim(tensor.unsqueeze(0), 0, 1)


def values(params, optimizer):
    state = [value.clone() for param in params for value in (optimizer.state.get(param) or {}).values()]
    return [*(param.detach().clone() for param in params), *state]


def refused_in_child(call, words):
    """A refusal that changes no param with memory, in a process that may die of it."""

    def attempt():
        with pytest.raises(REFUSALS, match=words):
            call()

    in_child(attempt)


def trained(**arguments):
    params = [torch.nn.Parameter(torch.full((3, 4), 0.5)), torch.nn.Parameter(torch.full((5,), -0.25))]
    optimizer = AdamW(params, lr=0.1, **arguments)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return params, optimizer


# --- Freed memory, where a message shows the value -------------------------------------------------------------------

GROUP = {
    "lr": lambda: [freed()],
    "betas": lambda: [freed()],
    "eps": lambda: (freed(),),
    "amsgrad": freed,
    "capturable": freed,
    "master_weights": lambda: {freed(): freed()},
    "max_grad_norm": lambda: [freed()],
}


@pytest.mark.parametrize("key", GROUP)
def test_a_group_with_a_freed_tensor_in_a_wrong_place_is_refused(key):
    _, optimizer = trained()

    def step():
        optimizer.param_groups[0][key] = GROUP[key]()
        optimizer.step()

    refused_in_child(step, key)


OPTIONS = {
    "lr": freed,
    "betas": lambda: (0.9, freed()),
    "eps": freed,
    "weight_decay": freed,
    "master_weights": lambda: [freed()],
    "moment_dtype": freed,
    "stochastic_rounding": freed,
    "seed": lambda: freed((2,)),
    "max_grad_norm": freed,
}


@pytest.mark.parametrize("key", OPTIONS)
def test_the_constructor_refuses_a_freed_tensor(key):
    refused_in_child(lambda: AdamW([torch.nn.Parameter(torch.ones(2))], **{key: OPTIONS[key]()}), key)


@pytest.mark.parametrize("key", ["master_weights", "moment_dtype", "stochastic_rounding", "seed", "max_grad_norm"])
def test_add_param_group_refuses_a_freed_tensor(key):
    _, optimizer = trained()
    group = {"params": [torch.nn.Parameter(torch.ones(2))]}
    refused_in_child(lambda: optimizer.add_param_group({**group, key: OPTIONS[key]()}), key)
    assert len(optimizer.param_groups) == 1


STATES = {
    "of_a_param": (lambda: [freed()], "state of .* must be a dict, but is .<torch.Tensor>"),
    "of_a_key": (lambda: {"step": torch.ones(()), "exp_avg": [freed()]}, "must be a tensor, but is .<torch.Tensor>"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_with_a_freed_tensor_in_a_container_is_refused(name):
    params, optimizer = trained()
    made, words = STATES[name]

    def step():
        optimizer.state[params[0]] = made()
        optimizer.step()

    refused_in_child(step, words)


DICTS = {
    "list": lambda: [freed()],
    "state": lambda: {"state": freed(), "param_groups": []},
    "key": lambda: {freed(): 0},
    "groups": lambda: {"state": {}, "param_groups": freed((2,))},
    "group": lambda: {"state": {}, "param_groups": [freed((2,))]},
    "params": lambda: {"state": {}, "param_groups": [{"params": freed((2,))}]},
}


@pytest.mark.parametrize("name", DICTS)
def test_a_state_dict_with_a_freed_tensor_in_a_wrong_place_is_refused(name):
    _, optimizer = trained()
    words = "must be a (list|dict)"
    refused_in_child(lambda: optimizer.load_state_dict(DICTS[name]()), words)
    refused_in_child(lambda: checkpoint.import_float32(optimizer, DICTS[name]()), "must be")
    if isinstance(DICTS[name](), dict):
        refused_in_child(lambda: optimizer.__setstate__(DICTS[name]()), words)


def test_the_functional_form_refuses_a_freed_tensor_in_a_wrong_place():
    hyper = dict(amsgrad=False, beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.0, eps=1e-8, maximize=False)
    lists = [[torch.ones(3)] for _ in range(6)]
    for place in range(6):
        given = [[freed(), [freed()]] if i == place else each for i, each in enumerate(lists)]
        refused_in_child(lambda given=given: functional.adamw(*given, **hyper, differentiable=True), "must|fit")
    refused_in_child(lambda: functional.adamw([[freed()]], *lists[1:], **hyper), r"params\[0\] must be a tensor")
    refused_in_child(lambda: functional.adamw({0: freed()}, *lists[1:], **hyper), "params must be a list")
    for flag in ("amsgrad", "maximize"):
        spoilt = {**hyper, flag: freed()}
        words = f"{flag} must be True or False"
        refused_in_child(lambda spoilt=spoilt: functional.adamw(*lists, **spoilt), words)
        spoilt = {flag: freed()}
        refused_in_child(lambda spoilt=spoilt: adamw_ext.jit.FunctionalAdamW(lists[0], **spoilt), words)


SHOWN = {
    "[0.5, (1, None)]": [0.5, (1, None)],
    "{'a': <torch.Tensor>}": {"a": torch.ones(3)},
    "{<torch.Tensor>}": {torch.ones(3)},
    "<torch.nn.modules.linear.Linear>": torch.nn.Linear(1, 1),
    "<object>": object(),
    "torch.float32": torch.float32,
    "Decimal('0.1')": decimal.Decimal("0.1"),
    "Fraction(1, 3)": fractions.Fraction(1, 3),
    "'\\ud800'": "\ud800",
    "[0, 1, 2, 3, 4, 5, ...]": list(range(10)),
    "<int>": 10**5000,
    "[[[[[...]]]]]": [[[[[[1]]]]]],
}


@pytest.mark.parametrize("text", SHOWN)
def test_messages_show_plain_values_and_of_others_the_type(text):
    assert show(SHOWN[text]) == text


def test_a_long_text_is_cut_short():
    assert len(show("x" * 10_000)) < 200


def test_a_cyclic_list_is_shown():
    cyclic = []
    cyclic.append(cyclic)
    assert "..." in show(cyclic)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "master_param"])
def test_an_import_refuses_freed_state(key):
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(params, master_weights="fp32")
    optimizer.init_state()
    exported = checkpoint.export_float32(optimizer)
    exported["state"][1][key] = freed((3,))
    refused_in_child(lambda: checkpoint.import_float32(optimizer, exported), f"'{key}' of .* freed")


NOT_TAKEN = {
    "members": lambda tensor: _C.Stepper([], {}, tensor, None, None, None, None, None),
    "mirror": lambda tensor: _C.Stepper([], {}, [], tensor, None, None, None, None),
    "param_groups": lambda tensor: _C.HyperMirror().sync(tensor),
    "device": lambda tensor: _C.DeviceNumbers("int64").on(tensor),
    "dtype": lambda tensor: _C.DeviceNumbers(tensor),
    "others": lambda tensor: _C.same_memory([], tensor),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_the_extension_refuses_a_freed_tensor_in_a_wrong_place(name):
    refused_in_child(lambda: NOT_TAKEN[name](freed((1000,))), f"{name} cannot be a tensor with shape")


# --- The data of a nested tensor, in a plain one ---------------------------------------------------------------------


def test_a_param_that_was_given_the_data_of_a_nested_tensor_is_refused():
    params, optimizer = trained()
    before = values(params[1:], optimizer)

    def step():
        params[0].data = data_of_nested((3, 4))
        with pytest.raises(RuntimeError, match="nested"):
            optimizer.step()
        assert_same_bits(values(params[1:], optimizer), before, "the other param")
        optimizer.state.pop(params[0])
        optimizer.step()

    refused_in_child(step, "nested")
    refused_in_child(lambda: (setattr(params[0], "data", data_of_nested((3, 4))), optimizer.state.clear(),
                              optimizer.init_state()), "nested")  # fmt: skip


@pytest.mark.parametrize("master_weights", [None, "split", "fp32"])
def test_init_state_and_scripts_refuse_the_data_of_a_nested_tensor(master_weights):
    param = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    param.data = data_of_nested((3, 4)).to(torch.bfloat16)
    param.grad = None
    refused_in_child(AdamW([param], master_weights=master_weights).init_state, "nested|no kernel")
    refused_in_child(lambda: ScriptAdamW([param], master_weights=master_weights), "nested")
    made = adamw_ext.jit.FunctionalAdamW([param])
    refused_in_child(lambda: made.step([torch.ones(3, 4)]), "nested")


def test_a_gradient_that_was_given_the_data_of_a_nested_tensor_is_refused():
    params, optimizer = trained()

    def step():
        params[0].grad.data = data_of_nested((3, 4))
        optimizer.step()

    refused_in_child(step, "gradient of .* but has nested sizes")


# --- What has leaked out of vmap -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_scalers_number_that_has_leaked_out_of_vmap_is_refused(name, capturable):
    _, optimizer = trained(capturable=capturable)

    def step():
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        setattr(optimizer, name, leaked(torch.ones(())))
        optimizer.step()

    refused_in_child(step, "")


@pytest.mark.parametrize("capturable", [False, True])
def test_a_lazily_negated_scale_divides_by_its_value(capturable):
    (params, optimizer), (twins, twin) = trained(capturable=capturable), trained(capturable=capturable)
    for run, scale in ((optimizer, torch._neg_view(torch.tensor(-2.0))), (twin, torch.tensor(2.0))):
        run.grad_scale, run.found_inf = scale, torch.tensor(0.0)
        run.step()
    assert_same_bits(values(params, optimizer), values(twins, twin), "a scale of 2")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "grad"])
def test_what_has_leaked_out_of_vmap_is_refused_before_torch_moves_a_param(key):
    params = [torch.full((3, 4), 0.5), torch.full((5,), -0.25)]
    state = {name: [torch.rand(p.shape) for p in params] for name in ("grad", "exp_avg", "exp_avg_sq")}
    state[key][1] = leaked(state[key][1])
    before = [param.clone() for param in params]
    steps = [torch.ones(()) for _ in params]
    hyper = dict(amsgrad=False, beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.1, eps=1e-8, maximize=False)
    with pytest.raises(ValueError, match=rf"{key}s\[1\] must be a tensor with memory"):
        functional.adamw(
            params, state["grad"], state["exp_avg"], state["exp_avg_sq"], [], steps, **hyper, differentiable=True
        )
    assert_same_bits(params, before, "a refused call")
    assert all(step.item() == 1.0 for step in steps)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "grad"])
def test_a_differentiable_group_with_what_has_leaked_out_of_vmap_is_refused_as_a_whole(key):
    params, optimizer = trained()
    optimizer.param_groups[0].update(differentiable=True, foreach=False)
    before = values(params, optimizer)
    if key == "grad":
        params[1].grad = leaked(torch.ones(5))
    else:
        optimizer.state[params[1]][key] = leaked(torch.ones(5))
    with pytest.raises(RuntimeError, match=r"functorch|must be a tensor as the param"):
        optimizer.step()
    assert_same_bits([param.detach() for param in params], before[:2], "a refused step")


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch, about vmap
@pytest.mark.parametrize("batched_grad", [False, True])
def test_the_functional_form_within_vmap_updates_each_of_the_batch(batched_grad):
    params, grad, hyper = (
        torch.rand(4, 3),
        torch.rand(3),
        dict(beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.1, eps=1e-8),
    )
    hyper.update(amsgrad=False, maximize=False)

    def update(param, grad):
        moments = [torch.zeros_like(param) for _ in range(2)]
        functional.adamw(
            [param], [grad], [moments[0]], [moments[1]], [], [torch.ones(())], **hyper, differentiable=True
        )
        return param

    made = torch.vmap(update, in_dims=(0, 0 if batched_grad else None))(
        params.clone(), torch.stack([grad] * 4) if batched_grad else grad
    )
    expected = torch.stack([update(param.clone(), grad) for param in params])
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=0)


# --- State that is no state ------------------------------------------------------------------------------------------


def test_a_refused_step_keeps_a_state_that_is_none():
    params, optimizer = trained()
    optimizer.state[params[0]] = None
    optimizer.state[params[1]]["exp_avg"] = torch.ones(2)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert optimizer.state[params[0]] is None
    del optimizer.state[params[0]]
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert params[0] not in optimizer.state


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "master_param", "note"])
def test_a_load_of_what_has_leaked_out_of_vmap_changes_nothing(key):
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(params, master_weights="fp32")
    optimizer.init_state()
    loaded = checkpoint.export_float32(optimizer)
    for items in loaded["state"].values():
        items.update({name: value + 1 for name, value in items.items()})
    loaded["state"][1][key] = leaked(torch.ones(3))
    before = values(params, optimizer)
    for load in (optimizer.load_state_dict, lambda dict: checkpoint.import_float32(optimizer, dict)):
        with pytest.raises(ValueError, match=key):
            load(loaded)
        assert_same_bits(values(params, optimizer), before, "a refused load")


def test_the_functional_form_refuses_capturable_where_torch_cannot_capture():
    tensors = [[torch.ones(3)] for _ in range(5)]
    hyper = dict(amsgrad=False, beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.0, eps=1e-8, maximize=False)
    with pytest.raises(RuntimeError, match="capturable=True is for params on cuda"):
        functional.adamw(*tensors, [torch.ones(())], **hyper, differentiable=True, capturable=True)


def test_export_refuses_a_step_that_is_no_float():
    params, optimizer = trained()
    optimizer.state[params[0]]["step"] = 10**400
    with pytest.raises(ValueError, match=r"'step' of a param of shape \(3, 4\) must be a number"):
        checkpoint.export_float32(optimizer)


def test_a_refused_step_restores_a_state_that_two_params_share():
    """Each of the params brings another moment into form before the step is refused."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (2, 5))]
    optimizer = AdamW(params)
    moments = {"exp_avg": torch.ones(4, 3).t(), "exp_avg_sq": torch.ones(5, 2).t()}
    shared = {"step": torch.ones(()), **moments}
    for param in params:
        param.grad = torch.ones_like(param)
        optimizer.state[param] = shared
    with pytest.raises(RuntimeError, match="must have sizes"):
        optimizer.step()
    assert all(shared[key] is moment for key, moment in moments.items())


# --- Tensor subclasses whose code raises -----------------------------------------------------------------------------


class Raising(torch.Tensor):
    """Has no memory, and no operation."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise ArithmeticError("of the class")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "master_param", "note"])
def test_a_load_in_which_code_of_a_tensor_subclass_raises_changes_nothing(key):
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(params, lr=torch.tensor(0.1), master_weights="fp32")
    optimizer.init_state()
    loaded = checkpoint.export_float32(optimizer)
    for items in loaded["state"].values():
        items.update({name: value + 1 for name, value in items.items()})
    loaded["param_groups"][0]["lr"] = 0.5
    loaded["state"][1][key] = Raising(torch.ones(3))
    before = values(params, optimizer)
    for load in (optimizer.load_state_dict, lambda dict: checkpoint.import_float32(optimizer, dict)):
        with pytest.raises(ArithmeticError, match="of the class"):
            load(loaded)
        assert_same_bits(values(params, optimizer), before, "a refused load")
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1)


def test_an_import_whose_master_raises_leaves_no_state_where_masters_are_not_kept():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    items = {"step": torch.ones(()), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    optimizer = AdamW(params)
    loaded = optimizer.state_dict()
    loaded["state"] = {0: {**items, "master_param": Raising(torch.ones(3))}}
    with pytest.raises(ArithmeticError, match="of the class"):
        checkpoint.import_float32(optimizer, loaded)
    assert not optimizer.state
    assert torch.equal(params[0], torch.ones(3, dtype=torch.bfloat16))


def test_lazily_negated_masters_are_loaded():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    items = {"step": torch.ones(()), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    for master_weights in (None, "fp32", "split"):
        optimizer = AdamW(params, master_weights=master_weights)
        loaded = optimizer.state_dict()
        loaded["state"] = {0: {**items, "master_param": torch._neg_view(torch.full((3,), 2.5))}}
        checkpoint.import_float32(optimizer, loaded)
        assert torch.equal(params[0], torch.full((3,), -2.5, dtype=torch.bfloat16))
        if master_weights:
            optimizer.load_state_dict(loaded)
            assert torch.equal(checkpoint.export_float32(optimizer)["state"][0]["master_param"], torch.full((3,), -2.5))


# --- What cannot be written to ---------------------------------------------------------------------------------------


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("make", [inference, lambda tensor: tensor[:1].expand(3)], ids=["inference", "expanded"])
@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_the_functional_form_refuses_what_cannot_be_written_to_before_torch_writes(name, make):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    lists = {key: [torch.ones(3), torch.ones(3)] for key in names}
    lists[name][1] = make(lists[name][1])
    steps = [torch.ones(()) for _ in range(2)]
    hyper = dict(amsgrad=True, beta1=0.9, beta2=0.99, lr=0.1, weight_decay=0.1, eps=1e-8, maximize=False)
    with pytest.raises(ValueError, match=rf"{name}\[1\] cannot be updated"):
        functional.adamw(**lists, state_steps=steps, **hyper, differentiable=True)
    everything = [tensor for tensors in (*lists.values(), steps) for tensor in tensors]
    assert all(bool((tensor == 1).all()) for tensor in everything)


def test_a_load_refuses_a_present_lr_that_cannot_be_written_to():
    params, optimizer = trained()
    loaded = optimizer.state_dict()
    before = values(params, optimizer)
    optimizer.param_groups[0]["lr"] = inference(torch.tensor(0.1))
    loaded["state"][0]["exp_avg"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="loaded lr of param group 0 has no place in the present tensor"):
        optimizer.load_state_dict(loaded)
    assert_same_bits(values(params, optimizer), before, "a refused load")


# --- Params in what is no list ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("make", [lambda: torch.ones(2, 3), tuple, lambda: None])
def test_params_that_are_no_list_are_refused(make, differentiable):
    """Rows of a tensor are new each time, and live no longer than a look at them."""
    _, optimizer = trained()
    optimizer.param_groups[0].update(params=make(), differentiable=differentiable)
    for _ in range(2):
        with pytest.raises(TypeError, match="params of group 0 must be a list, but are"):
            optimizer.step()


def test_a_list_that_yields_others_than_it_holds_is_stepped_by_what_it_holds():
    class Changing(list):
        def __iter__(self):
            return iter([torch.ones(3, requires_grad=True) for _ in range(2)])

    params, optimizer = trained()
    twins, other = trained()
    optimizer.param_groups[0]["params"] = Changing(params)
    for _ in range(3):
        optimizer.step()
        other.step()
    assert_same_bits(params, twins)


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view])
def test_a_first_step_of_a_lazy_param_whose_memory_was_freed_is_refused(lazy):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    param.data = lazy(param.detach().clone())
    optimizer = AdamW([param])
    param.grad = torch.ones_like(param)
    param.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step()
    assert not optimizer.state
