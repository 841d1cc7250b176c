"""Bad input gives an error that names what is wrong, or the right numbers: never a crash, never a half-made step.

A refused step changes nothing: params, moments, step counts and state keys stay, and the next correct step has the bits
of an optimizer that never saw the bad one.
"""

import contextlib
import copy
import functools
import warnings

import pytest
import torch
from torch import Tensor

from adamw_ext import AdamW
from tests.children import in_child
from tests.reference import Textbook

SHAPES = [(5,), (3, 4), (70,)]
REFUSALS = (RuntimeError, ValueError, TypeError, KeyError)
NAN = float("nan")


# --- Tools -----------------------------------------------------------------------------------------------------------


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_params(dtype=torch.float32):
    return [torch.nn.Parameter(random(shape, index, dtype)) for index, shape in enumerate(SHAPES)]


def set_grads(params, step):
    for index, param in enumerate(params):
        param.grad = random(param.shape, 100 * step + index, param.dtype)


class Run:
    """An optimizer with three params in two groups that has made two steps; ``twin`` sees the good steps only."""

    def __init__(self, dtype=torch.float32, steps=2, **arguments):
        self.params, self.twins = make_params(dtype), make_params(dtype)
        self.optimizer, self.twin = (self.build(params, arguments) for params in (self.params, self.twins))
        self.steps = 0
        for _ in range(steps):
            self.step()
        set_grads(self.params, self.steps)

    @staticmethod
    def build(params, arguments):
        names = ("first", "second", "third")
        named = list(zip(names, params, strict=True))
        return AdamW([{"params": named[:1]}, {"params": named[1:], "lr": 0.2}], lr=0.1, **arguments)

    def step(self):
        """A correct step of both."""
        for params, optimizer in ((self.params, self.optimizer), (self.twins, self.twin)):
            set_grads(params, self.steps)
            optimizer.step()
        self.steps += 1

    def refuse(self, match, error=REFUSALS):
        """A step that must raise, name what is wrong, and change nothing."""
        before = snapshot(self.optimizer)
        try:
            with pytest.raises(error, match=match) as caught:
                self.optimizer.step()
        finally:
            assert_as_in(before, self.optimizer)
        return caught

    def recover(self, count=2):
        """Correct steps have the bits of the twin's."""
        for _ in range(count):
            self.step()
        for param, twin in zip(self.params, self.twins, strict=True):
            assert torch.equal(param.detach(), twin.detach())
            for key, value in self.twin.state[twin].items():
                assert torch.equal(self.optimizer.state[param][key], value), key


def readable(tensor):
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() == 0:
        return False
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in strides)
    return tensor.untyped_storage().nbytes() >= (last + 1) * tensor.itemsize


def value_of(item):
    if isinstance(item, Tensor):
        return item.detach().clone() if readable(item) else (str(item.layout), item.shape, item.dtype, item.device)
    return repr(item) if isinstance(item, (str, list, float, int, type(None))) else type(item)


def snapshot(optimizer):
    """Values of params and state, by object: {owner: {key: value}}."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = {
        id(owner): {key: value_of(item) for key, item in items.items()} if isinstance(items, dict) else repr(items)
        for owner, items in optimizer.state.items()
    }
    return {"params": {id(param): value_of(param) for param in params}, "state": state}


def same(a, b):
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype.itemsize == b.dtype.itemsize == 1:  # float8 has no nan_to_num
            a, b = a.float(), b.float()
        return a.shape == b.shape and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    # A number that is a step count may have become the tensor that holds it.
    if isinstance(b, Tensor) and b.numel() == 1 and isinstance(a, str):
        return float(a) == b.item() or a == "nan" == str(b.item())
    return type(a) is type(b) and a == b


def assert_as_in(before, optimizer):
    now = snapshot(optimizer)
    for kind, what in (("params", "a param"), ("state", "the state of a param")):
        assert now[kind].keys() == before[kind].keys(), f"{what} has come or gone"
        for owner, old in before[kind].items():
            assert same(old, now[kind][owner]), f"{what} has changed: {old} -> {now[kind][owner]}"


@pytest.fixture(autouse=True, scope="module")
def _everything_imported():
    """torch imports its compiler when the first optimizer is made: here once, and not in every child."""
    AdamW([torch.zeros(1, requires_grad=True)])


def in_its_own_process(test):
    """A decorator: if the test crashes or hangs the process, it fails and the others go on."""

    @functools.wraps(test)
    def wrapper(**arguments):
        in_child(lambda: test(**arguments))

    return wrapper


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def check_against_textbook(params, starts, grads_of_steps, optimizer, tolerance=1e-5, **hyper):
    """Steps with the given gradients ([step][param]) give what the textbook gives for contiguous copies."""
    textbook = Textbook(starts, **hyper)
    for grads in grads_of_steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        textbook.step([grad.detach().resolve_conj().resolve_neg() for grad in grads])
        optimizer.step()
    for index, (param, expected, start) in enumerate(zip(params, textbook.params, starts, strict=True)):
        value = param.detach().resolve_conj().resolve_neg()
        value = torch.view_as_real(value) if value.is_complex() else value
        torch.testing.assert_close(
            value.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m, i=index: f"param {i}: {m}"
        )
        assert not torch.equal(param.detach(), start), f"param {index} has not moved"


# --- Gradients that do not fit ---------------------------------------------------------------------------------------


def other_dtype(param):
    param.grad_dtype = None  # a plain attribute where torch has no Tensor.grad_dtype: then assigning raises
    param.grad = param.grad.double()


def assign_grad_data(make):
    def change(param):
        param.grad.data = make(param.grad)

    return change


BAD_GRADIENTS = {
    "shorter": (assign_grad_data(lambda g: g[:2].clone()), r"gradient.*'second'.*\[3, 4\].*\[2, 4\]"),
    "transposed_shape": (assign_grad_data(lambda g: g.t().contiguous()), r"gradient.*'second'.*\[3, 4\].*\[4, 3\]"),
    "flat": (assign_grad_data(lambda g: g.reshape(12)), r"gradient.*'second'.*\[3, 4\].*\[12\]"),
    "more_dimensions": (assign_grad_data(lambda g: g[None].clone()), r"gradient.*'second'.*\[3, 4\].*\[1, 3, 4\]"),
    "broadcastable": (assign_grad_data(lambda g: g[:, :1].clone()), r"gradient.*'second'.*\[3, 4\].*\[3, 1\]"),
    "empty": (assign_grad_data(lambda g: g[:0].clone()), r"gradient.*'second'.*\[3, 4\].*\[0, 4\]"),
    "resized": (lambda p: p.grad.resize_(2), r"gradient.*'second'.*\[3, 4\].*\[2\]"),
    "float64": (assign_grad_data(lambda g: g.double()), "gradient.*'second'.*torch.float32.*torch.float64"),
    "complex32_data": (assign_grad_data(lambda g: g.to(torch.complex32)), "gradient.*'second'.*float32.*complex32"),
    "complex": (assign_grad_data(lambda g: g.to(torch.complex64)), "gradient.*'second'.*float32.*complex64"),
    "int": (assign_grad_data(lambda g: g.int()), "gradient.*'second'.*torch.float32.*torch.int32"),
    "other_grad_dtype": (other_dtype, "gradient.*'second'.*torch.float32.*torch.float64"),
    "sparse": (lambda p: setattr(p, "grad", p.grad.to_sparse()), "Adam does not support sparse gradients.*'second'"),
    "freed": (lambda p: freed(p.grad), "gradient.*'second'.*48 bytes.*0 bytes"),
    "half_freed": (lambda p: p.grad.untyped_storage().resize_(24), "gradient.*'second'.*48 bytes.*24 bytes"),
}


@pytest.mark.parametrize("steps", [0, 2], ids=["first_step", "later_step"])
@pytest.mark.parametrize(("change", "match"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS.keys())
@in_its_own_process
def test_a_gradient_that_does_not_fit_is_refused(change, match, steps):
    run = Run(steps=steps)
    change(run.params[1])
    run.refuse(match)
    if hasattr(run.params[1], "grad_dtype"):
        run.params[1].grad = None
        run.params[1].grad_dtype = torch.float32
    run.recover()


def test_the_sparse_gradient_message_begins_with_torchs():
    param = torch.nn.Parameter(torch.ones(3))
    messages = []
    for cls in (AdamW, torch.optim.AdamW):
        param.grad = torch.ones(3).to_sparse()
        with pytest.raises(RuntimeError) as caught:
            cls([param]).step()
        messages.append(str(caught.value))
    assert messages[0].startswith(messages[1])


def test_a_sparse_embedding_is_refused_and_a_dense_one_beside_it_does_not_move():
    dense, sparse = torch.nn.Embedding(4, 3), torch.nn.Embedding(4, 3, sparse=True)
    optimizer = AdamW([*dense.parameters(), *sparse.parameters()])
    (dense(torch.tensor([1])) + sparse(torch.tensor([2]))).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert_as_in(before, optimizer)


def test_a_bad_gradient_in_a_group_that_torch_updates_stops_all_groups():
    """All or none, also where one group is differentiable and goes through torch's functional AdamW."""
    params = make_params()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "differentiable": True}], lr=0.1)
    set_grads(params, 0)
    params[2].grad = params[2].grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert_as_in(before, optimizer)


def to_float8(param):
    param.data = param.data.to(torch.float8_e4m3fn)
    param.grad = torch.ones_like(param)


def give_float64_gradient(param):
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype: .grad has its param's dtype")
    param.grad_dtype = None
    param.grad = torch.ones_like(param, dtype=torch.float64)


# Of these torch's functional AdamW raises halfway.
BEYOND_TORCH = {
    "a param of a dtype that torch does not compute with": (to_float8, "dtype that torch computes with"),
    "a gradient of another dtype": (give_float64_gradient, "its gradient must have shape .* and dtype torch.float32"),
    "moments of another dtype": (None, "its state 'exp_avg' must be a tensor as the param"),
}


@pytest.mark.parametrize("name", BEYOND_TORCH)
def test_what_torch_has_no_operation_for_stops_all_groups(name):
    spoil, words = BEYOND_TORCH[name]
    params = make_params()
    optimizer = AdamW([{"params": [param], "differentiable": True} for param in params[:2]], lr=0.1)
    set_grads(params, 0)
    if spoil:
        spoil(params[1])
    else:
        optimizer.init_state()
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[params[1]][key] = torch.zeros_like(params[1], dtype=torch.float64)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=words), torch.no_grad():
        optimizer.step()
    assert_as_in(before, optimizer)


LAZY = pytest.mark.parametrize(
    "make", [lambda t: torch.conj_physical(t).conj(), lambda t: torch._neg_view(-t)], ids=["conj", "neg"]
)

# --- Gradients of unusual layout: the right numbers ------------------------------------------------------------------

LAYOUTS = {
    "expanded_row": lambda: random((4,), 1).expand(6, 4),
    "expanded_scalar": lambda: random((), 1).expand(6, 4),
    "expanded_column": lambda: random((6, 1), 1).expand(6, 4),
    "transposed": lambda: random((4, 6), 1).t(),
    "every_second": lambda: random((12, 8), 1)[::2, ::2],
    "column_slice": lambda: random((6, 9), 1)[:, 3:7],
    "row_slice": lambda: random((9, 4), 1)[2:8],
    "flipped_view": lambda: torch.as_strided(random((40,), 1), (6, 4), (1, 7), 3),
    "offset_by_one": lambda: random((25,), 1)[1:].view(6, 4),
    "negative_view": lambda: torch._neg_view(random((6, 4), 1)),
    "zero_tensor": lambda: torch._efficientzerotensor((6, 4)),
    "lazy_clone": lambda: torch._lazy_clone(random((6, 4), 1)),
    "requires_grad": lambda: random((6, 4), 1).requires_grad_(),
    "not_a_leaf": lambda: random((6, 4), 1).requires_grad_() * 2,
    "a_parameter": lambda: torch.nn.Parameter(random((6, 4), 1)),
}


@pytest.mark.parametrize("param_layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("make_grad", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_gradient_of_any_layout_gives_the_right_numbers(make_grad, param_layout):
    start = random((6, 4), 0)
    buffer = torch.full((6, 8), 7.0)
    param = {
        "contiguous": lambda: torch.nn.Parameter(start.clone()),
        "transposed": lambda: torch.nn.Parameter(start.t().contiguous().t()),
        "strided": lambda: torch.nn.Parameter(buffer[:, ::2].copy_(start)),
    }[param_layout]()
    optimizer = AdamW([param], lr=0.1)
    strides = param.stride()
    first = random((6, 4), 5)  # a plain gradient first, so that an all-zero second one still moves the param
    check_against_textbook([param], [start], [[first], [make_grad()], [make_grad()]], optimizer, lr=0.1)
    assert param.stride() == strides
    assert (buffer[:, 1::2] == 7.0).all()


@LAZY
def test_lazy_complex_gradients_give_the_right_numbers(make):
    start = random((6, 4), 0, torch.complex64)
    param = torch.nn.Parameter(start.clone())
    grads = [[make(random((6, 4), seed, torch.complex64))] for seed in (1, 2)]
    check_against_textbook([param], [start], grads, AdamW([param], lr=0.1), lr=0.1)


def test_imaginary_part_views_as_gradients_give_the_right_numbers():
    start = random((6, 4), 0)
    param = torch.nn.Parameter(start.clone())
    grads = [[random((6, 4), seed, torch.complex64).conj().imag] for seed in (1, 2)]
    assert grads[0][0].is_neg()
    check_against_textbook([param], [start], grads, AdamW([param], lr=0.1), lr=0.1)


def test_channels_last_gradients_and_params_in_every_combination():
    formats = (torch.contiguous_format, torch.channels_last)
    for param_format in formats:
        for grad_format in formats:
            start = random((2, 3, 4, 5), 0)
            param = torch.nn.Parameter(start.to(memory_format=param_format, copy=True))
            grads = [[random((2, 3, 4, 5), seed).to(memory_format=grad_format)] for seed in (1, 2)]
            check_against_textbook([param], [start], grads, AdamW([param], lr=0.1), lr=0.1)
            assert param.is_contiguous(memory_format=param_format)


@pytest.mark.parametrize("make_grad", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_unscaling_a_gradient_of_any_layout_is_right_or_refused_before_anything_changes(make_grad):
    """grad_scale writes the gradient back: where that is impossible the step must say so before it starts."""
    start = random((6, 4), 0)
    param, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([other, param], lr=0.1, fused=True)
    other.grad, param.grad = torch.ones(3), random((6, 4), 5)
    optimizer.step()
    textbook = Textbook([start], lr=0.1)
    textbook.step([param.grad])
    grad = make_grad()
    value = grad.detach().clone().resolve_neg()
    textbook.step([value / 4])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    param.grad, other.grad = grad, torch.ones(3)
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except REFUSALS:
        assert_as_in(before, optimizer)
        assert torch.equal(other.grad, torch.ones(3))
        assert torch.equal(param.grad.detach().clone(), value)
    else:
        torch.testing.assert_close(param.detach().double(), textbook.params[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(param.grad.detach().clone(), value / 4)
        assert torch.equal(other.grad, torch.full((3,), 0.25))


# --- State that was edited by hand -----------------------------------------------------------------------------------


def replace_state(key, make):
    def change(run):
        state = run.optimizer.state[run.params[1]]
        state[key] = make(state[key]) if callable(make) else make

    return change


def quantised(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


QUANTISED = quantised(torch.ones(3, 4))  # here, because quantising in a forked child may hang


def both_moments(make):
    def change(run):
        state = run.optimizer.state[run.params[1]]
        state["exp_avg"], state["exp_avg_sq"] = make(state["exp_avg"]), make(state["exp_avg_sq"])

    return change


def delete_state(key):
    def change(run):
        del run.optimizer.state[run.params[1]][key]

    return change


BAD_STATE = {
    "exp_avg_shorter": (replace_state("exp_avg", lambda t: t[:2].clone()), r"'exp_avg'.*'second'.*\[3, 4\].*\[2, 4\]"),
    "exp_avg_transposed": (replace_state("exp_avg", lambda t: t.t().contiguous()), r"'exp_avg'.*'second'.*\[4, 3\]"),
    "exp_avg_flat": (replace_state("exp_avg", lambda t: t.reshape(12)), r"'exp_avg'.*'second'.*\[12\]"),
    "exp_avg_sq_empty": (replace_state("exp_avg_sq", lambda t: t[:0].clone()), r"'exp_avg_sq'.*'second'.*\[0, 4\]"),
    "exp_avg_float64": (replace_state("exp_avg", lambda t: t.double()), "'second'.*(float64|'exp_avg).*float"),
    "exp_avg_sq_float64": (replace_state("exp_avg_sq", lambda t: t.double()), "'exp_avg_sq'.*'second'.*torch.float64"),
    "both_float64": (both_moments(lambda t: t.double()), "'second'.*torch.float32.*torch.float64"),
    "both_float16": (both_moments(lambda t: t.half()), "'second'.*torch.float32.*torch.float16"),
    "both_complex": (both_moments(lambda t: t.to(torch.complex64)), "'second'.*torch.float32"),
    "exp_avg_complex": (replace_state("exp_avg", lambda t: t.to(torch.complex64)), "'second'.*torch.float32"),
    "both_int": (both_moments(lambda t: t.int()), "'second'.*torch.int32"),
    "exp_avg_none": (replace_state("exp_avg", None), "'exp_avg'.*'second'"),
    "exp_avg_sq_none": (replace_state("exp_avg_sq", None), "'exp_avg_sq'.*'second'"),
    "exp_avg_string": (replace_state("exp_avg", "x"), "'exp_avg'.*'second'"),
    "exp_avg_list": (replace_state("exp_avg", [1.0] * 12), "'exp_avg'.*'second'"),
    "exp_avg_sparse": (replace_state("exp_avg", lambda t: t.to_sparse()), "'exp_avg'.*'second'"),
    "exp_avg_meta": (replace_state("exp_avg", lambda t: t.to("meta")), "'exp_avg'.*'second'"),
    "exp_avg_sq_meta": (replace_state("exp_avg_sq", lambda t: t.to("meta")), "'exp_avg_sq'.*'second'"),
    "exp_avg_quantised": (replace_state("exp_avg", lambda t: QUANTISED), "'exp_avg'.*'second'"),
    "exp_avg_freed": (replace_state("exp_avg", lambda t: freed(t.clone())), "'exp_avg'.*'second'.*48 bytes.*0 bytes"),
    "exp_avg_resized_storage": (
        lambda run: run.optimizer.state[run.params[1]]["exp_avg_sq"].untyped_storage().resize_(16),
        "'exp_avg_sq'.*'second'.*48 bytes.*16 bytes",
    ),
    "exp_avg_resized": (
        lambda run: run.optimizer.state[run.params[1]]["exp_avg"].resize_(2),
        r"'exp_avg'.*'second'.*\[2\]",
    ),
    "exp_avg_missing": (delete_state("exp_avg"), "'second'.*'exp_avg'"),
    "exp_avg_sq_missing": (delete_state("exp_avg_sq"), "'second'.*'exp_avg_sq'"),
    "step_missing": (delete_state("step"), "'second'.*'step'"),
    "step_nan": (replace_state("step", torch.tensor(NAN)), "'step'.*'second'.*nan"),
    "step_nan_float": (replace_state("step", NAN), "'step'.*'second'.*nan"),
    "step_negative": (replace_state("step", torch.tensor(-1.0)), "'step'.*'second'.*-1"),
    "step_negative_int": (replace_state("step", -3), "'step'.*'second'.*-3"),
    "step_fractional": (replace_state("step", torch.tensor(1.5)), "'step'.*'second'.*1.5"),
    "step_infinite": (replace_state("step", torch.tensor(float("inf"))), "'step'.*'second'.*inf"),
    "step_of_two": (replace_state("step", torch.ones(2)), r"'step'.*'second'.*\[2\]"),
    "step_empty": (replace_state("step", torch.ones(0)), r"'step'.*'second'.*\[0\]"),
    "step_string": (replace_state("step", "x"), "'step'.*'second'.*'x'"),
    "step_none": (replace_state("step", None), "'step'.*'second'.*None"),
    "step_complex": (replace_state("step", torch.tensor(2 + 1j)), "'step'.*'second'"),
    "step_meta": (replace_state("step", torch.ones((), device="meta")), "'step'.*'second'"),
    "step_freed": (replace_state("step", lambda t: freed(t.clone())), "'step'.*'second'.*4 bytes.*0 bytes"),
    "step_shared": (
        lambda run: run.optimizer.state[run.params[1]].update(step=run.optimizer.state[run.params[2]]["step"]),
        "'second'.*'third'",
    ),
    "exp_avg_shared": (
        lambda run: run.optimizer.state[run.params[1]].update(exp_avg=run.optimizer.state[run.params[1]]["exp_avg_sq"]),
        "'second'",
    ),
    "exp_avg_is_the_param": (
        lambda run: run.optimizer.state[run.params[1]].update(exp_avg=run.params[1].data),
        "'second'",
    ),
    "step_inside_the_moment": (
        lambda run: run.optimizer.state[run.params[1]].update(
            step=run.optimizer.state[run.params[1]]["exp_avg"].zero_()[0, 0]
        ),
        "'second'",
    ),
    "state_is_a_list": (lambda run: run.optimizer.state.update({run.params[1]: [1, 2]}), "'second'"),
    "state_is_a_tensor": (lambda run: run.optimizer.state.update({run.params[1]: torch.ones(3)}), "'second'"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("change", "match"), BAD_STATE.values(), ids=BAD_STATE.keys())
@in_its_own_process
def test_state_that_does_not_fit_is_refused(change, match):
    run = Run()
    good = copy.deepcopy(dict(run.optimizer.state[run.params[1]]))
    change(run)
    run.refuse(match)
    run.optimizer.state[run.params[1]] = good
    run.recover()


@in_its_own_process
def test_a_freed_strided_moment_is_refused():
    run = Run()
    run.optimizer.state[run.params[1]]["exp_avg"] = freed_view()
    run.refuse("'exp_avg'.*'second'")


def test_a_missing_maximum_is_refused_when_amsgrad_is_switched_on():
    run = Run()
    run.optimizer.param_groups[1]["amsgrad"] = True
    run.refuse("max_exp_avg_sq.*'second'")
    run.optimizer.param_groups[1]["amsgrad"] = False
    run.recover()


def test_a_maximum_without_amsgrad_is_left_alone():
    run = Run(amsgrad=True)
    for optimizer in (run.optimizer, run.twin):
        optimizer.param_groups[1]["amsgrad"] = False
    maximum = run.optimizer.state[run.params[1]]["max_exp_avg_sq"]
    before = maximum.clone()
    run.recover()
    assert torch.equal(maximum, before)


RIGHT_STATE = {
    "other_tensors": lambda t: t.clone(),
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "requires_grad": lambda t: t.clone().requires_grad_() if t.dim() else t.clone(),
    "parameter": lambda t: torch.nn.Parameter(t.clone()) if t.dim() else t.clone(),
    "lazy_clone": lambda t: torch._lazy_clone(t),
    "view_of_a_larger_buffer": lambda t: torch.cat([t.flatten(), torch.ones(9)])[: t.numel()].view(t.shape),
    "unaligned": lambda t: torch.cat([torch.ones(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("make", RIGHT_STATE.values(), ids=RIGHT_STATE.keys())
def test_state_replaced_by_other_right_tensors_is_honoured(make):
    run = Run()
    for param in run.params:
        state = run.optimizer.state[param]
        for key in state:
            state[key] = make(state[key])
    run.recover()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_new_values_in_a_replaced_moment_are_used(key):
    run = Run()
    for params, optimizer in ((run.params, run.optimizer), (run.twins, run.twin)):
        moment = optimizer.state[params[1]][key]
        optimizer.state[params[1]][key] = moment + 0.5
    expected = run.twins[1].detach().clone()
    run.recover(1)
    reference = Run()
    reference.step()
    assert not torch.equal(run.params[1], reference.params[1])
    assert not torch.equal(run.params[1], expected)


def test_moments_edited_in_place_are_used():
    run = Run()
    run.optimizer.state[run.params[1]]["exp_avg"].fill_(3.0)
    run.optimizer.state[run.params[1]]["step"].fill_(9.0)
    run.step()
    state = run.optimizer.state[run.params[1]]
    torch.testing.assert_close(state["exp_avg"], 3.0 + 0.1 * (run.params[1].grad - 3.0))
    assert state["step"].item() == 10


IN_PLACE = {
    "transposed": lambda t: t.t_(),
    "re-strided": lambda t: t.as_strided_((4, 4), (1, 4)),
    "moved_within_its_storage": lambda t: t.set_(t.untyped_storage(), 16, (4, 4), (4, 1)),
    "moved_by_data": lambda t: setattr(t, "data", torch.as_strided(t, (4, 4), (4, 1), 16)),
}


@pytest.mark.parametrize("which", ["param", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_tensors_rearranged_in_place_are_honoured_as_in_torch(change, which):
    """The object, its storage and its number of elements stay; where its elements lie does not.

    A moment that no longer lies as its param does is replaced by a copy that does: the buffer counts for params only.
    """
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        buffer = torch.cat([random((16,), 0), random((16,), 1)]).abs_()
        param = torch.nn.Parameter(buffer[:16].view(4, 4) if which == "param" else random((4, 4), 2))
        optimizer = cls([param], lr=0.1)
        for step in range(5):
            param.grad = random((4, 4), 10 + step)
            optimizer.step()
            if step == 0 and which != "param":
                optimizer.state[param][which] = buffer[:16].view(4, 4)
            if step == 2:
                with torch.no_grad():
                    change(param.requires_grad_(False) if which == "param" else optimizer.state[param][which])
        moments = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq")]
        results.append([param.detach(), *moments, *([buffer] if which == "param" else [])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_step_count_moved_within_its_storage_is_honoured():
    run = Run()
    counts = torch.tensor([2.0, 40.0])
    run.optimizer.state[run.params[1]]["step"] = counts[0]
    run.step()
    run.optimizer.state[run.params[1]]["step"].set_(counts.untyped_storage(), 1, (), ())
    run.step()
    assert counts.tolist() == [3.0, 41.0]


@pytest.mark.parametrize(
    "value", [2.0, 2, torch.tensor([2.0]), torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)], ids=repr
)
def test_a_step_count_of_another_type_is_honoured(value):
    run = Run()
    run.optimizer.state[run.params[1]]["step"] = value
    run.recover()


def test_an_extra_state_key_is_left_alone():
    run = Run()
    extra = torch.full((2,), 5.0)
    run.optimizer.state[run.params[1]].update(ema=extra, note="x")
    run.recover()
    state = run.optimizer.state[run.params[1]]
    assert state["ema"] is extra
    assert torch.equal(extra, torch.full((2,), 5.0))
    assert list(state) == ["step", "exp_avg", "exp_avg_sq", "ema", "note"]


@pytest.mark.parametrize(
    "clear",
    [lambda o, p: o.state.pop(p), lambda o, p: o.state[p].clear(), lambda o, p: o.state.update({p: {}})],
    ids=["deleted", "emptied", "replaced"],
)
def test_deleted_state_starts_anew_as_in_torch(clear):
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        params = make_params()
        optimizer = cls(params, lr=0.1)
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            if step == 1:
                clear(optimizer, params[1])
        assert [optimizer.state[param]["step"].item() for param in params] == [4, 2, 4]
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- Hyperparameters set between steps -------------------------------------------------------------------------------

BAD_HYPERPARAMETERS = [
    ("lr", NAN),
    ("lr", -1.0),
    ("lr", torch.tensor(NAN)),
    ("lr", torch.tensor(-0.5)),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor([])),
    ("lr", torch.ones((), device="meta")),
    ("lr", torch.tensor(1j)),
    ("lr", "0.1"),
    ("lr", None),
    ("lr", 1j),
    ("lr", [0.1]),
    ("betas", (NAN, 0.9)),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.9)),
    ("betas", (0.9,)),
    ("betas", (0.9, 0.9, 0.9)),
    ("betas", 0.9),
    ("betas", None),
    ("betas", (None, 0.9)),
    ("betas", (0.9, torch.tensor([0.9, 0.9]))),
    ("eps", NAN),
    ("eps", -1e-8),
    ("eps", "x"),
    ("eps", torch.ones(2)),
    ("weight_decay", NAN),
    ("weight_decay", -0.1),
    ("weight_decay", None),
    ("weight_decay", torch.ones(2)),
    ("amsgrad", torch.tensor([True, False])),
    ("maximize", torch.tensor([True, False])),
]


@pytest.mark.parametrize("steps", [0, 2], ids=["first_step", "later_step"])
@pytest.mark.parametrize(("key", "value"), BAD_HYPERPARAMETERS, ids=lambda value: str(value).replace(" ", ""))
@in_its_own_process
def test_an_unusable_hyperparameter_is_refused_by_group(key, value, steps):
    run = Run(steps=steps)
    good = run.optimizer.param_groups[1][key]
    run.optimizer.param_groups[1][key] = value
    run.refuse("param group 1", (ValueError, TypeError))
    run.optimizer.param_groups[1][key] = good
    run.recover()


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"])
def test_a_deleted_hyperparameter_is_refused_by_group_and_name(key):
    run = Run()
    good = run.optimizer.param_groups[1].pop(key)
    run.refuse(f"param group 1 has no '{key}'", KeyError)
    run.optimizer.param_groups[1][key] = good
    run.recover()


@in_its_own_process
def test_a_freed_lr_tensor_is_refused():
    run = Run()
    run.optimizer.param_groups[1]["lr"] = freed(torch.tensor(0.1))
    run.refuse("param group 1")


@pytest.mark.parametrize("attribute", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [1.0, "x", torch.ones(2), torch.ones(0), torch.ones((), device="meta")], ids=str)
@in_its_own_process
def test_an_unusable_grad_scale_or_found_inf_is_refused_by_name(attribute, value):
    run = Run(fused=True)
    setattr(run.optimizer, attribute, value)
    run.refuse(attribute)
    setattr(run.optimizer, attribute, None)
    run.recover()


class EditsWhenRead:
    """A number that runs code when it is read, as any object in a param group may."""

    def __init__(self, edit):
        self.edit = edit

    def __float__(self):
        edit, self.edit = self.edit, lambda: None
        edit()
        return 0.1

    __bool__ = __float__


EDITS = {
    "groups_removed": lambda run: run.optimizer.param_groups.clear(),
    "last_group_removed": lambda run: run.optimizer.param_groups.pop(),
    "params_removed": lambda run: [group["params"].clear() for group in run.optimizer.param_groups],
    "group_emptied": lambda run: run.optimizer.param_groups[0].clear(),
    "groups_added": lambda run: run.optimizer.param_groups.extend(copy.copy(run.optimizer.param_groups) * 4),
    "state_removed": lambda run: run.optimizer.state.clear(),
    "everything_freed": lambda run: (
        run.optimizer.state.clear(),
        [group["params"].clear() for group in run.optimizer.param_groups],
        run.params.clear(),
    ),
    "storage_freed": lambda run: [freed(param) for param in run.params],
    "gradients_removed": lambda run: [setattr(param, "grad", None) for param in run.params],
    "step_inside_step": lambda run: run.optimizer.step(),
    "loads": lambda run: run.optimizer.load_state_dict(copy.deepcopy(run.twin.state_dict())),
}


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_hyperparameter_that_edits_the_optimizer_when_read_neither_crashes_nor_hangs(edit, key):
    def attempt():
        run = Run()
        run.optimizer.param_groups[0][key] = EditsWhenRead(lambda: edit(run))
        for _ in range(2):
            with contextlib.suppress(*REFUSALS, AttributeError):
                run.optimizer.step()

    in_child(attempt, timeout=5)


# --- Params that change under the optimizer --------------------------------------------------------------------------


def new_data(make):
    def change(param):
        param.data = make(param.data)

    return change


MOVED = {
    "clone": new_data(lambda t: t.clone()),
    "transposed_strides": new_data(lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone()),
    "strided": new_data(lambda t: torch.stack([t, t], -1)[..., 0]),
    "unaligned": new_data(lambda t: torch.cat([torch.ones(1), t.flatten()])[1:].view(t.shape)),
    "shared_memory": lambda p: p.share_memory_(),
    "set_": lambda p: p.set_(p.clone()),
    "storage_reallocated": lambda p: p.untyped_storage().resize_(4 * p.untyped_storage().nbytes()),
}


@pytest.mark.parametrize("change", MOVED.values(), ids=MOVED.keys())
def test_params_moved_to_other_memory_are_updated_there(change):
    run = Run()
    addresses = [param.data_ptr() for param in run.params]
    with torch.no_grad():
        for param in run.params:
            change(param)
    kept = [torch.empty(param.shape) for param in run.params]  # takes the old addresses, if they are free
    for tensor in kept:
        tensor.fill_(7.0)
    assert [param.data_ptr() for param in run.params] != addresses
    run.recover()
    assert all((tensor == 7.0).all() for tensor in kept)


def test_new_values_in_params_are_used():
    run = Run()
    for params in (run.params, run.twins):
        params[1].data = torch.full((3, 4), 2.0)
        with torch.no_grad():
            params[2].fill_(3.0)
    run.recover()
    assert (run.params[1] - 2.0).abs().max() < 1.5


def freed_view():
    buffer = torch.ones(3, 8)
    view = buffer[:, ::2]
    freed(buffer)
    return view


OTHER_DATA = {
    "shape": (lambda: torch.ones(3, 5), False, r"'second'.*(\[3, 4\].*\[3, 5\]|\[3, 5\].*\[3, 4\])"),
    "shape_with_grad": (lambda: torch.ones(3, 5), True, r"'second'.*\[3, 5\].*\[3, 4\]"),
    "flat_with_grad": (lambda: torch.ones(12), True, r"'second'.*\[12\].*\[3, 4\]"),
    "empty_with_grad": (lambda: torch.ones(0), True, r"'second'.*\[0\].*\[3, 4\]"),
    "double": (lambda: torch.ones(3, 4).double(), False, "'second'.*float64.*float32"),
    "double_with_grad": (lambda: torch.ones(3, 4).double(), True, "'second'.*float64.*float32"),
    "complex": (lambda: torch.ones(3, 4).to(torch.complex64), False, "'second'.*(complex64|float32)"),
    "complex_with_grad": (lambda: torch.ones(3, 4).to(torch.complex64), True, "'second'.*(complex64|float32)"),
    "int": (lambda: torch.ones(3, 4).int(), False, "'second'.*int32"),
    "expanded": (lambda: torch.ones(4).expand(3, 4), False, "'second'.*single memory location"),
    "freed": (lambda: freed(torch.ones(3, 4)), False, "'second'.*48 bytes.*0 bytes"),
    "freed_strided": (lambda: freed_view(), False, "'second'.*bytes.*0 bytes"),
}


@pytest.mark.parametrize(("make", "with_grad", "match"), OTHER_DATA.values(), ids=OTHER_DATA.keys())
@in_its_own_process
def test_data_of_another_shape_or_dtype_is_refused(make, with_grad, match):
    run = Run()
    param, data = run.params[1], make()
    good, good_grad = param.data, param.grad
    if with_grad:
        param.grad = None
    param.requires_grad_(data.is_floating_point() or data.is_complex())
    param.data = data
    if with_grad:
        param.grad = torch.ones_like(data)
    run.refuse(match)
    param.data = good
    param.requires_grad_()
    param.grad = None
    param.grad = good_grad
    run.recover()


def test_a_param_whose_storage_is_freed_is_refused_and_welcome_back():
    run = Run()
    values = run.params[1].detach().clone()
    freed(run.params[1])
    run.refuse("'second'.*48 bytes.*0 bytes")
    run.params[1].untyped_storage().resize_(48)
    run.params[1].data.copy_(values)
    run.recover()


def test_a_freed_param_without_a_gradient_does_not_stop_the_others():
    """Offloading and sharding free the storage of params that take no part in a step."""
    run = Run()
    values = run.params[1].detach().clone()
    for again in (False, True):
        run.params[1].grad = None
        freed(run.params[1])
        if again:  # the table is rebuilt while the storage is gone
            run.optimizer.add_param_group({"params": [("fourth", torch.nn.Parameter(torch.ones(2)))]})
        before = run.params[0].detach().clone()
        run.optimizer.step()
        assert not torch.equal(run.params[0], before)
        run.params[1].untyped_storage().resize_(48)
        run.params[1].data.copy_(values)
    assert run.optimizer.state[run.params[1]]["step"].item() == 2
    assert run.optimizer.state[run.params[0]]["step"].item() == 4


def test_a_resized_param_is_refused():
    run = Run()
    values = run.params[1].detach().clone()
    run.params[1].requires_grad_(False).resize_(2, 4)
    run.refuse("'second'")
    run.params[1].resize_(3, 4).copy_(values)
    run.params[1].requires_grad_()
    run.recover()


def test_params_exchanged_by_swap_tensors_are_updated_as_in_torch():
    """Module.to() exchanges tensors this way under torch.__future__.set_swap_module_params_on_conversion."""
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        params = make_params()
        optimizer = cls(params, lr=0.1)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        for param in params:
            param.grad = None
        torch.utils.swap_tensors(params[1], torch.nn.Parameter(torch.full((3, 4), 2.0)))
        set_grads(params, 2)
        optimizer.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (results[0][1] - 2.0).abs().max() < 0.3


def test_a_model_can_be_converted_by_swapping_after_steps():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = torch.nn.Linear(3, 2)
        optimizer = AdamW(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.to(torch.bfloat16)
        assert model.weight.dtype == torch.bfloat16
        before = model.weight.detach().clone()
        model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_param_replaced_in_its_group_is_updated_in_its_place():
    run = Run()
    old, new = run.params[1], torch.nn.Parameter(torch.full((3, 4), 2.0))
    before = old.detach().clone()
    run.optimizer.param_groups[1]["params"][0] = new
    new.grad = torch.ones(3, 4)
    run.optimizer.step()
    assert torch.equal(old, before)
    assert run.optimizer.state[new]["step"].item() == 1
    torch.testing.assert_close(new.detach(), torch.full((3, 4), 2.0 * (1 - 0.2 * 0.01) - 0.2))


def test_a_param_removed_from_its_group_stays():
    run = Run()
    before = run.params[1].detach().clone()
    del run.optimizer.param_groups[1]["params"][0]
    run.optimizer.step()
    assert torch.equal(run.params[1], before)
    assert not torch.equal(run.params[2], run.twins[2])


@pytest.mark.parametrize(
    "edit",
    [
        lambda run: run.optimizer.param_groups[1]["params"].append(5),
        lambda run: run.optimizer.param_groups[1]["params"].append(None),
        lambda run: run.optimizer.param_groups.append(5),
        lambda run: run.optimizer.param_groups.append({}),
        lambda run: run.optimizer.param_groups[1].pop("params"),
        lambda run: setattr(run.optimizer, "state", None),
    ],
    ids=["int_param", "none_param", "int_group", "empty_group", "no_params", "no_state"],
)
@in_its_own_process
def test_containers_that_are_not_what_they_should_be_are_refused(edit):
    run = Run()
    before = [param.detach().clone() for param in run.params]
    edit(run)
    with pytest.raises((*REFUSALS, AttributeError)):
        run.optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(run.params, before, strict=True))


# --- Conversion of the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_a_model_converted_before_the_first_step_trains_in_its_new_dtype(dtype):
    params, twins = make_params(), make_params()
    ours, theirs = AdamW(params, lr=0.1), torch.optim.AdamW(twins, lr=0.1)
    for param in [*params, *twins]:
        param.data = param.data.to(dtype)
    for step in range(3):
        set_grads(params, step)
        set_grads(twins, step)
        ours.step()
        theirs.step()
    tolerance = 1e-10 if dtype == torch.float64 else 3e-2
    for param, twin in zip(params, twins, strict=True):
        assert ours.state[param]["exp_avg"].dtype == dtype
        torch.testing.assert_close(param, twin, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_made_half_precision_after_steps_keeps_float32_moments(dtype):
    params = make_params()
    optimizer = AdamW(params, lr=0.1)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    moments = [optimizer.state[param]["exp_avg"].clone() for param in params]
    starts = []
    for param in params:
        param.grad = None
        param.data = param.data.to(dtype)
        starts.append(param.detach().clone())
    set_grads(params, 2)
    optimizer.step()
    for param, moment, start in zip(params, moments, starts, strict=True):
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == torch.float32
        assert state["step"].item() == 3
        torch.testing.assert_close(state["exp_avg"], moment + 0.1 * (param.grad.float() - moment))
        assert not torch.equal(param, start)


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float16, torch.float32)])
def test_a_model_made_more_precise_after_steps_is_refused(before, after):
    run = Run(dtype=before)
    originals = [param.data for param in run.params]
    for param in run.params:
        param.grad = None
        param.data = param.data.to(after)
    set_grads(run.params, 2)
    run.refuse(f"'first'.*{after}.*{before}")
    for param, data in zip(run.params, originals, strict=True):
        param.grad = None
        param.data = data
    run.recover()


def test_module_conversion_with_and_without_state():
    for convert in ("half", "double", "bfloat16"):
        for stepped in (False, True):
            model = torch.nn.Linear(4, 3)
            optimizer = AdamW(model.parameters(), lr=0.1)
            if stepped:
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
            getattr(model, convert)()
            optimizer.zero_grad()
            before = model.weight.detach().clone()
            model(torch.ones(2, 4, dtype=before.dtype)).sum().backward()
            if convert == "double" and stepped:
                with pytest.raises(RuntimeError, match="float64"):
                    optimizer.step()
                assert torch.equal(model.weight, before)
            else:
                optimizer.step()
                assert not torch.equal(model.weight, before)
                assert model.weight.isfinite().all()


# --- Params of unusual kinds -----------------------------------------------------------------------------------------


def test_meta_params_step_beside_real_ones_as_in_torch():
    for cls in (AdamW, torch.optim.AdamW):
        real, meta = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))
        real.grad, meta.grad = torch.ones(3), torch.ones(3, device="meta")
        optimizer = cls([{"params": [real]}, {"params": [meta]}], lr=0.1)
        optimizer.step()
        assert optimizer.state[meta]["step"].item() == 1
        assert optimizer.state[meta]["exp_avg"].is_meta
        torch.testing.assert_close(real.detach(), torch.full((3,), 1 - 0.1 * 0.01 - 0.1))


KINDS = {
    "int64": lambda: torch.ones(3, dtype=torch.int64),
    "uint8": lambda: torch.ones(3, dtype=torch.uint8),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "quantised": lambda: quantised(torch.ones(3)),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "sparse_csr": lambda: torch.ones(3, 3).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "zero_tensor": lambda: torch._efficientzerotensor(3),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_params_of_a_kind_that_cannot_be_updated_are_refused(make):
    plain, odd = torch.nn.Parameter(torch.ones(4)), make()
    optimizer = AdamW([("plain", plain), ("odd", odd)], lr=0.1)
    plain.grad, odd.grad = torch.ones(4), make()
    with pytest.raises((RuntimeError, NotImplementedError, ValueError, TypeError)):
        optimizer.step()
    assert torch.equal(plain, torch.ones(4)), "the other param has moved"
    assert plain not in optimizer.state or optimizer.state[plain]["step"].item() == 0
    assert odd not in optimizer.state
    odd.grad = None
    optimizer.step()
    assert not torch.equal(plain, torch.ones(4))


@pytest.mark.parametrize("kind", ["int64", "float8", "zero_tensor"])
def test_refusals_of_strided_cpu_params_name_them(kind):
    plain, odd = torch.nn.Parameter(torch.ones(4)), KINDS[kind]()
    optimizer = AdamW([("plain", plain), ("odd", odd)], lr=0.1)
    plain.grad, odd.grad = torch.ones(4), KINDS[kind]()
    with pytest.raises((RuntimeError, ValueError, TypeError), match="'odd'"):
        optimizer.step()


@LAZY
def test_lazily_conjugated_and_negated_params_get_the_right_numbers(make):
    start = random((6, 4), 0, torch.complex64)
    param = torch.nn.Parameter(make(start))
    assert param.is_conj() or param.is_neg()
    grads = [[random((6, 4), seed, torch.complex64)] for seed in (1, 2)]
    check_against_textbook([param], [start], grads, AdamW([param], lr=0.1), lr=0.1)
    assert param.is_conj() or param.is_neg()


def test_inference_params_are_refused_outside_inference_mode_and_updated_inside():
    with torch.inference_mode():
        param = torch.ones(4)
        param.grad = torch.ones(4)
    plain = torch.nn.Parameter(torch.ones(4))
    plain.grad = torch.ones(4)
    optimizer = AdamW([("plain", plain), ("inference", param)], lr=0.1)
    with pytest.raises(RuntimeError, match=r"'inference'.*InferenceMode"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4))
    assert torch.equal(plain, torch.ones(4))
    assert len(optimizer.state) == 0
    with torch.inference_mode():
        optimizer.step()
    torch.testing.assert_close(param.clone(), torch.full((4,), 1 - 0.1 * 0.01 - 0.1))


def test_steps_inside_and_outside_inference_mode_mix():
    run = Run(steps=0)
    with torch.inference_mode():
        run.step()
    run.recover()


@pytest.mark.parametrize("which", ["param", "grad", "exp_avg", "step"])
def test_a_copy_on_write_clone_is_not_changed_by_a_step(which):
    run = Run()

    def tensor():
        param = run.params[1]
        if which == "grad":
            return param.grad
        return param.detach() if which == "param" else run.optimizer.state[param][which]

    clone = torch._lazy_clone(tensor())
    expected = tensor().clone()
    run.recover()
    assert torch.equal(clone, expected)


@pytest.mark.parametrize("which", ["param", "exp_avg"])
def test_a_step_on_a_copy_on_write_clone_does_not_change_its_original(which):
    run = Run()
    param = run.params[1]
    if which == "param":
        original = param.data
        param.data = torch._lazy_clone(original)
    else:
        original = run.optimizer.state[param][which]
        run.optimizer.state[param][which] = torch._lazy_clone(original)
    expected = original.clone()
    run.recover()
    assert torch.equal(original, expected)


# --- Views, gaps and overlaps ----------------------------------------------------------------------------------------

GUARD = 77.0


def views_of(name):
    """Params that are views of one buffer, the buffer, and a mask of what lies between and around them."""
    buffer = torch.full((8, 12), GUARD)
    views = {
        "interleaved": lambda: [buffer.view(-1)[2:80:2], buffer.view(-1)[3:81:2]],
        "columns": lambda: [buffer[:, 1:4], buffer[:, 4:7], buffer[:, 8:11]],
        "rows": lambda: [buffer[1:3], buffer[3:4], buffer[5:7]],
        "every_third": lambda: [buffer[:, 0::3], buffer[:, 1::3]],
        "blocks": lambda: [buffer[:4, :6], buffer[4:, 6:]],
        "transposed_blocks": lambda: [buffer[:4, :6].t(), buffer[4:, :6].t()],
        "diagonal": lambda: [buffer.diagonal(), buffer[4:, :3]],
        "one_element": lambda: [buffer[2, 3:4], buffer[2, 5]],
        "packed": lambda: [buffer.view(-1)[1:6], buffer.view(-1)[6:7], buffer.view(-1)[7:60]],
    }[name]()
    inside = torch.zeros(8, 12)
    for view in views:
        torch.as_strided(inside, view.shape, view.stride(), view.storage_offset()).fill_(1.0)
    return [torch.nn.Parameter(view) for view in views], buffer, inside.bool()


NAMES_OF_VIEWS = (
    "interleaved",
    "columns",
    "rows",
    "every_third",
    "blocks",
    "transposed_blocks",
    "diagonal",
    "one_element",
    "packed",
)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", NAMES_OF_VIEWS)
def test_views_that_do_not_overlap_get_the_right_numbers_and_nothing_else_is_written(name, amsgrad):
    params, buffer, inside = views_of(name)
    starts = []
    with torch.no_grad():
        for index, param in enumerate(params):
            param.copy_(random(param.shape, index))
            starts.append(param.detach().clone())
    grads = [[random(param.shape, 10 * step + index) for index, param in enumerate(params)] for step in range(3)]
    optimizer = AdamW(params, lr=0.1, amsgrad=amsgrad)
    check_against_textbook(params, starts, grads, optimizer, lr=0.1, amsgrad=amsgrad)
    assert (buffer[~inside] == GUARD).all(), "written outside the params"
    assert all(param.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for param in params)


def test_gradients_that_are_views_of_one_buffer():
    """DDP's gradient_as_bucket_view: gradients start at 4-byte-aligned addresses of one bucket."""
    params = make_params()
    starts = [param.detach().clone() for param in params]
    bucket = torch.full((1 + sum(param.numel() for param in params) + 1,), GUARD)
    views, offset = [], 1
    for param in params:
        views.append(bucket[offset : offset + param.numel()].view_as(param))
        offset += param.numel()
    with torch.no_grad():
        for index, view in enumerate(views):
            view.copy_(random(view.shape, index))
    check_against_textbook(params, starts, [views, views], AdamW(params, lr=0.1), lr=0.1)
    assert bucket[0] == bucket[-1] == GUARD


OVERLAPS = {
    "same_memory_twice": lambda b: [b[:20], b[:20]],
    "shifted": lambda b: [b[:20], b[10:30]],
    "one_element": lambda b: [b[:20], b[19:30]],
    "inside": lambda b: [b[:20], b[5:7]],
    "strided_on_dense": lambda b: [b[:20], b[1:40:2]],
    "strided_on_strided": lambda b: [b[0:40:2], b[0:40:4]],
    "transposed": lambda b: [b[:36].view(6, 6), b[:36].view(6, 6).t()],
    "row_and_column": lambda b: [b[:36].view(6, 6)[2], b[:36].view(6, 6)[:, 2]],
    "third_of_three": lambda b: [b[:10], b[20:30], b[29:40]],
    "other_dtype": lambda b: [b[:20], b.view(torch.float64)[2:5]],
}


@pytest.mark.parametrize("make", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_params_that_share_memory_are_refused(make):
    buffer = torch.arange(48.0)
    params = [torch.nn.Parameter(view) for view in make(buffer)]
    optimizer = AdamW([(f"p{index}", param) for index, param in enumerate(params)], lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"share memory.*'p\d'.*'p\d'"):
        optimizer.step()
    assert torch.equal(buffer, torch.arange(48.0))
    assert len(optimizer.state) == 0
    params[-1].grad = None
    optimizer.step()
    assert not torch.equal(buffer, torch.arange(48.0))


def test_params_that_come_to_share_memory_later_are_refused():
    run = Run()
    good = run.params[2].data
    run.params[2].data = torch.as_strided(run.params[1].data, (3,), (1,), 2)
    run.params[2].grad.data = torch.ones(3)
    run.refuse("'third'")
    run.params[2].data = run.params[1].data.view(-1)[:1].expand(70)
    run.params[2].grad.data = torch.ones(70)
    run.refuse("'third'")
    shared = torch.zeros(82)
    run.params[1].data, old = shared[:12].view(3, 4), run.params[1].data
    run.params[2].data = shared[11:81]
    run.refuse("share memory.*'second'.*'third'")
    run.params[1].data, run.params[2].data = old, good
    run.params[2].grad = torch.ones(70)
    run.recover()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1).expand(5),
        lambda: torch.ones(4).expand(3, 4),
        lambda: torch.ones(3, 1).expand(3, 4),
        lambda: torch.as_strided(torch.ones(9), (3, 3), (1, 1)),
        lambda: torch.as_strided(torch.ones(10), (4, 4), (2, 1)),
    ],
    ids=["scalar", "row", "column", "hankel", "windows"],
)
def test_a_param_that_overlaps_itself_is_refused(make):
    data = make()
    plain, param = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(data)
    optimizer = AdamW([("plain", plain), ("overlapping", param)], lr=0.1)
    plain.grad, param.grad = torch.ones(3), torch.ones(param.shape)
    with pytest.raises(RuntimeError, match=r"'overlapping'.*single memory location"):
        optimizer.step()
    assert torch.equal(plain, torch.ones(3))
    assert torch.equal(data, torch.ones(param.shape))
    assert len(optimizer.state) == 0


def test_the_same_param_twice_in_a_group_is_refused_by_the_step():
    """torch warns, and then updates it twice per step. Here the order of two updates would be a race: an error."""
    param = torch.nn.Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = AdamW([param, param], lr=0.1)
    param.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"share memory.*index 0.*index 1"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4))
    assert len(optimizer.state) == 0


def test_the_same_param_in_two_groups_is_refused_with_torchs_words():
    param = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        AdamW([{"params": [param]}, {"params": [param]}])


def test_a_group_added_after_steps_is_checked_like_the_first():
    run = Run()
    bad = torch.nn.Parameter(torch.ones(1).expand(5))
    bad.grad = torch.ones(5)
    run.optimizer.add_param_group({"params": [("fourth", bad)]})
    run.refuse(r"'fourth' \(group 2, index 0\) cannot be updated")
    run.optimizer.param_groups.pop()
    run.recover()
