"""Under torch.compile a step is one graph for good, with the bits, the state and the errors of the uncompiled step."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch.func import functional_call, grad_and_value
from torch.optim import lr_scheduler

from adamw_ext import AdamW
from tests.helpers import assert_same_bits, on_cpu

SHAPES = [(7,), (3, 5), (2, 3, 4), (), (130,), (0,)]
MODES = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {"amsgrad": True}),
    "bfloat16": (torch.bfloat16, {}),
    "complex": (torch.complex64, {}),
    "amsgrad-maximize": (torch.float32, {"amsgrad": True, "maximize": True}),
    "capturable": (torch.float32, {"capturable": True}),
    "float32-moments": (torch.bfloat16, {"moment_dtype": torch.float32}),
    "fp32-master": (torch.bfloat16, {"master_weights": "fp32"}),
    "fp16-master": (torch.float16, {"master_weights": "fp32", "moment_dtype": torch.float32}),
    "split-master": (torch.bfloat16, {"master_weights": "split"}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 5}),
    "split-stochastic-moments": (torch.bfloat16, {"master_weights": "split", "stochastic_rounding": True}),
    "max_grad_norm": (torch.float32, {"max_grad_norm": 0.5}),
    "split-max_grad_norm": (torch.bfloat16, {"master_weights": "split", "max_grad_norm": 0.5}),
}
ANY_MODE = pytest.mark.parametrize("mode", MODES)
BACKENDS = ["eager", "aot_eager"]
ANY_BACKEND = pytest.mark.parametrize("backend", [*BACKENDS, "inductor"])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Graphs of other tests neither serve here nor count against dynamo's limit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Graphs:
    """A backend that counts what it was given to compile."""

    def __init__(self, backend="eager"):
        self.count = 0
        self.operators = []
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.count += 1
        self.operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        return self._compile(graph, inputs)


def make_params(dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def make_pair(dtype=torch.float32, shapes=SHAPES, **options):
    """Two equal optimizers of two groups; the second is not compiled."""

    def make():
        params = make_params(dtype, shapes=shapes)
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1, "betas": (0.8, 0.95)}]
        return params, AdamW(groups, **{"lr": 0.1, **options})

    return *make(), *make()


def state_of(optimizer):
    return {(p, key): value for p, state in optimizer.state_dict()["state"].items() for key, value in state.items()}


def assert_same_optimizers(params, optimizer, twin_params, twin):
    assert_same_bits(params, twin_params, "params")
    ours, theirs = state_of(optimizer), state_of(twin)
    assert ours.keys() == theirs.keys()
    assert_same_bits(list(ours.values()), list(theirs.values()), "state")


def compiled(function, backend="eager", *, fullgraph=True):
    graphs = Graphs(backend)
    return torch.compile(function, backend=graphs, fullgraph=fullgraph), graphs


# --- The bits, and no second graph -----------------------------------------------------------------------------------


def check_mode(mode, backend):
    dtype, options = MODES[mode]
    params, optimizer, twin_params, twin = make_pair(dtype, **options)
    before = on_cpu(params)
    step, graphs = compiled(optimizer.step, backend)
    for i in range(6):
        for each in (optimizer, twin):
            each.param_groups[0].update(lr=0.1 / (i + 1), weight_decay=0.01 * i)
            each.param_groups[1].update(lr=0.02 * (i + 1), eps=1e-8 * (i + 1))
        set_grads(params, i)
        set_grads(twin_params, i)
        step()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)
        if "max_grad_norm" in options:
            assert torch.equal(optimizer.grad_norm, twin.grad_norm)
    assert graphs.count == 1
    assert graphs.operators.count(torch.ops.adamw_ext.compiled_step_.default) == 1
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True) if a.numel())
    assert all(state["step"] == 6 for state in optimizer.state.values())


@ANY_MODE
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_has_the_bits_of_an_uncompiled_one_and_one_graph_for_all_hyperparameters(mode, backend):
    check_mode(mode, backend)


@pytest.mark.parametrize("mode", ["float32", "split-stochastic-moments", "max_grad_norm"])
def test_a_step_compiled_by_inductor_has_the_same_bits(mode):
    check_mode(mode, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "complex"])
def test_a_step_compiled_by_inductor_has_the_same_bits_in_every_mode(mode):
    check_mode(mode, "inductor")


def test_inductor_raises_for_complex_params():
    """It compiles no operator that writes to a complex tensor (torch 2.13)."""
    params, optimizer, _, _ = make_pair(torch.complex64)
    set_grads(params, 0)
    before = on_cpu(params)
    with pytest.raises(torch._inductor.exc.InductorError):
        compiled(optimizer.step, "inductor")[0]()
    assert_same_bits(params, before)
    assert not optimizer.state


def test_a_tensor_lr_is_read_at_every_step():
    params, optimizer, twin_params, twin = make_pair(lr=torch.tensor(0.1))
    step, graphs = compiled(optimizer.step)
    for i in range(4):
        for each in (optimizer, twin):
            for group in each.param_groups:
                group["lr"].fill_(0.1 / (i + 1))
        set_grads(params, i)
        set_grads(twin_params, i)
        step()
        twin.step()
    assert_same_optimizers(params, optimizer, twin_params, twin)
    assert graphs.count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_may_come_and_go(backend):
    params, optimizer, twin_params, twin = make_pair(max_grad_norm=1.0)
    step, graphs = compiled(optimizer.step, backend)
    for i in range(12):
        set_grads(params, i)
        set_grads(twin_params, i)
        absent = [(), (1, 2), range(len(params)), (0,)][i % 4]
        for number in absent:
            params[number].grad = twin_params[number].grad = None
        step()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)
        assert torch.equal(optimizer.grad_norm, twin.grad_norm)
    assert graphs.count == 4  # one for each set of params that has gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_layout_may_come_later(backend):
    params, optimizer, twin_params, twin = make_pair()
    step, _ = compiled(optimizer.step, backend)
    for i in range(3):
        for each in (params, twin_params):
            set_grads(each, i)
            if i == 1:
                each[1].grad = each[1].grad.t().contiguous().t()
                each[2].grad = torch.ones(()).expand_as(each[2])
        step()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)


def test_gradients_of_another_dtype_break_the_graph():
    """Dynamo refuses them (``fullgraph`` raises), and the step runs outside."""
    params, optimizer, twin_params, twin = make_pair()
    step, _ = compiled(optimizer.step, fullgraph=False)
    for i in range(4):
        for each in (params, twin_params):
            set_grads(each, i)
            if i % 2 == 1:
                each[0].grad = None
                each[0].grad_dtype = None
                each[0].grad = torch.ones(7, dtype=torch.bfloat16)
        step()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_params_and_gradients_of_any_layout_and_views_of_one_buffer(backend):
    def make():
        buffer = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
        views = [buffer[0], buffer[1, ::2], buffer[2].view(6, 10).t(), buffer[3, :10]]
        params = [torch.nn.Parameter(view) for view in views]
        grads = torch.randn(4, 60, generator=torch.Generator().manual_seed(2))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad[: param.numel()].view(param.shape)  # as gradient_as_bucket_view has them
        return buffer, params, AdamW(params, lr=0.1, amsgrad=True)

    (buffer, params, optimizer), (twin_buffer, twin_params, twin) = make(), make()
    step, _ = compiled(optimizer.step, backend)
    for _ in range(3):
        step()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)
        assert_same_bits([buffer], [twin_buffer])


@ANY_BACKEND
def test_the_version_of_every_param_is_bumped(backend):
    params, optimizer, _, _ = make_pair()
    step, _ = compiled(optimizer.step, backend)
    for i in range(2):
        set_grads(params, i)
        before = [param._version for param in params]
        step()
        assert all(param._version > version for param, version in zip(params, before, strict=True))


def test_several_optimizers_each_step_their_own_params():
    pairs = [make_pair(lr=0.1 * (n + 1), shapes=[(3,), (4,), (5,)]) for n in range(3)]
    steps = [compiled(pair[1].step)[0] for pair in pairs]
    for i in range(3):
        for (params, _, twin_params, twin), step in zip(pairs, steps, strict=True):
            set_grads(params, i)
            set_grads(twin_params, i)
            step()
            twin.step()
    for pair in pairs:
        assert_same_optimizers(*pair)


def test_two_optimizers_in_one_graph():
    params, optimizer, twin_params, twin = make_pair()
    others = make_pair(dtype=torch.bfloat16, stochastic_rounding=True)

    def both():
        optimizer.step()
        others[1].step()

    step, graphs = compiled(both, "aot_eager")
    for i in range(3):
        for each in (params, twin_params, others[0], others[2]):
            set_grads(each, i)
        step()
        twin.step()
        others[3].step()
    assert_same_optimizers(params, optimizer, twin_params, twin)
    assert_same_optimizers(*others)
    assert graphs.count == 1


def test_compiled_and_uncompiled_steps_may_alternate():
    params, optimizer, twin_params, twin = make_pair(torch.bfloat16, master_weights="split", max_grad_norm=1.0)
    steps = [compiled(optimizer.step, backend)[0] for backend in BACKENDS]
    for i in range(6):
        set_grads(params, i)
        set_grads(twin_params, i)
        (optimizer.step if i % 3 == 2 else steps[i % 3])()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)


# --- Whole training steps --------------------------------------------------------------------------------------------


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)


def loss_of(values, model, x, y):
    return (functional_call(model, values, (x,)) - y).square().mean()


def train_by_func(model, optimizer, x, y):
    params = dict(model.named_parameters())
    grads, loss = grad_and_value(loss_of)(params, model, x, y)
    for name, param in params.items():
        param.grad = grads[name]
    optimizer.step()
    return loss


def train_by_autograd(model, optimizer, x, y):
    params = list(model.parameters())
    loss = (model(x) - y).square().mean()
    for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        param.grad = grad
    optimizer.step()
    return loss.detach()


@ANY_BACKEND
@pytest.mark.parametrize("train", [train_by_func, train_by_autograd])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_whole_training_step_is_one_graph(train, backend):
    """The twin is given the gradients of the graph: a compiler may round those otherwise, but not the step."""
    model, twin_model = make_model(), make_model()
    optimizer, twin = (AdamW(m.parameters(), lr=0.1, max_grad_norm=1.0) for m in (model, twin_model))
    step, graphs = compiled(train, backend)
    losses = []
    for i in range(8):
        x, y = make_batch(0)
        for each in (optimizer, twin):
            each.param_groups[0]["lr"] = 0.1 / (i + 1)
        losses.append(step(model, optimizer, x, y).item())
        for param, other in zip(model.parameters(), twin_model.parameters(), strict=True):
            other.grad = param.grad.clone()
        twin.step()
        assert_same_optimizers(list(model.parameters()), optimizer, list(twin_model.parameters()), twin)
    assert graphs.count == 1
    assert losses == sorted(losses, reverse=True)


def test_a_backward_in_the_training_step_breaks_the_graph_and_nothing_else():
    def train(model, optimizer, x, y):
        (model(x) - y).square().mean().backward()
        optimizer.step()

    model, twin_model = make_model(), make_model()
    optimizer, twin = (AdamW(m.parameters(), lr=0.1) for m in (model, twin_model))
    step, graphs = compiled(train, fullgraph=False)
    for i in range(5):
        for each in (optimizer, twin):
            each.zero_grad()
            each.param_groups[0]["lr"] = 0.1 / (i + 1)
        step(model, optimizer, *make_batch(i))
        train(twin_model, twin, *make_batch(i))
    assert_same_optimizers(list(model.parameters()), optimizer, list(twin_model.parameters()), twin)
    assert graphs.count == 2  # forward; update
    assert graphs.operators.count(torch.ops.adamw_ext.compiled_step_.default) == 1


@ANY_BACKEND
def test_a_graph_that_computes_gradients_may_call_the_functional_operator(backend):
    def update(params, states, x, y, lr):
        values = dict(zip(names, params, strict=True))
        grads, loss = grad_and_value(loss_of)(values, model, x, y)
        grads = list(grads.values())
        torch.ops.adamw_ext.adamw_.tensor_lr(
            params, grads, *states, lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        return loss, grads

    model, twin_model = make_model(), make_model()
    names = [name for name, _ in model.named_parameters()]
    params = [param.detach() for param in model.parameters()]
    states = [[torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params], []]
    states.append([torch.zeros(()) for _ in params])
    twin = AdamW(twin_model.parameters(), lr=torch.tensor(0.1))
    step, graphs = compiled(update, backend)
    for i in range(4):
        lr = torch.tensor(0.1 / (i + 1))
        _, grads = step(params, states, *make_batch(i), lr)
        for param, grad in zip(twin_model.parameters(), grads, strict=True):
            param.grad = grad.clone()
        twin.param_groups[0]["lr"].copy_(lr)
        twin.step()
        assert_same_bits(params, list(twin_model.parameters()))
    assert graphs.count == 1


@ANY_BACKEND
def test_a_graph_reads_the_old_values_before_the_step_and_the_new_ones_after_it(backend):
    options = {"master_weights": "fp32", "stochastic_rounding": True, "shapes": [(7,), (3, 5), (2, 3, 4), (1,)]}
    params, optimizer, twin_params, twin = make_pair(torch.bfloat16, **options)

    def update():
        before = [param * 2 for param in params]
        optimizer.step()
        between = [param + param.grad for param in params]
        optimizer.step()
        return before, between, [param * 2 for param in params]

    step, graphs = compiled(update, backend)
    with torch.no_grad():
        for i in range(3):
            set_grads(params, i)
            set_grads(twin_params, i)
            expected = [[param * 2 for param in twin_params]]
            twin.step()
            expected.append([param + param.grad for param in twin_params])
            twin.step()
            expected.append([param * 2 for param in twin_params])
            for actual, wanted in zip(step(), expected, strict=True):
                assert_same_bits(actual, wanted)
            assert not torch.equal(expected[0][0], expected[2][0])
            assert_same_optimizers(params, optimizer, twin_params, twin)
    assert graphs.count == 1


@ANY_BACKEND
def test_a_0_d_value_of_a_0_d_param_that_is_returned_is_the_old_one(backend):
    param = torch.nn.Parameter(torch.ones(()))
    optimizer = AdamW([param], lr=0.1)

    def update():
        before = param * 2
        optimizer.step()
        return before

    param.grad = torch.ones(())
    assert compiled(update, backend)[0]() == 2.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_are_made_of_the_values_that_the_graph_has_by_then(backend):
    params, optimizer, twin_params, twin = make_pair(torch.bfloat16, master_weights="fp32")

    def update(params, optimizer):
        for param in params:
            param.mul_(3)
        optimizer.step()

    step, _ = compiled(update, backend)
    for i in range(2):
        set_grads(params, i)
        set_grads(twin_params, i)
        with torch.no_grad():
            step(params, optimizer)
            update(twin_params, twin)
        assert_same_optimizers(params, optimizer, twin_params, twin)


# --- What surrounds a step -------------------------------------------------------------------------------------------


def test_step_hooks_are_called_also_those_registered_or_removed_later():
    params, optimizer, twin_params, twin = make_pair()
    calls = torch.zeros(2)

    def before(*_):
        calls[0].add_(1)

    def after(*_):
        calls[1].add_(1)

    optimizer.register_step_pre_hook(before)
    step, graphs = compiled(optimizer.step)

    def run(count):
        for i in range(count):
            set_grads(params, i)
            set_grads(twin_params, i)
            step()
            twin.step()

    run(2)
    handle = optimizer.register_step_post_hook(after)
    run(2)
    handle.remove()
    run(1)
    assert calls.tolist() == [5, 2]
    assert graphs.count == 2
    assert_same_optimizers(params, optimizer, twin_params, twin)


def test_a_closure_is_part_of_the_graph_or_breaks_it_where_it_calls_backward():
    params, optimizer, twin_params, twin = make_pair()

    def closure_over(params, *, backward):
        def closure():
            loss = sum(param.square().sum() for param in params)
            if backward:
                for param in params:
                    param.grad = None
                loss.backward()
            return loss

        return closure

    whole, graphs = compiled(optimizer.step)
    broken, _ = compiled(optimizer.step, fullgraph=False)
    for i in range(4):
        for each in (optimizer, twin):
            each.param_groups[0]["lr"] = 0.1 / (i + 1)
        set_grads(params, i)
        set_grads(twin_params, i)
        backward = i % 2 == 1
        loss = (broken if backward else whole)(closure_over(params, backward=backward))
        assert torch.equal(loss, twin.step(closure_over(twin_params, backward=backward)))
        assert_same_optimizers(params, optimizer, twin_params, twin)
    assert graphs.count == 1


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("order", ["scheduler first", "class function", "compiled first"])
def test_schedulers_cost_no_further_graph(order):
    """A scheduler wraps ``opt.step`` in a function that dynamo does not enter: with ``fullgraph`` call the class's."""
    params, optimizer, twin_params, twin = make_pair()
    step, graphs = compiled(lambda: AdamW.step(optimizer))
    if order == "compiled first":
        step, graphs = compiled(optimizer.step)
    schedulers = [lr_scheduler.CosineAnnealingLR(each, 10) for each in (optimizer, twin)]
    if order == "scheduler first":
        step, graphs = compiled(optimizer.step, fullgraph=False)
    for i in range(5):
        set_grads(params, i)
        set_grads(twin_params, i)
        step()
        twin.step()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0.06
    assert_same_optimizers(params, optimizer, twin_params, twin)
    assert graphs.count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grad_scaler_scales_and_skips_as_without_compilation(backend):
    params, optimizer, twin_params, twin = make_pair(fused=True, max_grad_norm=1.0)
    step, graphs = compiled(optimizer.step, backend)
    optimizer.step = step
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for i in range(5):
        for each, stepped, scaler in ((params, optimizer, scalers[0]), (twin_params, twin, scalers[1])):
            set_grads(each, i)
            factor = scaler.scale(torch.ones(()))
            with torch.no_grad():
                for param in each:
                    param.grad.mul_(factor)
            if i in (1, 3):
                each[4].grad[3] = float("inf")
            scaler.step(stepped)
            scaler.update()
        assert_same_optimizers(params, optimizer, twin_params, twin)
        assert_same_bits([param.grad for param in params], [param.grad for param in twin_params], "gradients")
        assert torch.equal(optimizer.grad_norm, twin.grad_norm)
    assert optimizer.skipped_steps == twin.skipped_steps == 2
    assert params[0].grad.abs().max() < 10  # written back unscaled
    assert scalers[0].get_scale() == scalers[1].get_scale() == 256.0
    assert graphs.count == 1
    assert graphs.operators.count(torch.ops.adamw_ext.compiled_step_.unscaling) == 1


def test_it_works_where_torchs_own_step_does():
    """torch's step breaks the graph on purpose, so that with ``fullgraph`` only the function inside it compiles."""
    theirs_params, ours_params = make_params(), make_params()
    theirs, ours = torch.optim.AdamW(theirs_params, lr=0.1), AdamW(ours_params, lr=0.1)
    inner = type(theirs).step.__wrapped__.__wrapped__
    for their_step, our_step in (
        (lambda: inner(theirs), lambda: type(ours).step.__wrapped__(ours)),
        (lambda: inner(theirs), ours.step),
    ):
        their_compiled, our_compiled = compiled(their_step)[0], compiled(our_step)[0]
        for i in range(3):
            set_grads(theirs_params, i)
            set_grads(ours_params, i)
            with torch.no_grad():
                their_compiled()
            our_compiled()
            for a, b in zip(ours_params, theirs_params, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- The optimizer changes between steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_that_is_added_later_is_updated(backend):
    params, optimizer, twin_params, twin = make_pair()
    step, _ = compiled(optimizer.step, backend)
    for i in range(4):
        if i == 2:
            for each, stepped in ((params, optimizer), (twin_params, twin)):
                each.extend(make_params(seed=9, shapes=[(11,), (2, 2)]))
                stepped.add_param_group({"params": each[-2:], "lr": 0.5})
        set_grads(params, i)
        set_grads(twin_params, i)
        step()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loaded_state_dict_is_what_later_steps_start_from(backend):
    params, optimizer, twin_params, twin = make_pair(torch.bfloat16, master_weights="split")
    _, other, _, _ = make_pair(torch.bfloat16, master_weights="fp32", lr=0.7)
    set_grads(other.param_groups[0]["params"] + other.param_groups[1]["params"], 5)
    other.step()
    step, graphs = compiled(optimizer.step, backend)
    for i in range(4):
        if i == 2:
            optimizer.load_state_dict(other.state_dict())
            twin.load_state_dict(other.state_dict())
        set_grads(params, i)
        set_grads(twin_params, i)
        step()
        twin.step()
        assert_same_optimizers(params, optimizer, twin_params, twin)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert graphs.count == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_steps_its_own_params(clone):
    params, optimizer, twin_params, twin = make_pair()
    step, _ = compiled(optimizer.step)
    set_grads(params, 0)
    step()
    other = clone(optimizer)
    other_params = [param for group in other.param_groups for param in group["params"]]
    other_step, _ = compiled(other.step)
    set_grads(other_params, 1)
    other_step()
    for i in range(2):
        set_grads(twin_params, i)
        twin.step()
    assert_same_optimizers(other_params, other, twin_params, twin)
    assert all(state["step"] == 1 for state in optimizer.state.values())
    assert not torch.equal(params[0], other_params[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_neither_an_optimizer_nor_its_params_are_kept_alive(backend):
    params, optimizer, _, _ = make_pair()
    step, _ = compiled(optimizer.step, backend)
    set_grads(params, 0)
    step()
    watched = [weakref.ref(optimizer), *map(weakref.ref, params)]
    del params, optimizer, step, _
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_the_step_of_an_optimizer_that_is_gone_is_refused():
    params = make_params()
    with pytest.raises(RuntimeError, match="no longer exists"):
        torch.ops.adamw_ext.compiled_step_(params, [], None, [], "no number.0")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edit", ["exchange", "append", "remove", "new groups"])
def test_params_that_were_exchanged_by_hand_are_refused_once_and_then_updated(backend, edit):
    params, optimizer, twin_params, twin = make_pair()
    step, _ = compiled(optimizer.step, backend)
    for i in range(3):
        if i == 1:
            for each, stepped in ((params, optimizer), (twin_params, twin)):
                group = stepped.param_groups[0]
                if edit == "exchange":
                    each[0] = group["params"][0] = torch.nn.Parameter(torch.ones(7))
                elif edit == "append":
                    each.append(torch.nn.Parameter(torch.ones(7)))
                    group["params"].append(each[-1])
                elif edit == "remove":
                    del group["params"][0], each[0]
                else:
                    each[0] = torch.nn.Parameter(torch.ones(7))
                    stepped.param_groups = [dict(group) for group in stepped.param_groups]
                    stepped.param_groups[0]["params"] = each[:2]
            set_grads(params, i)
            before = on_cpu(params), copy.deepcopy(list(optimizer.state.values()))
            with pytest.raises(RuntimeError, match="exchanged since this step was compiled"):
                step()
            assert_same_bits(params, before[0])
            for state, old in zip(optimizer.state.values(), before[1], strict=True):
                assert_same_bits(list(state.values()), list(old.values()))
        set_grads(params, i)
        set_grads(twin_params, i)
        step()
        twin.step()
        assert_same_bits(params, twin_params)


@ANY_BACKEND
def test_a_graph_does_not_take_a_modules_new_param_for_the_optimizers(backend):
    """Dynamo knows the tensor as the module's attribute, and installs no guard that the optimizer's is the same."""
    model = torch.nn.Linear(3, 3)
    weight = model.weight
    optimizer = AdamW(model.parameters(), lr=0.1)

    def update():
        doubled = model.weight * 2
        optimizer.step()
        return doubled

    step, _ = compiled(update, backend)
    set_grads(model.parameters(), 0)
    step()
    model.weight = torch.nn.Parameter(torch.ones(3, 3))
    model.weight.grad = torch.ones(3, 3)
    before = weight.detach().clone()
    step()
    assert torch.equal(model.weight, torch.ones(3, 3))
    assert not torch.equal(weight, before)


# --- What a graph cannot hold, and refusals --------------------------------------------------------------------------


def test_differentiable_groups_break_the_graph_and_are_updated_by_torch():
    def run(wrap):
        params = [param.detach() for param in make_params(torch.float64)]
        optimizer = AdamW(params, lr=0.1, differentiable=True)
        step = wrap(optimizer.step)
        with torch.no_grad():
            for i in range(3):
                set_grads(params, i)
                step()
        return params

    assert_same_bits(run(lambda step: compiled(step, fullgraph=False)[0]), run(lambda step: step))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="are left to torch"):
        run(lambda step: compiled(step)[0])


def test_a_group_that_becomes_differentiable_is_refused_once():
    params, optimizer, twin_params, twin = make_pair(torch.float64)
    step, _ = compiled(optimizer.step, fullgraph=False)
    with torch.no_grad():
        for i in range(3):
            for each in (params, twin_params):
                set_grads(each, i)
                for param in each:
                    param.requires_grad_(False)  # torch's differentiable step wants no leaves
            if i == 1:
                for each in (optimizer, twin):
                    each.param_groups[1]["differentiable"] = True
                before = on_cpu(params), state_of(optimizer)
                with pytest.raises(RuntimeError, match="was left to torch after this step was compiled: call it again"):
                    step()
                assert_same_bits(params, before[0])
                assert_same_bits(list(state_of(optimizer).values()), list(before[1].values()))
            step()
            twin.step()
    assert_same_optimizers(params, optimizer, twin_params, twin)


def spoil_lr(params, optimizer):
    optimizer.param_groups[1]["lr"] = -1.0
    return ValueError, "Invalid learning rate: -1 in param group 1"


def spoil_beta(params, optimizer):
    optimizer.param_groups[0]["betas"] = (0.9, float("nan"))
    return ValueError, "Invalid beta parameter at index 1: nan in param group 0"


def spoil_type(params, optimizer):
    optimizer.param_groups[0]["eps"] = "small"
    return TypeError, "param group 0: eps must be a number"


def spoil_shape(params, optimizer):
    params[1].data = torch.ones(5, 3)
    optimizer.state.clear()
    words = r"the gradient of param \(group 0, index 1\) must have .* but has"
    return RuntimeError, f"{words}|attempting to assign a gradient of size"  # dynamo makes a copy of both, and fails


def spoil_state(params, optimizer):
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(2)
    return RuntimeError, r"'exp_avg' of param \(group 0, index 1\) must have sizes"


def spoil_step(params, optimizer):
    optimizer.state[params[4]]["step"].fill_(0.5)
    return RuntimeError, "must be a whole number of updates, but is 0.5"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil", [spoil_lr, spoil_beta, spoil_type, spoil_shape, spoil_state, spoil_step])
def test_a_refused_step_raises_as_without_compilation_and_changes_nothing(backend, spoil):
    params, optimizer, _, _ = make_pair()
    step, _ = compiled(optimizer.step, backend)
    set_grads(params, 0)
    step()
    error, message = spoil(params, optimizer)
    before = on_cpu(params), {key: value.clone() for key, value in state_of(optimizer).items()}
    for refused in (step, optimizer.step):
        with pytest.raises(error, match=message):
            refused()
    assert_same_bits(params, before[0])
    assert_same_bits(list(state_of(optimizer).values()), list(before[1].values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_first_step_leaves_no_state(backend):
    params, optimizer, twin_params, twin = make_pair()
    step, _ = compiled(optimizer.step, backend)
    set_grads(params, 0)
    set_grads(twin_params, 0)
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        step()
    assert not optimizer.state
    optimizer.param_groups[1]["lr"] = 0.1
    step()
    twin.step()
    assert_same_optimizers(params, optimizer, twin_params, twin)


def test_bad_hyperparameters_are_refused_also_where_no_param_has_a_gradient():
    _, optimizer, _, _ = make_pair()
    for backend in BACKENDS:
        step, _ = compiled(optimizer.step, backend)
        optimizer.param_groups[0]["lr"] = 0.1
        step()
        optimizer.param_groups[0]["lr"] = -2.0
        with pytest.raises(ValueError, match="Invalid learning rate: -2"):
            step()


# --- The operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", ["default", "unscaling"])
def test_the_operator_passes_opcheck(overload):
    """All but the comparison of two runs: a second step of one optimizer is not the first."""
    params, optimizer, _, _ = make_pair(shapes=[(3,), (2, 2), (5,)])
    set_grads(params, 0)
    compiled(optimizer.step)[0]()  # imports the operator and lets it know the params
    grads = [param.grad for param in params]
    scale = [torch.tensor(2.0)] if overload == "unscaling" else []
    arguments = [param.detach() for param in params], grads, *scale, None, [0, 1, 2], optimizer._trace
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(getattr(torch.ops.adamw_ext.compiled_step_, overload), arguments, test_utils=tests)


def test_cuda_graphs_of_inductor_leave_the_operator_out():
    _, optimizer, _, _ = make_pair()
    compiled(optimizer.step)[0]()
    for overload in ("default", "unscaling"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.adamw_ext.compiled_step_, overload).tags


def test_importing_the_package_loads_no_compiler():
    program = "import sys, adamw_ext; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
