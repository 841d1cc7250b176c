"""The right device, the right stream, and several of each."""

import re

import pytest
import torch
from torch import Tensor

import adamw_ext
from adamw_ext import functional
from tests.helpers import DEVICES, MODES, assert_same_bits, on_cpu, on_stream

pytestmark = pytest.mark.usefixtures("one_thread")

HYPER = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
SIZES = (3, 0, 200, 64, 1001)
STEPS = 4
BUSY = 20_000_000  # clock cycles of torch.cuda._sleep, about 10 ms


@pytest.fixture
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, but there is {torch.cuda.device_count()}")


def numbers(i: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(i))


class Model:
    """Params on these devices by turns, with a gradient for each step, and one step more."""

    def __init__(self, devices: list[str], **flags: object) -> None:
        self.devices = [devices[i % len(devices)] for i in range(len(SIZES))]
        places = [*enumerate(zip(SIZES, self.devices, strict=True))]
        self.params = [torch.nn.Parameter(numbers(i, size).to(device)) for i, (size, device) in places]
        self.grads = [
            [numbers(100 * (step + 1) + i, size).to(device) for i, (size, device) in places]
            for step in range(STEPS + 1)
        ]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "weight_decay": 0.3}]
        self.optimizer = adamw_ext.AdamW(groups, **{**HYPER, **flags})

    def step(self, step: int) -> None:
        for param, grad in zip(self.params, self.grads[step], strict=True):
            param.grad = grad
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = 0.1 / (1 + step + index)
        self.optimizer.step()

    def train(self) -> "Model":
        for step in range(STEPS):
            self.step(step)
        return self

    @property
    def results(self) -> list[Tensor]:
        states = [self.optimizer.state[param] for param in self.params]
        return on_cpu([*self.params, *(state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step"))])


# --- Streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_for_the_gradients_of_its_own_stream(device: str, mode: str) -> None:
    """The stream is busy when the step is queued; a kernel on another one would read what was there before."""
    stream = torch.cuda.Stream() if device == "cuda" else None
    model = Model([device], **MODES[mode])
    model.optimizer.init_state()
    for param in model.params:
        param.grad = torch.full_like(param, 1e3)
    for step in range(STEPS):
        for index, group in enumerate(model.optimizer.param_groups):
            group["lr"] = 0.1 / (1 + step + index)
        with on_stream(stream):
            if device == "cuda":
                torch.cuda._sleep(BUSY)
            for param, grad in zip(model.params, model.grads[step], strict=True):
                param.grad.copy_(grad)
            model.optimizer.step()
            for param in model.params:
                param.grad.fill_(1e3)
    assert_same_bits(model.results, Model(["cpu"]).train().results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_an_optimizer_may_move_from_stream_to_stream(device: str, mode: str) -> None:
    """The first step, which creates the state, is on a side stream too."""
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in range(2)] + [None]
    model = Model([device], **MODES[mode])
    for step in range(STEPS):
        with on_stream(streams[step % len(streams)]):
            if device == "cuda":
                torch.cuda._sleep(BUSY // 4)
            model.step(step)
    assert_same_bits(model.results, Model(["cpu"]).train().results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_optimizers_on_streams_of_their_own_do_not_disturb_each_other(device: str, mode: str) -> None:
    """Their steps wait on the device side by side."""
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in range(3)]
    models = [Model([device], lr=0.1, **MODES[mode]) for _ in streams]
    if device == "cuda":
        torch.cuda.synchronize()
    for step in range(STEPS):
        for model, stream in zip(models, streams, strict=True):
            with torch.cuda.stream(stream) if stream is not None else on_stream(None):
                if device == "cuda":
                    torch.cuda._sleep(BUSY // 4)
                model.step(step)
    if device == "cuda":
        torch.cuda.synchronize()
    expected = Model(["cpu"]).train().results
    for model in models:
        assert_same_bits(model.results, expected)


# --- Several devices in one optimizer --------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("devices", [["cpu", "cuda"], ["cuda", "cpu"]], ids=str)
def test_cpu_and_cuda_params_share_an_optimizer(devices: list[str], mode: str) -> None:
    model = Model(devices, **MODES[mode]).train()
    assert_same_bits(model.results, Model(["cpu"]).train().results)
    assert [param.device.type for param in model.params] == model.devices


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("found_inf_device", ["cpu", "cuda"])
def test_an_overflow_skips_cpu_and_cuda_params_alike(found_inf_device: str, mode: str) -> None:
    """With found_inf = 2.0, on either device."""
    model = Model(["cpu", "cuda"], **MODES[mode]).train()
    before = model.results
    model.optimizer.found_inf = torch.tensor(2.0, device=found_inf_device)
    model.step(STEPS)
    assert_same_bits(model.results, before)
    model.optimizer.found_inf.fill_(0.0)
    model.step(STEPS)
    assert not torch.equal(model.results[0], before[0])
    assert [state["step"].item() for state in model.optimizer.state.values()] == [STEPS + 1] * len(SIZES)


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_params_on_several_gpus_share_an_optimizer(mode: str, current: int) -> None:
    """Whichever device is current, and it stays current."""
    with torch.cuda.device(current):
        model = Model(["cuda:1", "cuda:0"], **MODES[mode]).train()
        assert torch.cuda.current_device() == current
    assert_same_bits(model.results, Model(["cpu"]).train().results)
    assert [str(param.device) for param in model.params] == model.devices


@pytest.mark.cuda
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_that_is_not_current_is_stepped_on_its_own_stream(mode: str) -> None:
    model = Model(["cuda:1"], **MODES[mode])
    with torch.cuda.device(0):
        model.train()
    assert_same_bits(model.results, Model(["cpu"]).train().results)


# --- The wrong device ------------------------------------------------------------------------------------------------

# Where the params are, and where the tensor at fault is.
WRONG = [
    ("cpu", "meta"),
    pytest.param("cuda", "cpu", marks=pytest.mark.cuda),
    pytest.param("cpu", "cuda", marks=pytest.mark.cuda),
    pytest.param("cuda", "meta", marks=pytest.mark.cuda),
]


def everything(model: Model) -> list[Tensor]:
    """Values that a refused step must not change, but for those that cannot be read."""
    states = [state for state in model.optimizer.state.values() if isinstance(state, dict)]
    tensors = [*model.params, *(value for state in states for value in state.values())]
    return on_cpu(tensor for tensor in tensors if not tensor.is_meta)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("right", "wrong"), WRONG)
def test_state_on_the_wrong_device_is_refused_and_nothing_changes(right: str, wrong: str, mode: str, key: str) -> None:
    """The error names the state, its param, and both devices."""
    model = Model([right], **MODES[mode]).train()
    state = model.optimizer.state[model.params[3]]
    good = state[key]
    state[key] = good.to(wrong)
    for param, grad in zip(model.params, model.grads[STEPS], strict=True):
        param.grad = grad
    before = everything(model)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        model.optimizer.step()
    for word in (rf"'{key}'", r"group 1, index 1", rf"\b{right}\b", rf"\b{wrong}\b"):
        assert re.search(word, str(caught.value), re.IGNORECASE), (word, str(caught.value))
    assert_same_bits(everything(model), before)
    state[key] = good
    model.step(STEPS)
    assert_same_bits(model.results, one_step_more())


def one_step_more() -> list[Tensor]:
    model = Model(["cpu"]).train()
    model.step(STEPS)
    return model.results


@pytest.mark.parametrize(("right", "wrong"), WRONG[:3])
@pytest.mark.parametrize("where", ["grads", "exp_avgs", "exp_avg_sqs"])
def test_the_functional_form_refuses_a_tensor_on_the_wrong_device(where: str, right: str, wrong: str) -> None:
    lists = {key: [torch.ones(size, device=right) for size in SIZES] for key in ("params", "exp_avgs", "exp_avg_sqs")}
    lists["grads"] = [torch.ones(size, device=right) for size in SIZES]
    lists["state_steps"] = [torch.zeros(()) for _ in SIZES]
    lists[where][2] = lists[where][2].to(wrong)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        functional.adamw(
            lists["params"],
            lists["grads"],
            lists["exp_avgs"],
            lists["exp_avg_sqs"],
            [],
            lists["state_steps"],
            amsgrad=False,
            beta1=0.9,
            beta2=0.99,
            lr=0.1,
            weight_decay=0.1,
            eps=1e-8,
            maximize=False,
        )
    for word in (r"params\[2\]", rf"\b{wrong}\b"):
        assert re.search(word, str(caught.value), re.IGNORECASE), (word, str(caught.value))
    for key in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(bool((tensor == 1.0).all()) for tensor in lists[key] if not tensor.is_meta and tensor.numel())
    assert all(step.item() == 0.0 for step in lists["state_steps"])


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_a_model_moved_under_its_optimizer_is_refused_with_its_devices(mode: str) -> None:
    """model.cuda() after the first step: the state stays behind, and is named. Loading a state dict mends it."""
    model = Model(["cpu"], **MODES[mode]).train()
    state_dict = model.optimizer.state_dict()
    for param in model.params:
        param.grad = None
        param.data = param.data.cuda()
    model.grads = [[grad.cuda() for grad in grads] for grads in model.grads]
    for param, grad in zip(model.params, model.grads[STEPS], strict=True):
        param.grad = grad
    before = everything(model)
    with pytest.raises((RuntimeError, ValueError), match=r"(?is)exp_avg.*group 0, index 0.*(cuda.*cpu|cpu.*cuda)"):
        model.optimizer.step()
    assert_same_bits(everything(model), before)
    model.optimizer.load_state_dict(state_dict)
    model.step(STEPS)
    assert_same_bits(model.results, one_step_more())


@pytest.mark.parametrize("flags", [MODES["capturable"], MODES["fused"]], ids=["capturable", "fused"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_count_set_by_hand_is_brought_to_the_device(device: str, flags: dict[str, bool]) -> None:
    """As a number or a CPU tensor."""
    model = Model([device], **flags).train()
    for param, make in zip(model.params, (float, torch.tensor, int, float, torch.tensor), strict=True):
        model.optimizer.state[param]["step"] = make(float(STEPS))
    model.step(STEPS)
    assert {model.optimizer.state[param]["step"].device.type for param in model.params} == {device}
    assert_same_bits(model.results, one_step_more())
