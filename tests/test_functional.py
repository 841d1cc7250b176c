"""The functional form and the registered operator mean what torch.optim.adamw.adamw means."""

import itertools

import pytest
import torch
from torch.optim.adamw import adamw as torch_adamw

from adamw_ext import AdamW
from adamw_ext.functional import adamw
from tests.reference import Textbook

SHAPES = [(5,), (3, 4), (), (70,)]
LISTS = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]
HYPER = {"lr": 0.1, "beta1": 0.8, "beta2": 0.7, "weight_decay": 0.2, "eps": 1e-3}
FLAGS = [dict(zip(("amsgrad", "maximize"), flags, strict=True)) for flags in itertools.product([False, True], repeat=2)]


def random(dtype, seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def make_lists(dtype=torch.float64, shapes=SHAPES):
    """The six lists of a first step."""

    def zeros():
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]

    steps = [torch.zeros(()) for _ in shapes]
    return dict(
        zip(LISTS, [random(dtype, 0, shapes), random(dtype, 1, shapes), zeros(), zeros(), zeros(), steps], strict=True)
    )


def copy_of(lists):
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}


def call_torch(lists, *, fused=None, amsgrad, **arguments):
    """torch's functional form; its fused kernel insists on an empty list of maxima without amsgrad."""
    maxima = lists["max_exp_avg_sqs"] if amsgrad or not fused else []
    torch_adamw(**{**lists, "max_exp_avg_sqs": maxima}, amsgrad=amsgrad, fused=fused, **arguments)


def assert_close(ours, theirs, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-12}
    for name in LISTS:
        for index, (a, b) in enumerate(zip(ours[name], theirs[name], strict=True)):
            torch.testing.assert_close(a, b, **tolerance, msg=lambda text, at=(name, index): f"{at}: {text}")


def assert_unchanged(lists, before):
    for name in LISTS:
        for index, (a, b) in enumerate(zip(lists[name], before[name], strict=False)):
            assert torch.equal(a, b), f"{name}[{index}] has changed"


def call_operator(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, **arguments):
    lists = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps
    torch.ops.adamw_ext.adamw_(*lists, **arguments)


BOTH_WAYS = pytest.mark.parametrize("call", [adamw, call_operator], ids=["functional", "operator"])


@BOTH_WAYS
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("theirs", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_it_updates_every_list_as_torch_does(call, flags, theirs):
    ours, yours = make_lists(), make_lists()
    for step in range(5):
        for lists in (ours, yours):
            lists["grads"] = random(torch.float64, 1 + step)
        call(**ours, **HYPER, **flags)
        call_torch(yours, **HYPER, **flags, **theirs)
        assert_close(ours, yours)
    assert not torch.equal(ours["params"][0], make_lists()["params"][0])
    assert all(step.item() == 5 for step in ours["state_steps"])


@BOTH_WAYS
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_it_updates_as_the_textbook_says(call, flags):
    lists = make_lists()
    textbook = Textbook(
        lists["params"], lr=0.1, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.2, amsgrad=flags["amsgrad"],
        maximize=flags["maximize"],
    )  # fmt: skip
    for step in range(5):
        lists["grads"] = random(torch.float64, 1 + step)
        call(**lists, **HYPER, **flags)
        textbook.step(lists["grads"])
    for ours, expected in zip(lists["params"], textbook.params, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


def test_each_param_is_updated_with_its_own_step():
    lists, twins = make_lists(), make_lists()
    for each in (lists, twins):
        for index, step in enumerate(each["state_steps"]):
            step.fill_(float(index * 10))
    adamw(**lists, **HYPER, amsgrad=False, maximize=False)
    torch_adamw(**twins, **HYPER, amsgrad=False, maximize=False)
    assert_close(lists, twins)
    assert [step.item() for step in lists["state_steps"]] == [1, 11, 21, 31]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128])
def test_it_gives_the_bits_of_the_optimizer_class(dtype):
    lists = make_lists(dtype)
    params = [torch.nn.Parameter(param.clone()) for param in lists["params"]]
    optimizer = AdamW(params, lr=0.1, betas=(0.8, 0.7), weight_decay=0.2, eps=1e-3, amsgrad=True)
    for step in range(3):
        lists["grads"] = random(dtype, 1 + step)
        for param, grad in zip(params, lists["grads"], strict=True):
            param.grad = grad.clone()
        adamw(**lists, **HYPER, amsgrad=True, maximize=False)
        optimizer.step()
    for index, param in enumerate(params):
        state = optimizer.state[param]
        assert torch.equal(lists["params"][index], param.detach())
        assert torch.equal(lists["exp_avgs"][index], state["exp_avg"])
        assert torch.equal(lists["exp_avg_sqs"][index], state["exp_avg_sq"])
        assert torch.equal(lists["max_exp_avg_sqs"][index], state["max_exp_avg_sq"])
        assert not torch.equal(lists["params"][index], random(dtype, 0)[index])


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
def test_tensor_hyperparameters(shape):
    tensors, floats = make_lists(), make_lists()
    as_tensors = {name: torch.full(shape, HYPER[name], dtype=torch.float64) for name in ("lr", "beta1", "beta2")}
    adamw(**tensors, **{**HYPER, **as_tensors}, amsgrad=True, maximize=True)
    adamw(**floats, **HYPER, amsgrad=True, maximize=True)
    assert_close(tensors, floats, rtol=0, atol=0)
    assert not torch.equal(floats["params"][0], make_lists()["params"][0])


def test_capturable_changes_nothing():
    plain, capturable = make_lists(), make_lists()
    adamw(**plain, **HYPER, amsgrad=False, maximize=False)
    adamw(**capturable, **HYPER, amsgrad=False, maximize=False, capturable=True)
    assert_close(plain, capturable, rtol=0, atol=0)
    assert not torch.equal(plain["params"][0], make_lists()["params"][0])


def test_differentiable_lets_gradients_flow_as_in_torch():
    def gradient(function):
        lists = make_lists()
        leaf = lists["params"][0].requires_grad_()
        lists["params"] = [param.clone() for param in lists["params"]]
        lists["grads"] = [param * 3 for param in lists["params"]]
        function(**lists, **HYPER, amsgrad=False, maximize=False, differentiable=True)
        return torch.autograd.grad(lists["params"][0].sum(), leaf)[0]

    ours, theirs = gradient(adamw), gradient(torch_adamw)
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().sum() > 0


def test_meta_tensors_go_through_torch():
    lists = {name: [t.to("meta") for t in tensors] for name, tensors in make_lists().items()}
    lists["state_steps"] = make_lists()["state_steps"]
    adamw(**lists, **HYPER, amsgrad=False, maximize=False)
    assert all(step.item() == 1 for step in lists["state_steps"])


def test_the_version_of_every_param_is_bumped():
    lists = make_lists()
    adamw(**lists, **HYPER, amsgrad=False, maximize=False)
    assert all(param._version > 0 for param in lists["params"])
    assert all(grad._version == 0 for grad in lists["grads"])


def test_params_of_several_dtypes_and_layouts_in_one_call():
    dtypes = [torch.float64, torch.float32, torch.complex64, torch.bfloat16]
    lists = make_lists()
    for name in LISTS[:-1]:
        lists[name] = [tensor.to(dtype) for tensor, dtype in zip(lists[name], dtypes, strict=True)]
    lists["params"][1] = lists["params"][1].t().contiguous().t()
    lists["exp_avgs"][1], lists["exp_avg_sqs"][1] = (torch.zeros_like(lists["params"][1]) for _ in range(2))
    separate = copy_of(lists)
    adamw(**lists, **HYPER, amsgrad=False, maximize=False)
    for index in range(len(SHAPES)):
        one = {name: [tensors[index]] for name, tensors in separate.items()}
        torch_adamw(**one, **HYPER, amsgrad=False, maximize=False, foreach=False, has_complex=index == 2)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if index == 3 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(lists["params"][index], separate["params"][index], **tolerance)
        assert not torch.equal(lists["params"][index], make_lists()["params"][index].to(dtypes[index]))


@BOTH_WAYS
@pytest.mark.parametrize(
    ("dtype", "lazy"),
    [(torch.float64, lambda g: torch._neg_view(-g)), (torch.complex128, lambda g: torch.conj_physical(g).conj())],
    ids=["neg", "conj"],
)
def test_lazily_negated_and_conjugated_gradients_give_the_right_numbers(call, dtype, lazy):
    lists, expected = make_lists(dtype), make_lists(dtype)
    lists["grads"] = [lazy(grad) for grad in lists["grads"]]
    assert all(grad.is_neg() or grad.is_conj() for grad in lists["grads"])
    call(**lists, **HYPER, amsgrad=False, maximize=False)
    call(**expected, **HYPER, amsgrad=False, maximize=False)
    assert_close(lists, expected, rtol=0, atol=0)
    assert not torch.equal(lists["params"][0], make_lists(dtype)["params"][0])


# --- grad_scale and found_inf ----------------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
def test_grad_scale_divides_and_writes_the_gradients_back_unscaled_as_torch_fused(call, maximize, shape):
    ours, theirs = make_lists(torch.float32), make_lists(torch.float32)
    scale, fine = torch.full(shape, 8.0), torch.zeros(shape)
    for step in range(3):
        for lists in (ours, theirs):
            lists["grads"] = [grad * 8 for grad in random(torch.float32, 1 + step)]
        arguments = {**HYPER, "amsgrad": False, "maximize": maximize, "grad_scale": scale, "found_inf": fine}
        call(**ours, **arguments)
        call_torch(theirs, **{**arguments, "found_inf": torch.tensor(0.0)}, fused=True)  # torch takes a 0-d one only
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for grad, unscaled in zip(ours["grads"], random(torch.float32, 1 + step), strict=True):
            assert torch.equal(grad, unscaled)
    assert not torch.equal(ours["params"][0], make_lists(torch.float32)["params"][0])


def test_grad_scale_that_is_no_power_of_two():
    ours, expected = make_lists(), make_lists()
    ours["grads"] = [grad * 1000.0 for grad in ours["grads"]]
    adamw(**ours, **HYPER, amsgrad=False, maximize=False, grad_scale=torch.tensor(1000.0))
    adamw(**expected, **HYPER, amsgrad=False, maximize=False)
    assert_close(ours, expected)


@pytest.mark.parametrize(
    "relayout",
    [
        lambda grad: grad.t().contiguous().t() if grad.dim() == 2 else grad,
        lambda grad: torch.stack([grad, grad], -1)[..., 0],
        lambda grad: torch._neg_view(-grad),
    ],
    ids=["transposed", "strided", "negative_view"],
)
def test_grad_scale_writes_back_gradients_of_any_layout(relayout):
    ours, expected = make_lists(), make_lists()
    ours["grads"] = [relayout(grad * 8) for grad in ours["grads"]]
    adamw(**ours, **HYPER, amsgrad=False, maximize=False, grad_scale=torch.tensor(8.0))
    adamw(**expected, **HYPER, amsgrad=False, maximize=False)
    assert_close(ours, expected, rtol=0, atol=0)


def test_an_expanded_gradient_with_grad_scale_gives_the_right_numbers_or_changes_nothing():
    lists = make_lists()
    lists["grads"] = [torch.full((1,) * p.dim(), 4.0, dtype=p.dtype).expand_as(p) for p in lists["params"]]
    expected, before = copy_of(lists), copy_of(lists)
    expected["grads"] = [grad / 8 for grad in expected["grads"]]
    adamw(**expected, **HYPER, amsgrad=False, maximize=False)
    try:
        adamw(**lists, **HYPER, amsgrad=False, maximize=False, grad_scale=torch.tensor(8.0))
    except RuntimeError as error:
        assert_unchanged(lists, before)
        assert "params[" in str(error), error  # noqa: PT017
    else:
        assert_close(lists, expected)


@BOTH_WAYS
@pytest.mark.parametrize("value", [1.0, 2.0, 0.5, -1.0, float("inf"), float("nan")])
def test_any_found_inf_but_zero_changes_nothing(call, value):
    lists = make_lists()
    lists["grads"][0][1] = float("inf")
    before = copy_of(lists)
    call(**lists, **HYPER, amsgrad=True, maximize=False, grad_scale=torch.tensor(8.0), found_inf=torch.tensor([value]))
    assert_unchanged(lists, before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"grad_scale": torch.ones(2)},
        {"found_inf": torch.zeros(2)},
        {"grad_scale": torch.tensor(0.0)},
        {"grad_scale": torch.tensor(float("nan"))},
        {"grad_scale": torch.tensor(float("inf"))},
        {"grad_scale": torch.tensor(-1.0)},
        {"grad_scale": torch.ones(0)},
    ],
    ids=str,
)
def test_an_unusable_scale_is_refused_by_name(arguments):
    lists = make_lists()
    before = copy_of(lists)
    with pytest.raises((RuntimeError, ValueError), match=next(iter(arguments))):
        adamw(**lists, **HYPER, amsgrad=False, maximize=False, **arguments)
    assert_unchanged(lists, before)


# --- Refusals --------------------------------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("change", ["shorter", "longer", "empty"])
def test_a_list_of_another_length_is_refused_by_name(call, name, change):
    lists = make_lists()
    tensors = lists[name]
    lists[name] = {"shorter": tensors[:-1], "longer": [*tensors, tensors[0].clone()], "empty": []}[change]
    if name == "params" and change == "empty":
        lists["params"] = tensors[:1]
    before = copy_of(lists)
    other = "grads" if name == "params" else name  # the params set the length that the other lists miss
    with pytest.raises(RuntimeError, match=other):
        call(**lists, **HYPER, amsgrad=True, maximize=False)
    assert_unchanged(lists, before)


def test_empty_lists_are_no_work():
    adamw(*[[] for _ in LISTS], **HYPER, amsgrad=True, maximize=False)


def test_max_exp_avg_sqs_may_be_empty_without_amsgrad():
    lists, full = make_lists(), make_lists()
    lists["max_exp_avg_sqs"] = []
    adamw(**lists, **HYPER, amsgrad=False, maximize=False)
    adamw(**full, **HYPER, amsgrad=False, maximize=False)
    assert all(torch.equal(a, b) for a, b in zip(lists["params"], full["params"], strict=True))


@BOTH_WAYS
@pytest.mark.parametrize(
    ("name", "index", "replace"),
    [
        ("grads", 1, lambda t: t.t()),
        ("grads", 3, lambda t: t[:-1]),
        ("grads", 3, lambda t: t.float()),
        ("grads", 3, lambda t: t.to(torch.complex128)),
        ("exp_avgs", 1, lambda t: t.t().contiguous()),
        ("exp_avgs", 3, lambda t: t.float()),
        ("exp_avg_sqs", 3, lambda t: t[1:]),
        ("exp_avg_sqs", 3, lambda t: t.float()),
        ("max_exp_avg_sqs", 3, lambda t: t.expand(2, -1)),
        ("max_exp_avg_sqs", 3, lambda t: t.bfloat16()),
        ("params", 3, lambda t: t.to(torch.int64)),
        ("params", 3, lambda t: t[:1].expand(70)),
        ("state_steps", 2, lambda t: t.double()),
        ("state_steps", 2, lambda t: t.to(torch.int64)),
        ("state_steps", 2, lambda t: t.expand(2)),
        ("state_steps", 2, lambda t: t.fill_(float("nan"))),
        ("state_steps", 2, lambda t: t.fill_(-1.0)),
        ("state_steps", 2, lambda t: t.fill_(0.5)),
    ],
)
def test_an_unfit_tensor_is_refused_by_place_and_nothing_changes(call, name, index, replace):
    lists = make_lists()
    lists[name][index] = replace(lists[name][index])
    before = copy_of(lists)
    with pytest.raises((RuntimeError, ValueError), match=rf"params\[{index}\]"):
        call(**lists, **HYPER, amsgrad=True, maximize=False)
    for key in LISTS:
        for at, (tensor, old) in enumerate(zip(lists[key], before[key], strict=True)):
            assert torch.equal(tensor, old) or tensor.isnan().all(), f"{key}[{at}] has changed"


@BOTH_WAYS
@pytest.mark.parametrize("name", LISTS[:-1])
def test_sparse_tensors_are_refused_and_nothing_changes(call, name):
    lists = make_lists()
    lists[name][1] = lists[name][1].to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Ss]parse"):
        call(**lists, **HYPER, amsgrad=True, maximize=False)
    lists[name][1] = make_lists()[name][1]
    assert_unchanged(lists, make_lists())


def test_a_sparse_gradient_is_refused_with_torchs_words_and_by_place():
    lists = make_lists()
    lists["grads"][1] = lists["grads"][1].to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients") as caught:
        adamw(**lists, **HYPER, amsgrad=True, maximize=False)
    assert "params[1]" in str(caught.value)


@pytest.mark.parametrize("name", LISTS)
def test_something_that_is_no_tensor_is_refused(name):
    for wrong in (None, 1.0, "x"):
        lists = make_lists()
        lists[name][1] = wrong
        with pytest.raises((TypeError, RuntimeError, ValueError)):  # and no AttributeError from inside
            adamw(**lists, **HYPER, amsgrad=True, maximize=False)
        lists[name][1] = make_lists()[name][1]
        assert_unchanged(lists, make_lists())


@BOTH_WAYS
def test_a_mixture_of_devices_is_refused_and_nothing_changes(call):
    for name in LISTS:
        lists = make_lists()
        lists[name][1] = lists[name][1].to("meta")
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            call(**lists, **HYPER, amsgrad=True, maximize=False)
        lists[name][1] = make_lists()[name][1]
        assert_unchanged(lists, make_lists())


@pytest.mark.parametrize("pair", [("params", "params"), ("params", "exp_avgs"), ("exp_avgs", "exp_avg_sqs")], ids=str)
def test_two_written_tensors_that_share_memory_are_refused(pair):
    lists = make_lists(shapes=[(6,), (6,)])
    lists[pair[1]][1] = lists[pair[0]][0]
    before = copy_of(lists)
    with pytest.raises(RuntimeError, match=r"params\[0\].*params\[1\]"):
        adamw(**lists, **HYPER, amsgrad=False, maximize=False)
    assert_unchanged(lists, before)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1.0, "Invalid learning rate: -1"),
        ("lr", float("nan"), "Invalid learning rate: nan"),
        ("beta1", 1.0, "Invalid beta parameter at index 0: 1"),
        ("beta2", -0.5, "Invalid beta parameter at index 1: -0.5"),
        ("eps", -1.0, "Invalid epsilon value: -1"),
        ("weight_decay", float("nan"), "Invalid weight_decay value: nan"),
    ],
)
def test_an_unusable_hyperparameter_is_refused_with_torchs_words(call, name, value, message):
    lists = make_lists()
    before = copy_of(lists)
    with pytest.raises(ValueError, match=message):
        call(**lists, **{**HYPER, name: value}, amsgrad=False, maximize=False)
    assert_unchanged(lists, before)


@pytest.mark.parametrize("overload", ["default", "tensor_lr"])
def test_the_operators_pass_opcheck(overload):
    """The dispatcher's own checks: schema, autograd registration, fake tensors, ahead-of-time compilation."""
    hyper = HYPER if overload == "default" else {**HYPER, "lr": torch.tensor(0.1)}
    arguments = [*make_lists().values(), torch.tensor(8.0), torch.tensor(0.0)]
    operator = getattr(torch.ops.adamw_ext.adamw_, overload)
    torch.library.opcheck(operator, arguments, {**hyper, "amsgrad": True, "maximize": False})


@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_recording_a_step_is_refused(name):
    lists = make_lists()
    lists[name][2].requires_grad_()
    before = {key: [tensor.detach().clone() for tensor in tensors] for key, tensors in lists.items()}
    message = rf"adamw_ext::adamw_ writes to {name}\[2\], which requires grad: call it under torch.no_grad"
    with pytest.raises(RuntimeError, match=message):
        call_operator(**lists, **HYPER, amsgrad=True, maximize=False)
    assert_unchanged(lists, before)
    with torch.no_grad():
        call_operator(**lists, **HYPER, amsgrad=True, maximize=False)
    assert not torch.equal(lists["params"][2], before["params"][2])


def test_gradients_may_require_grad():
    lists = make_lists()
    before = copy_of(lists)
    lists["grads"] = [grad.requires_grad_() for grad in lists["grads"]]
    call_operator(**lists, **HYPER, amsgrad=False, maximize=False)
    assert not torch.equal(lists["params"][0], before["params"][0])


def test_fake_tensors_take_a_step_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    operator = torch.ops.adamw_ext.adamw_.default
    with FakeTensorMode():
        lists = make_lists()
        operator(*lists.values(), **HYPER, amsgrad=True, maximize=False)
        lists["grads"][1] = torch.zeros(7)
        with pytest.raises(RuntimeError, match=r"grads\[1\] must have the sizes \[3, 4\]"):
            operator(*lists.values(), **HYPER, amsgrad=True, maximize=False)


def test_a_call_that_a_compiler_would_take_for_unused_is_refused():
    def step(*lists):
        torch.ops.adamw_ext.adamw_(*lists, **HYPER, amsgrad=True, maximize=False)

    with pytest.raises(Exception, match=r"call torch.ops.adamw_ext.adamw_.default"):
        torch.compile(step, fullgraph=True, backend="eager")(*make_lists().values())


@pytest.mark.parametrize("name", ["grad_scale", "found_inf", "state_steps"])
def test_one_tensor_without_memory_does_not_make_a_step_of_nothing(name):
    lists = make_lists()
    scaling = {"grad_scale": torch.tensor(1.0), "found_inf": torch.tensor(0.0)}
    if name in scaling:
        scaling[name] = scaling[name].to("meta")
    else:
        lists[name] = [tensor.to("meta") for tensor in lists[name]]
    with pytest.raises(RuntimeError, match=r"a tensor of this call is on meta|must be on cpu as params"):
        torch.ops.adamw_ext.adamw_.default(*lists.values(), **scaling, **HYPER, amsgrad=True, maximize=False)
