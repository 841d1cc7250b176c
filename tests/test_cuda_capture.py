"""The optimizer's step alone in a CUDA graph: its hyperparameters change between replays, and bad captures are refused.

On the CPU a replay is a plain call (tests/helpers.py).
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import COMBINATIONS, DEVICES, Captured, assert_same_bits, name_of, on_cpu
from tests.test_bits import FEW_SIZES
from tests.test_cuda_parity import LAYOUTS, Job

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
SIZES = (5, 0, 130, 3, 64, 1000)
LONG_ENOUGH = 40_000_000  # clock cycles of torch.cuda._sleep: 20 ms, in which the host queues many steps

FLOATS = {
    "lr": lambda i: {"lr": 0.1 / (i + 1)},
    "lr 0 at first": lambda i: {"lr": 0.05 * i},
    "betas": lambda i: {"betas": ((0.3, 0.9, 0.0, 0.5)[i % 4], 0.9 + i / 100)},
    "eps": lambda i: {"eps": 10.0 ** -(i % 8)},
    "weight_decay": lambda i: {"weight_decay": (i % 3) / 4},
    "all": lambda i: {
        "lr": 0.3 / (i + 2),
        "betas": (0.5 / (i + 1), 0.99),
        "eps": 1e-3 / (i + 1),
        "weight_decay": i / 8,
    },
}


def make_params(device: str, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def make_optimizer(params: list[Tensor], **arguments: object) -> adamw_ext.AdamW:
    """Two groups, with gradients that stay."""
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)
    return adamw_ext.AdamW([{"params": params[::2]}, {"params": params[1::2]}], **arguments)


def results_of(optimizer: adamw_ext.AdamW, params: list[Tensor]) -> list[Tensor]:
    states = [optimizer.state[param] for param in params]
    return on_cpu([*params, *(state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step"))])


def expected_results(change: Callable[[adamw_ext.AdamW, int], None], steps: int, **arguments: object) -> list[Tensor]:
    """Of plain steps on the CPU, each after its change."""
    dtype = arguments.pop("dtype", torch.float32)
    params = make_params("cpu", dtype)  # type: ignore[arg-type]
    optimizer = make_optimizer(params, **arguments)
    for i in range(steps):
        change(optimizer, i)
        optimizer.step()
    return results_of(optimizer, params)


# --- Hyperparameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_is_captured", [True, False], ids=["first_captured", "after_a_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("changes", FLOATS.values(), ids=FLOATS.keys())
@pytest.mark.parametrize("device", DEVICES)
def test_every_float_hyperparameter_may_change_between_replays(
    device: str, changes: Callable[[int], dict[str, object]], dtype: torch.dtype, first_is_captured: bool
) -> None:
    """Of each group on its own, by sync_hyperparameters()."""

    def change(optimizer: adamw_ext.AdamW, i: int) -> None:
        optimizer.param_groups[0].update(changes(i))
        optimizer.param_groups[1].update(changes(i + 1))

    params = make_params(device, dtype)
    optimizer = make_optimizer(params, capturable=True)
    optimizer.init_state()
    if not first_is_captured:
        change(optimizer, 0)
        optimizer.step()
    captured = Captured(optimizer.step, device)
    for i in range(0 if first_is_captured else 1, 6):
        change(optimizer, i)
        optimizer.sync_hyperparameters()
        captured.replay()
    assert_same_bits(results_of(optimizer, params), expected_results(change, 6, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_on_the_device_are_read_at_replay(
    device: str, fused: bool | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """lr and both betas, filled in place. No call of ours is needed."""
    rows = torch.tensor([[0.1, 0.9, 0.99], [0.02, 0.25, 0.9], [0.0, 0.5, 0.75], [0.3, 0.0, 0.999]], dtype=dtype)

    def change(optimizer: adamw_ext.AdamW, i: int) -> None:
        lr, beta1, beta2 = rows[i].tolist()
        for group in optimizer.param_groups:
            group.update(lr=lr, betas=(beta1, beta2))

    lr, beta1, beta2 = (torch.full(shape, float(value), dtype=dtype, device=device) for value in rows[0])
    params = make_params(device)
    optimizer = make_optimizer(params, lr=lr, betas=(beta1, beta2), capturable=True, fused=fused)
    optimizer.init_state()
    captured = Captured(optimizer.step, device)
    for row in rows:
        for tensor, value in zip((lr, beta1, beta2), row, strict=True):
            tensor.fill_(float(value))
        captured.replay()
    assert_same_bits(results_of(optimizer, params), expected_results(change, len(rows)))


@pytest.mark.parametrize("device", DEVICES)
def test_loading_fills_the_tensor_lr_and_betas_that_a_graph_reads(device: str) -> None:
    values = {"lr": (0.1, 0.02), "beta1": (0.875, 0.25), "beta2": (0.96875, 0.5)}  # numbers that float32 can hold

    def change(optimizer: adamw_ext.AdamW, i: int) -> None:
        now = {key: float(torch.tensor(pair[i >= 2])) for key, pair in values.items()}
        for group in optimizer.param_groups:
            group.update(lr=now["lr"], betas=(now["beta1"], now["beta2"]))

    tensors = {key: torch.tensor(pair[0], device=device) for key, pair in values.items()}
    params = make_params(device)
    betas = (tensors["beta1"], tensors["beta2"])
    optimizer = make_optimizer(params, lr=tensors["lr"], betas=betas, capturable=True)
    optimizer.init_state()
    captured = Captured(optimizer.step, device)
    captured.replay()
    captured.replay()
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        group.update(lr=values["lr"][1], betas=(values["beta1"][1], values["beta2"][1]))
    optimizer.load_state_dict(state_dict)
    captured.replay()
    captured.replay()
    assert_same_bits(results_of(optimizer, params), expected_results(change, 4))
    for group in optimizer.param_groups:
        assert group["lr"].data_ptr() == tensors["lr"].data_ptr()
        assert [beta.data_ptr() for beta in group["betas"]] == [beta.data_ptr() for beta in betas]


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("device", DEVICES)
def test_queued_steps_keep_the_hyperparameters_that_they_were_queued_with(device: str, in_graph: bool) -> None:
    """While the device is busy the host runs ahead, changing hyperparameters and, in eager steps, gradients."""
    steps = 40

    def change(optimizer: adamw_ext.AdamW, i: int) -> None:
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.1 / (1 + i % 7) / (1 + index)
            group["weight_decay"] = (i % 5) / 10

    params = make_params(device)
    optimizer = make_optimizer(params, capturable=True)
    optimizer.init_state()
    captured = Captured(optimizer.step, device)
    for _ in range(2):  # first to be warm
        optimizer.load_state_dict(make_fresh_state(device))
        with torch.no_grad():
            for param, start in zip(params, make_params(device), strict=True):
                param.copy_(start)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(LONG_ENOUGH)
        for i in range(steps):
            change(optimizer, i)
            if in_graph:
                optimizer.sync_hyperparameters()
                captured.replay()
            else:
                optimizer.step()
    assert_same_bits(results_of(optimizer, params), expected_results(change, steps))


def make_fresh_state(device: str) -> dict[str, object]:
    optimizer = make_optimizer(make_params(device), capturable=True)
    optimizer.init_state()
    return optimizer.state_dict()


@pytest.mark.parametrize("mode", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_queued_steps_keep_the_gradients_that_they_were_queued_with(device: str, mode: dict[str, bool]) -> None:
    """The tables of steps that wait on the device are not overwritten by those of later steps."""

    def train(device: str, **flags: bool) -> list[Tensor]:
        params = make_params(device)
        optimizer = make_optimizer(params, **flags)
        grads = [[torch.full_like(param, 0.1 * (i + 1)) for param in params] for i in range(5)]
        optimizer.init_state()
        if device == "cuda":
            torch.cuda._sleep(LONG_ENOUGH)
        for i in range(40):
            for j, param in enumerate(params):
                param.grad = grads[(i + j) % 5][j] if (i * j) % 4 else None
            optimizer.step()
        return results_of(optimizer, params)

    assert_same_bits(train(device, **mode), train("cpu"))


@pytest.mark.parametrize("flags", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_hyperparameters_may_be_synced_at_any_time(device: str, flags: dict[str, bool]) -> None:
    """Before there is a state or a graph to hear of them, too."""
    params = make_params(device)
    optimizer = make_optimizer(params, **flags)
    optimizer.sync_hyperparameters()
    optimizer.init_state()
    optimizer.sync_hyperparameters()
    optimizer.step()
    optimizer.sync_hyperparameters()
    assert_same_bits(results_of(optimizer, params), expected_results(lambda optimizer, i: None, 1))


# --- What is captured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_replays_have_the_bits_of_the_cpu(
    device: str, combination: tuple[torch.dtype, torch.dtype], amsgrad: bool
) -> None:
    """With steps that lag: each param's bias corrections follow its own count, from replay to replay."""
    job = Job(combination, FEW_SIZES, device=device, amsgrad=amsgrad, capturable=True)
    twin = Job(combination, FEW_SIZES, amsgrad=amsgrad)
    for param, grad in [*zip(job.params, job.grads[0], strict=True), *zip(twin.params, twin.grads[0], strict=True)]:
        param.grad = grad
    captured = Captured(job.optimizer.step, device)
    for _ in range(5):
        captured.replay()
        twin.optimizer.step()
    assert_same_bits(job.results, twin.results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_memory_layout_can_be_captured(device: str, layout: str) -> None:
    """Memory that the kernel cannot walk is copied within the graph."""

    def train(device: str, replay: bool) -> list[Tensor]:
        numbers = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)).to(device)
        buffer, view, grad = LAYOUTS[layout](numbers[0], numbers[1])
        param = torch.nn.Parameter(view)
        param.grad = grad
        optimizer = adamw_ext.AdamW([param], lr=0.1, capturable=replay)
        optimizer.init_state()
        step = Captured(optimizer.step, device).replay if replay else optimizer.step
        for i in range(4):
            numbers[1].add_(i)
            step()
        return on_cpu([buffer, *results_of(optimizer, [param])])

    assert_same_bits(train(device, True), train("cpu", False))


@pytest.mark.parametrize("device", DEVICES)
def test_a_capture_without_any_gradient_replays_as_nothing(device: str) -> None:
    params = make_params(device)
    optimizer = make_optimizer(params, capturable=True)
    optimizer.init_state()
    optimizer.zero_grad()
    before = results_of(optimizer, params)
    Captured(optimizer.step, device).replay()
    assert_same_bits(results_of(optimizer, params), before)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_graph_computes_before_the_step_does_not_reach_what_the_step_reads(device: str) -> None:
    """A graph's memory is used again within the graph: what was free when the step was captured, replays write to."""

    def change(optimizer: adamw_ext.AdamW, i: int) -> None:
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.1 / (1 + i) / (1 + index)

    def work() -> None:
        for count in (128, 1000, 10_000):
            before = [torch.full((count,), torch.nan, device=device) for _ in range(50)]
            del before
        optimizer.step()
        after = [torch.full((128,), torch.nan, device=device) for _ in range(50)]
        del after

    params = make_params(device)
    optimizer = make_optimizer(params, capturable=True)
    optimizer.init_state()
    captured = Captured(work, device)
    for i in range(5):
        change(optimizer, i)
        optimizer.sync_hyperparameters()
        captured.replay()
    assert_same_bits(results_of(optimizer, params), expected_results(change, 5))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_may_be_captured_again_and_again(device: str, keep: bool) -> None:
    """More often than torch has streams (32), each time with new hyperparameters, whether older graphs live or not."""
    count = 40

    def change(optimizer: adamw_ext.AdamW, i: int) -> None:
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.1 / (1 + i) / (1 + index)

    params = make_params(device)
    optimizer = make_optimizer(params, capturable=True)
    optimizer.init_state()
    kept = []
    for i in range(count):
        change(optimizer, i)
        captured = Captured(optimizer.step, device)
        captured.replay()
        kept += [captured] if keep else []
    change(optimizer, count)
    optimizer.sync_hyperparameters()
    (kept[0] if keep else captured).replay()
    assert_same_bits(results_of(optimizer, params), expected_results(change, count + 1))


@pytest.mark.cuda
def test_a_capture_may_be_the_first_that_a_process_does_with_it() -> None:
    """No kernel of ours has run or been loaded before."""
    script = """
import torch
from adamw_ext import AdamW
params = [torch.ones(1000, device="cuda", dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.bfloat16)]
for param in params:
    param.grad = torch.ones_like(param)
optimizer = AdamW(params, lr=0.125, weight_decay=0.0, capturable=True)
optimizer.init_state()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizer.step()
assert [float(param.detach().min()) for param in params] == [1.0, 1.0], "the capture itself has stepped"
for _ in range(3):
    graph.replay()
print([round(float(value), 4) for param in params for value in (param.detach().min(), param.detach().max())])
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[0.625, 0.625, 0.625, 0.625]", answer.stdout


# --- What is refused -------------------------------------------------------------------------------------------------


def assert_capture_refused(optimizer: adamw_ext.AdamW, params: list[Tensor], message: str) -> None:
    """With a RuntimeError, and nothing has changed, in eager memory either."""
    states = {param: dict(optimizer.state[param]) for param in params if param in optimizer.state}
    before = on_cpu([*params, *(value for state in states.values() for value in state.values())])
    with pytest.raises(RuntimeError, match=message):
        Captured(optimizer.step, "cuda")
    assert {param: dict(optimizer.state[param]) for param in params if param in optimizer.state} == states
    after = on_cpu([*params, *(value for state in states.values() for value in state.values())])
    assert_same_bits(after, before)


def assert_still_works(optimizer: adamw_ext.AdamW, params: list[Tensor]) -> None:
    """Eagerly, and captured once it may be."""
    before = on_cpu(params)
    optimizer.step()
    captured = Captured(optimizer.step, "cuda")
    captured.replay()
    captured.replay()
    for param, old in zip(params, before, strict=True):
        assert optimizer.state[param]["step"].item() == 3
        assert param.numel() == 0 or not torch.equal(param.cpu(), old)


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [None, True])
def test_capturing_without_state_is_refused_and_init_state_named(fused: bool | None) -> None:
    params = make_params("cuda")
    optimizer = make_optimizer(params, capturable=True, fused=fused)
    assert_capture_refused(optimizer, params, "init_state")
    assert_still_works(optimizer, params)


@pytest.mark.cuda
def test_capturing_a_param_that_got_its_first_gradient_after_the_first_step_is_refused() -> None:
    params = make_params("cuda")
    optimizer = make_optimizer(params, capturable=True)
    grad, params[2].grad = params[2].grad, None
    optimizer.step()
    params[2].grad = grad
    assert_capture_refused(optimizer, params, "init_state")
    optimizer.init_state()
    Captured(optimizer.step, "cuda").replay()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2, 1, 2, 2, 2]


@pytest.mark.cuda
@pytest.mark.parametrize("on_device", [False, True], ids=["floats", "tensor_lr_and_found_inf"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("stepped", [False, True], ids=["new", "stepped"])
def test_capturing_with_capturable_false_is_refused(stepped: bool, fused: bool | None, on_device: bool) -> None:
    """As in torch, also for a fused optimizer, and where one group of several is not capturable.

    The refusal reads no number from the device: that would break off the capture with another error.
    """
    params = make_params("cuda")
    for capturable in (False, True):
        lr = torch.tensor(0.1, device="cuda") if on_device else 0.1
        optimizer = make_optimizer(params, lr=lr, capturable=capturable, fused=fused)
        if on_device:
            optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.param_groups[1]["capturable"] = False
        if stepped:
            optimizer.step()
        else:
            optimizer.init_state()
        assert_capture_refused(optimizer, params, "capturable is False")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2"])
def test_a_cpu_tensor_is_refused_under_capture_and_named(name: str) -> None:
    """Its value would be baked into the graph. Eager steps read it."""
    cpu = {"lr": torch.tensor(0.1), "beta1": torch.tensor(0.9), "beta2": torch.tensor(0.99)}
    tensors = {key: tensor if key == name else tensor.cuda() for key, tensor in cpu.items()}
    params = make_params("cuda")
    betas = (tensors["beta1"], tensors["beta2"])
    optimizer = make_optimizer(params, lr=tensors["lr"], betas=betas, capturable=True)
    optimizer.init_state()
    assert_capture_refused(optimizer, params, r"\blr\b" if name == "lr" else r"\bbeta")
    optimizer.step()
    assert_capture_refused(optimizer, params, r"\blr\b" if name == "lr" else r"\bbeta")
    assert_same_bits(on_cpu(params), expected_results(from_tensors(cpu), 1)[: len(params)])


def from_tensors(tensors: dict[str, Tensor]) -> Callable[[adamw_ext.AdamW, int], None]:
    def change(optimizer: adamw_ext.AdamW, i: int) -> None:
        values = {key: float(tensor) for key, tensor in tensors.items()}
        for group in optimizer.param_groups:
            group.update(lr=values["lr"], betas=(values["beta1"], values["beta2"]))

    return change


@pytest.mark.cuda
def test_a_refused_capture_leaves_an_older_graph_valid() -> None:
    params = make_params("cuda")
    optimizer = make_optimizer(params, lr=0.1, capturable=True)
    optimizer.init_state()
    captured = Captured(optimizer.step, "cuda")
    captured.replay()
    for group in optimizer.param_groups:
        group["capturable"] = False
        with pytest.raises(RuntimeError, match="capturable is False"):
            Captured(optimizer.step, "cuda")
        group["capturable"] = True
    captured.replay()
    assert_same_bits(results_of(optimizer, params), expected_results(lambda optimizer, i: None, 2, lr=0.1))
