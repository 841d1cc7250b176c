"""State dicts between torch and this package, between CPU and CUDA, and between the ways to keep steps.

Loading changes no bit of any moment or count; the steps behind it have the bits of the CPU, and are torch's but for
rounding. (torch's fused kernel reckons 1 - beta**step in float32: it is the less exact of the two.)
"""

import copy
import io

import pytest
import torch
from torch import Tensor

import adamw_ext
from tests.helpers import DEVICES, MODES, Captured, assert_same_bits, name_of, on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(5,), (3, 4), (), (70,), (0,), (2, 3, 4)]
HYPER = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
TORCH_MODES = {
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "foreach": {"foreach": True},
    "capturable_foreach": {"capturable": True, "foreach": True},
    "single_tensor": {"foreach": False},
}
TORCH_CASES = [
    *(("cpu", mode) for mode, flags in TORCH_MODES.items() if not flags.get("capturable")),  # which torch has not there
    *(pytest.param("cuda", mode, marks=pytest.mark.cuda) for mode in TORCH_MODES),
]
OUR_MODES = {**MODES, "capturable_fused": {"capturable": True, "fused": True}}


def keeps_steps_on_device(flags: dict[str, bool]) -> bool:
    return bool(flags.get("capturable") or flags.get("fused"))


class Run:
    """An optimizer of either class over a few params, whose gradients follow from the number of the step."""

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        device: str,
        *,
        dtype: torch.dtype = torch.float32,
        start: "Run | None" = None,  # whose params to begin with
        **arguments: object,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(shape, generator=generator) for shape in SHAPES] if start is None else start.params
        self.params = [torch.nn.Parameter(value.detach().clone().to(device, dtype)) for value in starts]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "weight_decay": 0.3}]
        self.optimizer = cls(groups, **{**HYPER, **arguments})

    def train(self, first: int, count: int) -> "Run":
        for step in range(first, first + count):
            generator = torch.Generator().manual_seed(1000 + step)
            for param in self.params:
                param.grad = torch.randn(param.shape, generator=generator).to(param)
            self.optimizer.step()
        return self

    def load(self, state_dict: dict[str, object]) -> "Run":
        self.optimizer.load_state_dict(state_dict)
        return self

    @property
    def state(self) -> list[Tensor]:
        """All of it, on the CPU."""
        states = [self.optimizer.state[param] for param in self.params]
        return on_cpu(state[key] for state in states for key in ("step", *MOMENTS) if key in state)

    @property
    def results(self) -> list[Tensor]:
        return [*on_cpu(self.params), *self.state]

    def step_devices(self) -> set[str]:
        return {self.optimizer.state[param]["step"].device.type for param in self.params}


def through_a_file(state_dict: dict[str, object], map_location: str | None = None) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location=map_location)


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6)


# --- To torch and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("our_mode", OUR_MODES)
@pytest.mark.parametrize(("device", "torch_mode"), TORCH_CASES)
def test_torchs_state_loads_here_and_the_next_steps_match(
    device: str, torch_mode: str, our_mode: str, amsgrad: bool
) -> None:
    flags = TORCH_MODES[torch_mode]
    theirs = Run(torch.optim.AdamW, device, amsgrad=amsgrad, **flags).train(0, 3)
    state_dict = through_a_file(theirs.optimizer.state_dict())
    ours = Run(adamw_ext.AdamW, device, start=theirs, amsgrad=amsgrad, **OUR_MODES[our_mode]).load(state_dict)
    assert_same_bits(ours.state, theirs.state)
    twin = Run(adamw_ext.AdamW, "cpu", start=theirs, amsgrad=amsgrad).load(state_dict)
    ours.train(3, 3)
    assert_same_bits(ours.results, twin.train(3, 3).results)
    assert_close(ours.results, theirs.train(3, 3).results)
    assert ours.step_devices() == {device if keeps_steps_on_device(OUR_MODES[our_mode]) else "cpu"}


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("our_mode", OUR_MODES)
@pytest.mark.parametrize(("device", "torch_mode"), TORCH_CASES)
def test_our_state_loads_in_torch_and_the_next_steps_match(
    device: str, torch_mode: str, our_mode: str, amsgrad: bool
) -> None:
    """torch takes its flags from the dict: users who want others change them there."""
    flags = TORCH_MODES[torch_mode]
    ours = Run(adamw_ext.AdamW, device, amsgrad=amsgrad, **OUR_MODES[our_mode]).train(0, 3)
    state_dict = through_a_file(ours.optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group.update({"foreach": None, "capturable": False, "fused": None, **flags})
    theirs = Run(torch.optim.AdamW, device, start=ours, amsgrad=amsgrad, **flags).load(state_dict)
    assert_same_bits(theirs.state, ours.state)
    theirs.train(3, 3)
    assert_close(ours.train(3, 3).results, theirs.results)


@pytest.mark.parametrize("torch_mode", ["fused", "foreach"])
@pytest.mark.parametrize("device", DEVICES)
def test_our_unchanged_state_dict_loads_in_torch(device: str, torch_mode: str) -> None:
    for flags in OUR_MODES.values():
        if device == "cpu" and flags.get("capturable"):
            continue
        ours = Run(adamw_ext.AdamW, device, **flags).train(0, 3)
        theirs = Run(torch.optim.AdamW, device, start=ours, **TORCH_MODES[torch_mode])
        theirs.load(copy.deepcopy(ours.optimizer.state_dict())).train(3, 3)
        assert_close(ours.train(3, 3).results, theirs.results)


# --- Between CPU and CUDA, and between modes -------------------------------------------------------------------------


@pytest.mark.parametrize("map_location", [None, "cpu"])
@pytest.mark.parametrize("into", OUR_MODES)
@pytest.mark.parametrize("out_of", OUR_MODES)
@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [
        ("cpu", "cpu"),
        pytest.param("cpu", "cuda", marks=pytest.mark.cuda),
        pytest.param("cuda", "cpu", marks=pytest.mark.cuda),
        pytest.param("cuda", "cuda", marks=pytest.mark.cuda),
    ],
)
def test_a_checkpoint_continues_on_every_device_in_every_mode_with_the_same_bits(
    saved_on: str, loaded_on: str, out_of: str, into: str, map_location: str | None
) -> None:
    """The constructor says where steps are kept, not the checkpoint."""
    saved = Run(adamw_ext.AdamW, saved_on, amsgrad=True, **OUR_MODES[out_of]).train(0, 3)
    state_dict = through_a_file(saved.optimizer.state_dict(), map_location)
    loaded = Run(adamw_ext.AdamW, loaded_on, start=saved, amsgrad=True, **OUR_MODES[into]).load(state_dict)
    assert_same_bits(loaded.state, saved.state)
    assert loaded.step_devices() == {loaded_on if keeps_steps_on_device(OUR_MODES[into]) else "cpu"}
    for param in loaded.params:
        moments = [loaded.optimizer.state[param][key] for key in MOMENTS]
        assert {moment.device.type for moment in moments} == {loaded_on}
    unstopped = Run(adamw_ext.AdamW, "cpu", amsgrad=True).train(0, 6)
    assert_same_bits(loaded.train(3, 3).results, unstopped.results)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor(3.0), torch.tensor([3.0])], ids=repr)
@pytest.mark.parametrize("mode", OUR_MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_count_of_any_kind_is_loaded_to_where_the_mode_keeps_it(
    device: str, mode: str, step: float | Tensor
) -> None:
    """Old pickles hold numbers. On the device, too, where it is a tensor."""
    source = Run(adamw_ext.AdamW, "cpu").train(0, 3)
    unstopped = Run(adamw_ext.AdamW, "cpu", start=source).load(source.optimizer.state_dict()).train(3, 2)
    for value in (step, step.to(device)) if isinstance(step, Tensor) else (step,):
        state_dict = copy.deepcopy(source.optimizer.state_dict())
        for items in state_dict["state"].values():
            items["step"] = value
        loaded = Run(adamw_ext.AdamW, device, start=source, **OUR_MODES[mode]).load(state_dict)
        assert loaded.step_devices() == {device if keeps_steps_on_device(OUR_MODES[mode]) else "cpu"}
        assert_same_bits(loaded.state, source.state)
        assert_same_bits(loaded.train(3, 2).results, unstopped.results)


@pytest.mark.parametrize("mode", OUR_MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_loading_writes_into_the_tensors_that_are_there(device: str, mode: str) -> None:
    """So captured graphs stay valid, and nothing is shared with the dict."""
    source = Run(adamw_ext.AdamW, device, **OUR_MODES[mode]).train(0, 3)
    state_dict = source.optimizer.state_dict()
    loaded = Run(adamw_ext.AdamW, device, **OUR_MODES[mode]).train(0, 1)
    before = [value for param in loaded.params for value in loaded.optimizer.state[param].values()]
    addresses = [tensor.data_ptr() for tensor in before]
    loaded.load(state_dict)
    after = [value for param in loaded.params for value in loaded.optimizer.state[param].values()]
    assert all(new is old for new, old in zip(after, before, strict=True))
    assert [tensor.data_ptr() for tensor in after] == addresses
    assert_same_bits(loaded.state, source.state)
    expected = source.state
    loaded.train(3, 1)
    assert_same_bits(source.state, expected)


@pytest.mark.parametrize("mode", OUR_MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_moments_of_half_precision_params_stay_float32(device: str, dtype: torch.dtype, mode: str) -> None:
    """torch casts them to the param's dtype (pytorch#75224)."""
    source = Run(adamw_ext.AdamW, "cpu").train(0, 3)
    loaded = Run(adamw_ext.AdamW, device, dtype=dtype, start=source, **OUR_MODES[mode])
    loaded.load(source.optimizer.state_dict())
    for param in loaded.params:
        assert {loaded.optimizer.state[param][key].dtype for key in MOMENTS[:2]} == {torch.float32}
    assert_same_bits(loaded.state, source.state)
    twin = Run(adamw_ext.AdamW, "cpu", dtype=dtype, start=source).load(source.optimizer.state_dict())
    assert_same_bits(loaded.train(3, 3).results, twin.train(3, 3).results)


@pytest.mark.parametrize("mode", OUR_MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_deepcopy_continues_with_the_same_bits(device: str, mode: str) -> None:
    run = Run(adamw_ext.AdamW, device, **OUR_MODES[mode]).train(0, 3)
    twin = copy.deepcopy(run)
    assert_same_bits(twin.train(3, 3).results, run.train(3, 3).results)
    assert twin.params[0] is not run.params[0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_deepcopy_of_an_optimizer_with_a_graph_leaves_the_graph_valid(device: str) -> None:
    run = Run(adamw_ext.AdamW, device, capturable=True).train(0, 1)
    expected = Run(adamw_ext.AdamW, "cpu").train(0, 1)
    captured = Captured(run.optimizer.step, device)
    twin = copy.deepcopy(run)
    for param, copied in zip(run.params, twin.params, strict=True):
        copied.grad = param.grad
    for each in (twin.optimizer, expected.optimizer):
        each.param_groups[0]["lr"] = 0.5
        each.step()
    run.optimizer.param_groups[0]["lr"] = 0.5
    run.optimizer.sync_hyperparameters()
    captured.replay()
    assert_same_bits(run.results, expected.results)
    assert_same_bits(twin.results, expected.results)


@pytest.mark.parametrize("mode", OUR_MODES)
@pytest.mark.parametrize("device", DEVICES)
def test_init_state_creates_what_the_first_step_would(device: str, mode: str) -> None:
    run = Run(adamw_ext.AdamW, device, amsgrad=True, **OUR_MODES[mode])
    run.optimizer.init_state()
    assert run.step_devices() == {device if keeps_steps_on_device(OUR_MODES[mode]) else "cpu"}
    assert all(not tensor.any() for tensor in run.state)
    expected = Run(adamw_ext.AdamW, "cpu", amsgrad=True).train(0, 3)
    assert_same_bits(run.train(0, 3).results, expected.results)
