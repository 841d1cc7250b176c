"""The functional TorchScript optimizer gives the bits of the class, and scripts never lose a step.

Called from Python a scripted class is a Python class: what matters in scripts is tested in scripts too.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adamw_ext
from adamw_ext.jit import FunctionalAdamW
from tests.helpers import assert_same_bits

# TorchScript's own deprecation, and no other warning.
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported):DeprecationWarning"),
]

ROOT = Path(__file__).parents[1]
SHAPES = [(5,), (3, 4), (), (70,)]
HYPER = {"lr": 0.1, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.2}
STATE_KEYS = ["step", "exp_avg", "exp_avg_sq"]


def random(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def make_params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.nn.Parameter(value) for value in random(dtype, 0)]


def gradients_of_step(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Some are missing at some steps, the first param's from the start and the last one's never."""
    missing = [{0, 1}, {0}, set(), {2}, {0, 1, 2}, {1}][step % 6]
    return [None if place in missing else grad for place, grad in enumerate(random(dtype, 1 + step))]


def step_class(optimizer: adamw_ext.AdamW, gradients: list[Tensor | None]) -> None:
    for param, grad in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        param.grad = None if grad is None else grad.clone()
    optimizer.step()


def assert_same_state(functional: dict[Tensor, dict[str, Tensor]], optimizer: adamw_ext.AdamW) -> None:
    expected = {param: state for param, state in optimizer.state.items() if state}
    assert len(functional) == len(expected)
    for (param, state), (twin, wanted) in zip(
        sorted(functional.items(), key=lambda item: item[0].shape),
        sorted(expected.items(), key=lambda item: item[0].shape),
        strict=True,
    ):
        assert state.keys() == wanted.keys()
        assert_same_bits([param, *(state[key] for key in state)], [twin, *(wanted[key] for key in state)])
        assert (state["step"].dtype, state["step"].shape, state["step"].device.type) == (torch.float32, (), "cpu")


# --- Scripts that hold the optimizer ---------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    """User code with an optimizer as attribute."""

    def __init__(self, optimizer: FunctionalAdamW) -> None:
        super().__init__()
        self.optimizer = optimizer

    def forward(self, gradients: list[Tensor | None]) -> None:
        self.optimizer.step(gradients)

    @torch.jit.export
    def step_one(self, param: Tensor, grad: Tensor | None) -> None:
        self.optimizer.step_param(param, grad)

    @torch.jit.export
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self.optimizer.state


@contextmanager
def executing(*, profiling: bool) -> Iterator[None]:
    """Scripts compiled and called within run in this one of TorchScript's executors."""
    before = torch._C._jit_set_profiling_executor(profiling), torch._C._jit_set_profiling_mode(profiling)
    try:
        yield
    finally:
        torch._C._jit_set_profiling_executor(before[0])
        torch._C._jit_set_profiling_mode(before[1])


IN_BOTH_EXECUTORS = pytest.mark.parametrize("profiling", [True, False], ids=["profiling", "legacy"])
CALLERS = pytest.mark.parametrize("caller", ["python", "script"])


def held(optimizer: FunctionalAdamW, caller: str) -> Holder:
    holder = Holder(optimizer)
    return torch.jit.script(holder) if caller == "script" else holder


@CALLERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
def test_it_gives_the_bits_of_the_class_with_gradients_missing_here_and_there(caller, dtype, amsgrad, maximize):
    flags = {"amsgrad": amsgrad, "maximize": maximize}
    params, twins = make_params(dtype), make_params(dtype)
    holder = held(FunctionalAdamW(params, **HYPER, **flags), caller)
    optimizer = adamw_ext.AdamW(twins, **HYPER, **flags)
    for step in range(7):
        gradients = gradients_of_step(step, dtype)
        holder(gradients)
        step_class(optimizer, gradients)
        assert_same_bits(params, twins, f"step {step}")
        assert_same_state(holder.state(), optimizer)
    for param, start in zip(params, random(dtype, 0), strict=True):
        assert not torch.equal(param, start)
    assert sorted(state["step"].item() for state in holder.state().values()) == [3, 3, 5, 7]


@CALLERS
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
def test_step_param_does_what_step_does(caller, amsgrad):
    params, twins = make_params(), make_params()
    whole = held(FunctionalAdamW(params, **HYPER, amsgrad=amsgrad), caller)
    single = held(FunctionalAdamW([], **HYPER, amsgrad=amsgrad, _allow_empty_param_list=True), caller)
    for step in range(6):
        gradients = gradients_of_step(step)
        whole(gradients)
        for twin, grad in zip(twins, gradients, strict=True):
            single.step_one(twin, grad)
        assert_same_bits(twins, params, f"step {step}")
    assert [len(state) for state in single.state().values()] == [3 + amsgrad] * 4
    assert not torch.equal(twins[0], random(torch.float32, 0)[0])


@CALLERS
def test_a_step_without_any_gradient_does_nothing(caller):
    params = make_params()
    holder = held(FunctionalAdamW(params, **HYPER), caller)
    holder([None] * 4)
    holder.step_one(params[0], None)
    assert_same_bits(params, random(torch.float32, 0))
    assert holder.state() == {}


@CALLERS
def test_non_contiguous_params_keep_their_layout_in_the_state(caller):
    param = torch.arange(12.0).view(3, 4).t()
    holder = held(FunctionalAdamW([param], **HYPER), caller)
    holder([torch.ones(4, 3)])
    assert holder.state()[param]["exp_avg"].stride() == param.stride() == (1, 4)


def test_changed_defaults_and_params_take_effect():
    params, twins = make_params(), make_params()
    functional = FunctionalAdamW(params[:1], **HYPER)
    optimizer = adamw_ext.AdamW(twins, **HYPER)
    functional.param_group["params"] = params
    functional.defaults["lr"] = optimizer.param_groups[0]["lr"] = 0.03
    functional.step(random(torch.float32, 1))
    step_class(optimizer, random(torch.float32, 1))
    assert_same_bits(params, twins)


def test_a_script_makes_an_optimizer_of_its_own():
    def train(param: Tensor, grads: list[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        optimizer = FunctionalAdamW([param], 0.1, (0.8, 0.7), 1e-3, 0.2, True)
        for grad in grads:
            gradients: list[Tensor | None] = [grad]
            optimizer.step(gradients)
        return optimizer.state

    param, twin = (torch.nn.Parameter(torch.arange(5.0)) for _ in range(2))
    grads = [torch.full((5,), float(step)) for step in range(4)]
    optimizer = adamw_ext.AdamW([twin], **HYPER, amsgrad=True)
    state = torch.jit.script(train)(param, grads)
    for grad in grads:
        step_class(optimizer, [grad])
    assert_same_bits([param], [twin])
    assert_same_state(state, optimizer)


def test_it_is_one_class_to_python_and_scripts():
    functional = FunctionalAdamW([torch.ones(2)], 0.5, (0.25, 0.5), 1e-4, 0.125, True, True, True, True)
    assert type(functional) is FunctionalAdamW
    assert functional.defaults == {"lr": 0.5, "beta1": 0.25, "beta2": 0.5, "eps": 1e-4, "weight_decay": 0.125}
    assert (functional.amsgrad, functional.maximize, functional.foreach, functional.fused) == (True,) * 4
    assert list(functional.param_group) == ["params"]
    assert functional.state == {}


def test_its_defaults_are_those_of_the_class():
    functional, optimizer = FunctionalAdamW([torch.ones(2)]), adamw_ext.AdamW([torch.ones(2)])
    beta1, beta2 = optimizer.defaults["betas"]
    expected = {"beta1": beta1, "beta2": beta2, **{key: optimizer.defaults[key] for key in ("lr", "eps")}}
    assert functional.defaults == {**expected, "weight_decay": optimizer.defaults["weight_decay"]}
    assert (functional.amsgrad, functional.maximize) == (False, False)


# --- Refusals --------------------------------------------------------------------------------------------------------


def torchs_functional(params: list[Tensor], **hyper: object) -> object:
    from torch.distributed.optim.functional_adamw import _FunctionalAdamW

    with pytest.warns(DeprecationWarning, match="support for functional optimizers is deprecated"):
        return _FunctionalAdamW(params, **hyper)


BAD_HYPER = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"lr": float("nan")}, "Invalid learning rate: nan"),
    ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
    ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.5)}, "Invalid beta parameter at index 1: -0.5"),
    ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
]


@pytest.mark.parametrize(("hyper", "message"), BAD_HYPER, ids=str)
def test_unusable_hyperparameters_are_refused_as_torch_refuses_them(hyper, message):
    for make in (FunctionalAdamW, torchs_functional):
        with pytest.raises(ValueError) as caught:
            make([torch.ones(2)], **hyper)
        assert str(caught.value) == message


def test_a_script_refuses_unusable_hyperparameters_with_the_same_text():
    def make(param: Tensor, lr: float) -> None:
        FunctionalAdamW([param], lr)

    with pytest.raises(torch.jit.Error, match="Invalid learning rate: -1"):
        torch.jit.script(make)(torch.ones(2), -1.0)


def test_an_empty_list_of_params_is_refused_unless_allowed():
    with pytest.raises(ValueError, match=r"^optimizer got an empty parameter list$"):
        FunctionalAdamW([])
    FunctionalAdamW([], _allow_empty_param_list=True).step([])


@CALLERS
@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_gradients_is_refused_as_torch_refuses_it(caller, count):
    params = make_params()
    gradients = [torch.ones(5)] * count
    holder = held(FunctionalAdamW(params, **HYPER), caller)
    with pytest.raises(ValueError) as theirs:
        torchs_functional(params).step(gradients)
    with pytest.raises(torch.jit.Error if caller == "script" else ValueError) as ours:
        holder(gradients)
    assert str(theirs.value) in str(ours.value)
    assert_same_bits(params, random(torch.float32, 0))


@CALLERS
@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
        (torch.ones(2, dtype=torch.bool), torch.ones(2)),
        (torch.ones(2), torch.ones(2, dtype=torch.int64)),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2).to_sparse()),
        (torch.ones(1).expand(2), torch.ones(2)),
    ],
    ids=["integer", "bool", "integer-grad", "shape", "sparse-grad", "expanded"],
)
def test_what_the_operator_refuses_leaves_params_and_state_as_they_were(caller, param, grad):
    good = torch.ones(3)
    holder = held(FunctionalAdamW([good, param], **HYPER), caller)
    before = param.clone()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"params\[1\]"):
            holder([torch.ones(3), grad])
        with pytest.raises(RuntimeError, match=r"params\[0\]"):
            holder.step_one(param, grad)
    assert torch.equal(good, torch.ones(3))
    assert torch.equal(param, before)
    assert holder.state() == {}


def test_the_same_param_twice_is_refused():
    param = torch.ones(3)
    functional = FunctionalAdamW([param, param], **HYPER)
    with pytest.raises(RuntimeError, match=r"params\[0\].*params\[1\]"):
        functional.step([torch.ones(3), torch.ones(3)])
    assert torch.equal(param, torch.ones(3))


@contextmanager
def ignoring_an_undefined_gradient() -> Iterator[None]:
    """TorchScript hands it on, or fails in its own alias analysis when it optimises for it."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"grads\[0\] is undefined|INTERNAL ASSERT FAILED .*alias_analysis", str(error)):
            raise
    assert torch.is_grad_enabled()


@IN_BOTH_EXECUTORS
def test_an_undefined_gradient_changes_nothing(profiling):
    """What a script sees in the ``grad`` of a param that has none: TorchScript takes it for None at times."""

    def step(param: Tensor, one_by_one: bool) -> int:
        optimizer = FunctionalAdamW([param], 0.1)
        gradients: list[Tensor | None] = [param.grad]
        if one_by_one:
            optimizer.step_param(param, param.grad)
        else:
            optimizer.step(gradients)
        return len(optimizer.state)

    param = torch.nn.Parameter(torch.ones(2))
    with executing(profiling=profiling):
        scripted = torch.jit.script(step)
        for call in range(6):
            with ignoring_an_undefined_gradient():
                assert scripted(param, call % 2 == 0) == 0
    assert torch.equal(param, torch.ones(2))


@IN_BOTH_EXECUTORS
@pytest.mark.parametrize(
    "place", ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps", "lr"]
)
def test_an_undefined_tensor_anywhere_in_a_scripted_call_is_an_error(place, profiling):
    arguments = {name: "[good.clone()]" for name in LISTS} | {"state_steps": "[torch.zeros([])]", "lr": "0.1"}
    arguments[place] = "good.grad" if place == "lr" else "[good.grad]"
    source = f"""
def step(good: Tensor) -> None:
    {call_of(arguments)}
"""
    with executing(profiling=profiling):
        unit = torch.jit.CompilationUnit(source)
        for _ in range(3):
            with pytest.raises(RuntimeError, match=place if place == "lr" else rf"{place}\[0\] is undefined"):
                unit.step(torch.ones(2))


# --- The operator in scripts: the call is never dropped --------------------------------------------------------------


LISTS = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]
SCALARS = {"beta1": 0.8, "beta2": 0.7, "weight_decay": 0.2, "eps": 1e-3, "amsgrad": True, "maximize": False}
OWN_LISTS = {
    "params": "[param]", "grads": "[grad]", "exp_avgs": "[exp_avg]", "exp_avg_sqs": "[exp_avg_sq]",
    "max_exp_avg_sqs": "[exp_avg_sq.clone()]", "state_steps": "[step]", "lr": "0.1",
}  # fmt: skip
BUILDS = {
    "literal": "    {name}_ = [{name}[0], {name}[1], {name}[2], {name}[3]]\n",
    "append": "    {name}_: List[Tensor] = []\n    for t in {name}:\n        {name}_.append(t)\n",
    "comprehension": "    {name}_ = [t for t in {name}]\n",
}


def call_of(arguments: dict[str, str]) -> str:
    """The operator's call in a script, with these expressions for the lists and lr."""
    lists = ", ".join(arguments[name] for name in LISTS)
    scalars = ", ".join(f"{name}={value}" for name, value in SCALARS.items())
    return f"torch.ops.adamw_ext.adamw_({lists}, lr={arguments['lr']}, {scalars})"


def step_source(built: list[str], build: str, lr_type: str) -> str:
    """A step whose lists in ``built`` are made inside; nothing but the call reads them, and nothing is returned."""
    signature = ", ".join(f"{name}: List[Tensor]" for name in LISTS)
    arguments = {name: f"{name}_" if name in built else name for name in LISTS}
    lines = "".join(BUILDS[build].format(name=name) for name in built)
    return f"def forward(self, {signature}, lr: {lr_type}) -> None:\n{lines}    {call_of({**arguments, 'lr': 'lr'})}\n"


def make_lists() -> dict[str, list[Tensor]]:
    values = [random(torch.float32, seed) for seed in range(2)]
    moments = [[torch.zeros(shape) for shape in SHAPES] for _ in range(3)]
    return dict(zip(LISTS, [*values, *moments, [torch.zeros(()) for _ in SHAPES]], strict=True))


WAYS = {
    "plain": lambda module: module,
    "frozen": torch.jit.freeze,
    "optimized": torch.jit.optimize_for_inference,
}


@IN_BOTH_EXECUTORS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float-lr", "tensor-lr"])
def test_a_script_keeps_the_call_whichever_list_is_made_inside(build, way, lr, profiling):
    expected = make_lists()
    with executing(profiling=profiling):
        steps = {}
        for built in [LISTS, *([name] for name in LISTS)]:
            module = torch.jit.script(type("Step", (torch.nn.Module,), {})())  # a type of its own, to define forward on
            module.define(step_source(built, build, "Tensor" if isinstance(lr, Tensor) else "float"))
            steps[", ".join(built)] = (WAYS[way](module.eval()), make_lists())
        for call in range(4):
            torch.ops.adamw_ext.adamw_(*expected.values(), lr=lr, **SCALARS)
            for built, (step, lists) in steps.items():
                step(*lists.values(), lr)
                for name in LISTS:
                    assert_same_bits(lists[name], expected[name], f"{name} after call {call} with {built} made inside")
    assert all(step.item() == 4 for step in expected["state_steps"])
    assert not torch.equal(expected["params"][0], make_lists()["params"][0])


class OwnTensors(torch.nn.Module):
    """A step of tensors that belong to the module, for freezing to take for constants."""

    def __init__(self) -> None:
        super().__init__()
        self.param = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("exp_avg", torch.zeros(3))
        self.register_buffer("exp_avg_sq", torch.zeros(3))
        self.step = torch.zeros(())

    def forward(self, grad: Tensor) -> None:
        with torch.no_grad():
            torch.ops.adamw_ext.adamw_(
                [self.param], [grad], [self.exp_avg], [self.exp_avg_sq], [], [self.step], lr=0.1, beta1=0.8, beta2=0.7,
                weight_decay=0.2, eps=1e-3, amsgrad=False, maximize=False,
            )  # fmt: skip


@IN_BOTH_EXECUTORS
@pytest.mark.parametrize("way", WAYS)
def test_a_script_updates_tensors_of_its_own_module(way, profiling):
    module, eager = OwnTensors().eval(), OwnTensors()
    with executing(profiling=profiling):
        scripted = WAYS[way](torch.jit.script(module))
        for call in range(4):
            for each in (scripted, eager):
                each(torch.full((3,), 1.0 + call))
            for ours, theirs in zip(
                (module.param, module.exp_avg, module.exp_avg_sq, module.step),
                (eager.param, eager.exp_avg, eager.exp_avg_sq, eager.step),
                strict=True,
            ):
                assert_same_bits([ours], [theirs], f"call {call}")
    assert module.step.item() == 4


@IN_BOTH_EXECUTORS
def test_a_script_that_makes_the_moments_keeps_them_apart(profiling):
    source = f"""
def step(param: Tensor, grad: Tensor) -> None:
    exp_avg = torch.zeros_like(param)
    exp_avg_sq = torch.zeros_like(param)
    {call_of(OWN_LISTS | {"state_steps": "[torch.zeros([])]"})}
"""
    param, twin = torch.ones(3), torch.ones(3)
    with executing(profiling=profiling):
        torch.jit.CompilationUnit(source).step(param, torch.ones(3))
    FunctionalAdamW([twin], **HYPER).step([torch.ones(3)])
    assert_same_bits([param], [twin])


@IN_BOTH_EXECUTORS
def test_a_script_reads_a_param_anew_after_the_operator(profiling):
    source = f"""
def step(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> Tensor:
    before = param * 2
    {call_of(OWN_LISTS)}
    return param * 2 - before
"""
    with executing(profiling=profiling):
        unit = torch.jit.CompilationUnit(source)
        assert (unit.step(torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())) != 0).all()


@IN_BOTH_EXECUTORS
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_script_reads_a_param_anew_after_a_step_of_the_optimizer(profiling, one_by_one):
    def change(param: Tensor, grad: Tensor, one_by_one: bool) -> Tensor:
        optimizer = FunctionalAdamW([param], 0.1, weight_decay=0.0)
        gradients: list[Tensor | None] = [grad]
        before = param * 2
        if one_by_one:
            optimizer.step_param(param, grad)
        else:
            optimizer.step(gradients)
        return param * 2 - before

    with executing(profiling=profiling):
        scripted = torch.jit.script(change)
        for _ in range(3):
            torch.testing.assert_close(scripted(torch.ones(3), torch.ones(3), one_by_one), torch.full((3,), -0.2))


@IN_BOTH_EXECUTORS
def test_a_step_in_a_script_leaves_requires_grad_as_it_was(profiling):
    params = [torch.nn.Parameter(torch.ones(3)), torch.ones(3)]
    with executing(profiling=profiling):
        held(FunctionalAdamW(params, **HYPER), "script")([torch.ones(3), torch.ones(3)])
    assert [param.requires_grad for param in params] == [True, False]


# --- Training in a script --------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 9)
        self.second = torch.nn.Linear(9, 2)
        self.unused = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        error = self.second(torch.relu(self.first(x))) - y
        return (error * error).sum()  # of operations that TorchScript differentiates as autograd does, to the bit


class GradTrainer(torch.nn.Module):
    """A training step with torch.autograd.grad, FunctionalAdamW, and a param that the loss does not see."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.optimizer = FunctionalAdamW(list(net.parameters()), 0.1, (0.8, 0.7), 1e-3, 0.2, True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.net(x, y)
        gradients = torch.autograd.grad([loss], self.optimizer.param_group["params"], allow_unused=True)
        self.optimizer.step(gradients)
        return loss


class BackwardTrainer(torch.nn.Module):
    """A training step with backward() and the operator, its lists made inside."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.params = [param for name, param in net.named_parameters() if name != "unused"]
        self.moments = [[torch.zeros_like(param) for param in self.params] for _ in range(3)]
        self.steps = [torch.zeros(()) for _ in self.params]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.net(x, y)
        loss.backward()
        grads: list[Tensor] = []
        for param in self.params:
            grads.append(param.grad)
        with torch.no_grad():
            torch.ops.adamw_ext.adamw_(
                [param for param in self.params],
                grads,
                [self.moments[0][i] for i in range(len(grads))],
                [self.moments[1][i] for i in range(len(grads))],
                [self.moments[2][i] for i in range(len(grads))],
                [step for step in self.steps],
                lr=0.1,
                beta1=0.8,
                beta2=0.7,
                weight_decay=0.2,
                eps=1e-3,
                amsgrad=True,
                maximize=False,
            )
            for grad in grads:
                grad.zero_()
        return loss


@IN_BOTH_EXECUTORS
@pytest.mark.parametrize("trainer", [GradTrainer, BackwardTrainer])
def test_training_in_a_script_gives_the_bits_of_the_python_loop(trainer, profiling, one_thread):
    net, twin = Net(), Net()
    optimizer = adamw_ext.AdamW(twin.parameters(), **HYPER, amsgrad=True)
    generator = torch.Generator().manual_seed(1)
    losses = []
    with executing(profiling=profiling):
        step = torch.jit.script(trainer(net))
        for number in range(12):
            x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)
            loss = step(x, y)
            optimizer.zero_grad()
            expected = twin(x, y)
            expected.backward()
            optimizer.step()
            assert_same_bits([loss, *net.parameters()], [expected, *twin.parameters()], f"step {number}")
            losses.append(loss.item())
    assert not torch.equal(net.first.weight, Net().first.weight)
    assert torch.equal(net.unused, torch.ones(2))


# --- Importing -------------------------------------------------------------------------------------------------------


def run_python(script: str, *options: str, **environment: str) -> None:
    answer = subprocess.run(
        [sys.executable, *options, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr


def test_the_package_alone_imports_nothing_of_torchscript_nor_warns():
    run_python(
        "import sys, torch; before = set(sys.modules); import adamw_ext; new = set(sys.modules) - before\n"
        "assert 'adamw_ext.jit' not in sys.modules\n"
        "assert not [name for name in new if name.startswith('torch.distributed')], new",
        "-W",
        "error",
    )


def test_the_module_imports_without_a_warning_and_leaves_the_filters_as_they_were():
    run_python(
        "import warnings, torch; before = list(warnings.filters)\n"
        "import adamw_ext.jit\n"
        "assert warnings.filters == before\n"
        "adamw_ext.jit.FunctionalAdamW([torch.ones(2)]).step([torch.ones(2)])",
        "-W",
        "error",
    )


def test_the_module_imports_where_torch_has_no_distributed_package():
    run_python(
        "import sys, torch; torch.distributed.is_available = lambda: False\n"
        "import adamw_ext.jit\n"
        "assert 'torch.distributed.optim' not in sys.modules\n"
        "adamw_ext.jit.FunctionalAdamW([torch.ones(2)]).step([torch.ones(2)])"
    )


def test_it_works_with_torchscript_switched_off():
    run_python(
        "import torch, adamw_ext.jit\n"
        "assert not torch.jit._state._enabled\n"
        "ours, theirs = torch.nn.Parameter(torch.arange(5.0)), torch.nn.Parameter(torch.arange(5.0))\n"
        "functional = adamw_ext.jit.FunctionalAdamW([ours], lr=0.1, amsgrad=True)\n"
        "optimizer = adamw_ext.AdamW([theirs], lr=0.1, amsgrad=True)\n"
        "for step in range(4):\n"
        "    theirs.grad = torch.full((5,), 1.0 + step)\n"
        "    optimizer.step()\n"
        "    functional.step([theirs.grad]) if step % 2 else functional.step_param(ours, theirs.grad)\n"
        "    assert torch.equal(ours, theirs) and ours[0] != 0\n"
        "from torch.distributed.optim import as_functional_optim\n"
        "assert type(as_functional_optim(adamw_ext.AdamW)) is adamw_ext.jit.FunctionalAdamW",
        PYTORCH_JIT="0",
    )
