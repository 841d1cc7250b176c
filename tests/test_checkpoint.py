"""`adamw_ext.checkpoint`: state dicts that go from every mode into every mode, to torch, and from other libraries."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_ext import _C, AdamW, checkpoint
from tests.helpers import MODES as STEPS
from tests.helpers import assert_same_bits, name_of

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(7, 5), (64,), (3,), (0,)]
HALVES = (torch.bfloat16, torch.float16)
SOURCES = [(torch.bfloat16, "split"), (torch.bfloat16, "fp32"), (torch.float16, "fp32")]
Options = dict[str, Any]


def has_kernel(dtype: torch.dtype, options: Options) -> bool:
    """Of float16, only float32 masters, and with those only bfloat16 moments are rounded stochastically."""
    if dtype != torch.float16:
        return True
    rounds = options["master_weights"] == "fp32" and options["moment_dtype"] is not None
    return options["master_weights"] != "split" and (rounds or not options["stochastic_rounding"])


OPTIONS: list[Options] = [
    {"master_weights": master, "moment_dtype": moment, "stochastic_rounding": stochastic}
    for master, moment, stochastic in itertools.product(
        (None, "fp32", "split"), (None, torch.float32, torch.bfloat16), (False, True)
    )
]
MODES = [
    pytest.param(dtype, options, id="-".join(str(part) for part in (name_of(dtype), *options.values())))
    for dtype, options in itertools.product((torch.float32, *HALVES), OPTIONS)
    if has_kernel(dtype, options)
]


def make_params(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def copies(params: list[Parameter], dtype: torch.dtype | None = None) -> list[Parameter]:
    return [Parameter(param.detach().to(dtype or param.dtype, copy=True)) for param in params]


def groups_of(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "weight_decay": 0.3, "betas": (0.8, 0.95)}]


def give_grads(params: list[Parameter], step: int, frozen: int | None = None) -> None:
    """The same numbers for every dtype: those of bfloat16, none of which float16 rounds to zero."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, param in enumerate(params):
        grad = (torch.randn(param.shape, generator=generator) + 0.1).bfloat16()
        param.grad = None if index == frozen else grad.to(param.dtype)


def train(optimizer: torch.optim.Optimizer, steps: range, frozen: int | None = None) -> None:
    params = params_of(optimizer)
    for step in steps:
        give_grads(params, step, frozen)
        before = params[0].detach().clone()
        optimizer.step()
        assert not torch.equal(params[0].detach(), before), "the step moved nothing"


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, without pickled code."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Params and state."""
    tensors = [param.detach() for param in params_of(optimizer)]
    for param in params_of(optimizer):
        tensors += optimizer.state.get(param, {}).values()
    return tensors


def assert_same_contents(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same_contents(actual[key], value)
    elif isinstance(expected, list):
        assert_same_contents(dict(enumerate(actual)), dict(enumerate(expected)))
    elif isinstance(expected, Tensor):
        assert_same_bits([actual], [expected])
    else:
        assert actual == expected


def masters_of(optimizer: AdamW) -> list[Tensor]:
    """What the next step starts from, where no param was written to."""
    masters = []
    for param in params_of(optimizer):
        state = optimizer.state[param]
        if "param_remainder" in state:
            masters.append(_C.join_master(param, state["param_remainder"]))
        else:
            masters.append(state.get("master_param", param.detach()))
    return masters


# Round trips


@pytest.mark.parametrize(("dtype", "options"), MODES)
def test_a_round_trip_gives_back_every_bit_and_the_next_steps(dtype: torch.dtype, options: Options) -> None:
    source = AdamW(groups_of(make_params(dtype)), seed=7, max_grad_norm=3.0, amsgrad=True, **options)
    train(source, range(3), frozen=1)
    exported = saved(checkpoint.export_float32(source))
    target = AdamW(groups_of(copies(params_of(source))), **options)
    checkpoint.import_float32(target, exported)
    assert_same_bits(everything(target), everything(source), "after the round trip")
    assert [list(state) for state in target.state.values()] == [list(state) for state in source.state.values()]
    for optimizer in (source, target):
        train(optimizer, range(3, 6))
    assert_same_bits(everything(target), everything(source), "three steps later")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.complex64, torch.complex32], ids=name_of)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_wide_and_complex_params_come_back_too(dtype: torch.dtype) -> None:
    param = Parameter(torch.randn(5, 4, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype))
    source = AdamW([param])
    for _ in range(2):
        param.grad = param.detach().clone()
        source.step()
    exported = checkpoint.export_float32(source)
    assert exported["state"][0]["exp_avg"].dtype == (torch.complex64 if dtype == torch.complex32 else dtype)
    target = AdamW(copies([param]))
    checkpoint.import_float32(target, exported)
    assert_same_bits(everything(target), everything(source))


@pytest.mark.parametrize(("dtype", "options"), MODES)
def test_an_export_is_float32_and_shares_nothing(dtype: torch.dtype, options: Options) -> None:
    optimizer = AdamW(groups_of(make_params(dtype)), lr=torch.tensor(0.01), **options)
    train(optimizer, range(2), frozen=1)
    exported = checkpoint.export_float32(optimizer)
    keys = ["step", "exp_avg", "exp_avg_sq"]
    if dtype in HALVES and options["master_weights"]:
        keys.append("master_param")
    assert {number: list(items) for number, items in exported["state"].items()} == {0: keys, 2: keys, 3: keys}
    tensors = [value for items in exported["state"].values() for value in items.values()]
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(torch.float32, "cpu")}
    assert all(
        not {"master_weights", "moment_dtype", "stochastic_rounding"} & group.keys()
        for group in exported["param_groups"]
    )
    before = copy.deepcopy(exported)
    train(optimizer, range(2, 4))
    optimizer.param_groups[1]["lr"] *= 5.0
    assert_same_contents(exported, before)


def test_a_state_dict_of_this_class_is_imported_whatever_its_options() -> None:
    """They are of how it was stored: a dtype by its name, as torch.distributed takes no dtypes."""
    options: Options = {"moment_dtype": torch.float32, "stochastic_rounding": True, "seed": 3}
    source = AdamW(groups_of(make_params(torch.bfloat16)), **options)
    train(source, range(2))
    state_dict = source.state_dict()
    assert [group["moment_dtype"] for group in state_dict["param_groups"]] == ["float32"] * 2
    target = AdamW(groups_of(copies(params_of(source))), moment_dtype=torch.float32)
    checkpoint.import_float32(target, saved(state_dict))
    assert_same_bits(everything(target), everything(source))
    assert [group["moment_dtype"] for group in target.param_groups] == [torch.float32] * 2


def test_names_and_unknown_keys_are_carried_along() -> None:
    param = Parameter(torch.ones(3))
    source = AdamW([("weight", param)])
    source.param_groups[0]["initial_lr"] = 0.5
    param.grad = torch.ones(3)
    source.step()
    source.state[param]["count"] = 3
    target = AdamW([("weight", Parameter(torch.ones(3)))])
    checkpoint.import_float32(target, saved(checkpoint.export_float32(source)))
    assert target.param_groups[0]["param_names"] == ["weight"]
    assert target.param_groups[0]["initial_lr"] == 0.5
    assert target.state[params_of(target)[0]]["count"] == 3


@pytest.mark.parametrize("steps", STEPS)
def test_an_import_keeps_the_addresses_that_captured_steps_read(steps: str) -> None:
    options: Options = {"master_weights": "fp32", **STEPS[steps]}
    source, target = (AdamW(make_params(torch.bfloat16), **options) for _ in range(2))
    train(source, range(3))
    train(target, range(1))
    before = [tensor.data_ptr() for tensor in everything(target)]
    checkpoint.import_float32(target, checkpoint.export_float32(source))
    assert [tensor.data_ptr() for tensor in everything(target)] == before
    assert_same_bits(everything(target), everything(source))


def test_a_complex_param_takes_no_master() -> None:
    param = Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = AdamW([param])
    optimizer.init_state()
    exported = checkpoint.export_float32(optimizer)
    exported["state"][0]["master_param"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"'master_param' of .* must be .* beside a real param, but is a torch.float32"
    ):
        checkpoint.import_float32(optimizer, exported)
    assert torch.equal(param, torch.ones(3, dtype=torch.complex64))


# From one mode into another


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_torch_continues_as_if_it_had_always_been_there(amsgrad: bool) -> None:
    ours = AdamW(groups_of(make_params(torch.float32)), amsgrad=amsgrad)
    theirs = torch.optim.AdamW(groups_of(make_params(torch.float32)), amsgrad=amsgrad)
    for optimizer in (ours, theirs):
        train(optimizer, range(3), frozen=1)
    loaded = torch.optim.AdamW(groups_of(copies(params_of(ours))))
    loaded.load_state_dict(saved(checkpoint.export_float32(ours)))
    for optimizer in (theirs, loaded):
        train(optimizer, range(3, 6))
    for actual, expected in zip(everything(loaded), everything(theirs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "master"), SOURCES, ids=str)
def test_a_float32_model_continues_from_the_exact_masters(dtype: torch.dtype, master: str) -> None:
    source = AdamW(groups_of(make_params(dtype)), master_weights=master, moment_dtype=torch.float32)
    train(source, range(3))
    exported = checkpoint.export_float32(source)
    masters = [value.clone() for value in masters_of(source)]
    ours = AdamW(groups_of(copies(params_of(source), torch.float32)))
    theirs = torch.optim.AdamW(groups_of(copies(params_of(source), torch.float32)))
    for optimizer in (ours, theirs):
        checkpoint.import_float32(optimizer, exported)
        assert_same_bits([param.detach() for param in params_of(optimizer)], masters, "params of the float32 model")
        assert all(list(state) == ["step", "exp_avg", "exp_avg_sq"] for state in optimizer.state.values())
    for optimizer in (source, ours, theirs):
        train(optimizer, range(3, 6))
    assert_same_bits([param.detach() for param in params_of(ours)], masters_of(source), "three steps later")
    for param, value in zip(params_of(theirs), masters_of(source), strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-5, atol=1e-7)


def test_what_torch_loaded_is_not_what_its_params_are_set_to_later() -> None:
    """torch's load_state_dict keeps `master_param` in its state and never updates it: exports leave it out."""
    source = AdamW(groups_of(make_params(torch.bfloat16)), master_weights="split")
    train(source, range(2))
    theirs = torch.optim.AdamW(groups_of(copies(params_of(source), torch.float32)))
    theirs.load_state_dict(checkpoint.export_float32(source))
    assert "master_param" in theirs.state[params_of(theirs)[0]]
    assert all("master_param" not in items for items in checkpoint.export_float32(theirs)["state"].values())


@pytest.mark.parametrize("into", ["fp32", "split", None], ids=str)
@pytest.mark.parametrize(("dtype", "master"), SOURCES, ids=str)
def test_params_are_set_to_the_nearest_of_their_masters(dtype: torch.dtype, master: str, into: str | None) -> None:
    """Whatever the model had, and though float16 and bfloat16 round differently."""
    source = AdamW(groups_of(make_params(dtype)), master_weights=master)
    train(source, range(3))
    masters = [value.clone() for value in masters_of(source)]
    target = AdamW(
        groups_of([Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]), master_weights=into
    )
    checkpoint.import_float32(target, checkpoint.export_float32(source))
    for param, value in zip(params_of(target), masters, strict=True):
        error = (param.detach().double() - value.double()).abs()
        others = [(param.detach().view(torch.int16) + step).view(torch.bfloat16).double() for step in (-1, 1)]
        assert all((error <= (other - value.double()).abs()).all() for other in others)
    if into is not None:
        assert_same_bits(masters_of(target), masters)


@pytest.mark.parametrize("into", ["fp32", "split", None], ids=str)
def test_ties_go_away_from_zero_as_the_kernels_show_them(into: str | None) -> None:
    ties = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    source = AdamW([Parameter(torch.zeros(3, dtype=torch.bfloat16))], master_weights="fp32")
    train(source, range(1))
    exported = checkpoint.export_float32(source)
    exported["state"][0]["master_param"] = ties
    target = AdamW([Parameter(torch.zeros(3, dtype=torch.bfloat16))], master_weights=into)
    checkpoint.import_float32(target, exported)
    assert params_of(target)[0].tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]
    if into is not None:
        assert_same_bits(masters_of(target), [ties])


@pytest.mark.parametrize(("dtype", "master"), SOURCES, ids=str)
def test_a_param_that_someone_wrote_to_is_exported_as_the_next_step_takes_it(dtype: torch.dtype, master: str) -> None:
    source = AdamW(groups_of(make_params(dtype)), master_weights=master, moment_dtype=torch.float32)
    train(source, range(3))
    with torch.no_grad():
        params_of(source)[0][2:] *= -3.0
        params_of(source)[1].zero_()
        params_of(source)[2].copy_(torch.tensor([torch.inf, -torch.inf, torch.nan]))
    target = AdamW(groups_of(copies(params_of(source), torch.float32)))
    checkpoint.import_float32(target, checkpoint.export_float32(source))
    for optimizer in (source, target):
        train(optimizer, range(3, 4))
    assert_same_bits([param.detach() for param in params_of(target)], masters_of(source))


def test_a_master_starts_from_the_param_where_the_dict_has_none() -> None:
    source = AdamW(make_params(torch.bfloat16))
    train(source, range(2))
    target = AdamW(copies(params_of(source)), master_weights="fp32")
    train(target, range(2))
    with torch.no_grad():
        for param, value in zip(params_of(target), params_of(source), strict=True):
            param.copy_(value)
    checkpoint.import_float32(target, checkpoint.export_float32(source))
    target.init_state()
    assert_same_bits(masters_of(target), [param.detach().float() for param in params_of(source)])


@pytest.mark.parametrize("moment", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name_of)
def test_moments_are_rounded_to_what_the_mode_has(dtype: torch.dtype, moment: torch.dtype | None) -> None:
    source = AdamW(make_params(torch.float32))
    train(source, range(2))
    target = AdamW(make_params(dtype), moment_dtype=moment)
    checkpoint.import_float32(target, checkpoint.export_float32(source))
    for param, other in zip(params_of(target), params_of(source), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert_same_bits([target.state[param][key]], [source.state[other][key].to(moment or dtype)], key)


# Other libraries, re-enacted: the textbook's update in float32, and what their state dicts look like.


class Peer:
    """An AdamW of another library: values (float32, of which a 16-bit model would show the nearest), moments, and one
    count of updates for each group."""

    def __init__(self, values: list[Tensor]) -> None:
        self.initial = [value.clone() for value in values]
        self.values = [value.clone() for value in values]
        self.exp_avgs = [torch.zeros_like(value) for value in values]
        self.exp_avg_sqs = [torch.zeros_like(value) for value in values]
        self.updates = [0] * len(values)
        self.groups: list[dict[str, Any]] = [
            {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1, "params": [0, 1]},
            {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.0, "params": [2, 3], "initial_lr": 0.3},
        ]
        self.step = 0

    def train(self, steps: range, frozen: int | None = None) -> None:
        for step in steps:
            grads = [Parameter(value) for value in self.values]
            give_grads(grads, step, frozen)
            self.step += 1
            for group in self.groups:
                for number in group["params"]:
                    grad = grads[number].grad
                    if grad is not None:
                        self.updates[number] += 1
                        self._update(number, grad, **group)

    def _update(
        self,
        number: int,
        grad: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **_: Any,
    ) -> None:
        value, exp_avg, exp_avg_sq = self.values[number], self.exp_avgs[number], self.exp_avg_sqs[number]
        exp_avg.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        mean, square = exp_avg / (1 - betas[0] ** self.step), exp_avg_sq / (1 - betas[1] ** self.step)
        value.mul_(1 - lr * weight_decay).sub_(lr * mean / (square.sqrt() + eps))

    def used(self) -> list[int]:
        return [number for number, updates in enumerate(self.updates) if updates]

    def as_apex(self, capturable: bool = False) -> dict[str, Any]:
        state = {i: {"exp_avg": self.exp_avgs[i], "exp_avg_sq": self.exp_avg_sqs[i]} for i in self.used()}
        groups = [{**group, "bias_correction": True, "step": self.step} for group in self.groups]
        if capturable:
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
                group["step"] = torch.tensor([group["step"]], dtype=torch.int32)
        return copy.deepcopy({"state": state, "param_groups": groups})

    def as_transformer_engine(self, dtypes: list[torch.dtype], remainders: bool) -> dict[str, Any]:
        """With `master_weights=True`. All params of a group have state, also unused ones."""
        state_dict = self.as_apex()
        for i, dtype in enumerate(dtypes):
            master = self.values[i].clone()
            if dtype == torch.float32:
                master = self.initial[i].clone()
            elif dtype == torch.bfloat16 and remainders:
                master = master.view(torch.int32).to(torch.int16)
            moments = {"exp_avg": self.exp_avgs[i].clone(), "exp_avg_sq": self.exp_avg_sqs[i].clone()}
            state_dict["state"][i] = {**moments, "master_param": master}
        return state_dict

    def as_bitsandbytes(self, nested: bool = True) -> dict[str, Any]:
        state: dict[int, dict[str, Any]] = {}
        for i in self.used():
            moments = {"state1": self.exp_avgs[i].clone(), "state2": self.exp_avg_sqs[i].clone()}
            nest = {"__bnb_optimizer_quant_state__": moments}
            state[i] = {"step": self.updates[i], **(nest if nested else moments)}
        extra = {"alpha": 0.0, "t_alpha": None, "t_beta3": None} if nested else {}
        return {"state": state, "param_groups": [{**group, **extra} for group in copy.deepcopy(self.groups)]}

    def model(self, dtypes: list[torch.dtype]) -> list[Parameter]:
        """Its params: bfloat16 ones as the remainders have it, ties away from zero."""
        shown = []
        for value, dtype in zip(self.values, dtypes, strict=True):
            away = ((value.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
            shown.append(Parameter(away if dtype == torch.bfloat16 else value.to(dtype)))
        return shown


def make_peer(steps: int = 3, frozen: int | None = None) -> Peer:
    peer = Peer([param.detach() for param in make_params(torch.float32)])
    peer.train(range(steps), frozen)
    return peer


def two_groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:]}]


def assert_continues(optimizer: torch.optim.AdamW, peer: Peer, frozen: int | None = None) -> None:
    """A float32 optimizer and the peer make the same next steps, with the peer's hyperparameters."""
    for group, other in zip(optimizer.param_groups, peer.groups, strict=True):
        assert group["lr"] == pytest.approx(other["lr"])
        assert {key: group[key] for key in other.keys() - {"params", "lr"}} == {
            key: other[key] for key in other.keys() - {"params", "lr"}
        }
    train(optimizer, range(3, 6), frozen)
    peer.train(range(3, 6), frozen)
    for i, (param, value) in enumerate(zip(params_of(optimizer), peer.values, strict=True)):
        torch.testing.assert_close(param.detach(), value, rtol=1e-5, atol=1e-6)
        if i != frozen:
            torch.testing.assert_close(optimizer.state[param]["exp_avg"], peer.exp_avgs[i], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], peer.exp_avg_sqs[i], rtol=1e-5, atol=1e-6)


FLOAT32 = [torch.float32] * len(SHAPES)


@pytest.mark.parametrize("cls", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize("capturable", [False, True], ids=["int_step", "tensor_step"])
def test_apex_continues(capturable: bool, cls: type[torch.optim.AdamW]) -> None:
    peer = make_peer(frozen=1)
    optimizer = cls(two_groups(peer.model(FLOAT32)))
    checkpoint.import_float32(optimizer, checkpoint.from_apex(saved(peer.as_apex(capturable))))
    assert [float(state["step"]) for state in optimizer.state.values()] == [3.0, 3.0, 3.0]
    assert_continues(optimizer, peer, frozen=1)


@pytest.mark.parametrize("cls", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize("nested", [False, True], ids=["beside", "nested"])
def test_bitsandbytes_continues(nested: bool, cls: type[torch.optim.AdamW]) -> None:
    peer = make_peer(frozen=1)
    optimizer = cls(two_groups(peer.model(FLOAT32)))
    checkpoint.import_float32(optimizer, checkpoint.from_bitsandbytes(saved(peer.as_bitsandbytes(nested))))
    assert_continues(optimizer, peer, frozen=1)


def test_a_bitsandbytes_step_is_each_params_own() -> None:
    peer = make_peer(frozen=2)
    peer.train(range(3, 5))
    converted = checkpoint.from_bitsandbytes(peer.as_bitsandbytes())
    assert [float(items["step"]) for items in converted["state"].values()] == [5.0, 5.0, 2.0, 5.0]


MIXED = [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("into", ["split", "fp32"])
@pytest.mark.parametrize("remainders", [False, True], ids=["float32_masters", "remainders"])
def test_transformer_engine_continues_from_its_exact_masters(remainders: bool, into: str) -> None:
    peer = make_peer()
    model = peer.model(MIXED)
    converted = checkpoint.from_transformer_engine(saved(peer.as_transformer_engine(MIXED, remainders)), model)
    optimizer = AdamW(two_groups(model), master_weights=into, moment_dtype=torch.float32)
    checkpoint.import_float32(optimizer, converted)
    assert_same_bits(masters_of(optimizer), peer.values)
    train(optimizer, range(3, 6))
    peer.train(range(3, 6))
    for actual, expected in zip(masters_of(optimizer), peer.values, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize("remainders", [False, True], ids=["float32_masters", "remainders"])
def test_a_float32_model_continues_from_transformer_engines_masters(
    remainders: bool, cls: type[torch.optim.AdamW]
) -> None:
    peer = make_peer()
    model = peer.model(MIXED)
    converted = checkpoint.from_transformer_engine(peer.as_transformer_engine(MIXED, remainders), iter(model))
    optimizer = cls(two_groups(copies(model, torch.float32)))
    checkpoint.import_float32(optimizer, converted)
    assert_same_bits([param.detach() for param in params_of(optimizer)], peer.values)
    assert_continues(optimizer, peer)


def test_float16_masters_of_transformer_engine_are_whole() -> None:
    dtypes, peer = [torch.float16] * len(SHAPES), make_peer()
    converted = checkpoint.from_transformer_engine(peer.as_transformer_engine(dtypes, True), peer.model(dtypes))
    optimizer = AdamW(two_groups(peer.model(dtypes)), master_weights="fp32")
    checkpoint.import_float32(optimizer, converted)
    assert_same_bits(masters_of(optimizer), peer.values)


def test_what_is_converted_loads_with_load_state_dict_too() -> None:
    """It keeps the moments' dtype, and sets no param."""
    peer = make_peer()
    model = peer.model(MIXED)
    optimizer = AdamW(two_groups(model), master_weights="split")
    optimizer.load_state_dict(checkpoint.from_transformer_engine(peer.as_transformer_engine(MIXED, True), model))
    assert_same_bits(masters_of(optimizer), peer.values)
    assert_same_bits([optimizer.state[param]["exp_avg"] for param in model], peer.exp_avgs)


@pytest.mark.parametrize("source", ["apex", "transformer_engine", "bitsandbytes"])
def test_converted_groups_are_torchs(source: str) -> None:
    _, layout, convert = CONVERTERS[source]
    state_dict = layout(make_peer())
    state_dict["param_groups"][0]["lr"] = torch.tensor([0.5])
    theirs = torch.optim.AdamW([Parameter(torch.ones(1))], lr=0.5, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.1)
    group = convert(state_dict)["param_groups"][0]
    assert group == {**theirs.state_dict()["param_groups"][0], "params": [0, 1]}
    assert isinstance(group["lr"], float)


def test_before_the_first_step_there_is_nothing_to_convert_but_groups() -> None:
    peer = make_peer(steps=0)
    for convert, state_dict in [
        (checkpoint.from_apex, peer.as_apex()),
        (checkpoint.from_bitsandbytes, peer.as_bitsandbytes()),
    ]:
        for group in state_dict["param_groups"]:
            group.pop("step", None)
        optimizer = AdamW(two_groups(peer.model(FLOAT32)))
        checkpoint.import_float32(optimizer, convert(state_dict))
        assert not optimizer.state
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.05]


# Refusals


def put(path: tuple[Any, ...], value: Any) -> Callable[[dict[Any, Any]], None]:
    """A corruption: this value there; MISSING takes the key away."""

    def corrupt(state_dict: dict[Any, Any]) -> None:
        *above, key = path
        for step in above:
            state_dict = state_dict[step]
        if value is MISSING:
            del state_dict[key]
        else:
            state_dict[key] = value

    return corrupt


MISSING = object()
ONE = torch.ones(())
A, B = ("state", 0), ("param_groups", 1)
PARAM_3, PARAM_0, IN_0, IN_1 = r"param \(group 1, index 1\)", r"param \(group 0, index 0\)", "group 0", "group 1"
Z = ("state", 3)  # the last param, so that the others have been looked at

LOADING: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no_state": (("state",), MISSING, "'state' must be a dict, but is missing: there are 'param_groups'"),
    "groups_not_a_list": (("param_groups",), 3, "'param_groups' must be a list of dicts, but is 3"),
    "no_groups": (("param_groups",), [], "'param_groups' must be of length 2, but is of length 0"),
    "no_params": ((*B, "params"), MISSING, "'params' of group 1 must be a list of numbers, but is missing"),
    "fewer_params": ((*B, "params"), [2], "'params' of group 1 must be of length 2, but is of length 1"),
    "state_of_a_tensor": (Z, ONE, "'state' of param 3 must be a dict, but is a torch.float32 tensor"),
    "no_step": ((*Z, "step"), MISSING, f"'step' of {PARAM_3} must be a whole number of updates, but is missing: there"),
    "half_a_step": ((*Z, "step"), ONE / 2, f"'step' of {PARAM_3} must be a whole number of updates, but is .* 0.5"),
    "negative_step": ((*Z, "step"), -1.0, f"'step' of {PARAM_3} must be a whole number of updates, but is -1.0"),
    "no_exp_avg": ((*Z, "exp_avg"), MISSING, f"'exp_avg' of {PARAM_3} must be a .*, but is missing: there are 'step'"),
    "shape": ((*Z, "exp_avg_sq"), ONE, rf"'exp_avg_sq' of {PARAM_3} must be .* \(0,\) .*, but is .* of shape \(\)"),
    "integers": ((*A, "exp_avg"), torch.ones(7, 5).int(), f"'exp_avg' of {PARAM_0} must be .*, but is a torch.int32"),
    "no_tensor": ((*A, "exp_avg"), [1.0], rf"'exp_avg' of {PARAM_0} must be .*, but is \[1.0\]"),
    "amsgrad": ((*B, "amsgrad"), True, r"'max_exp_avg_sq' of param \(group 1, index 0\) must be .*, but is missing"),
    "master_dtype": (
        (*A, "master_param"),
        torch.ones(7, 5).bfloat16(),
        rf"'master_param' of {PARAM_0} must be a torch.float32 .* \(7, 5\) .*, but is a torch.bfloat16",
    ),
    "master_shape": ((*A, "master_param"), torch.ones(5), rf"'master_param' of {PARAM_0} .*, but is .* \(5,\)"),
    "remainder": ((*A, "param_remainder"), torch.ones(7, 5).short(), f"'param_remainder' of {PARAM_0} must be joined"),
    "no_lr": ((*B, "lr"), MISSING, "'lr' of group 1 must be a number that is not negative, but is missing"),
    "negative_lr": ((*B, "lr"), -1.0, "'lr' of group 1 must be a number that is not negative, but is -1.0"),
    "nan_eps": ((*B, "eps"), float("nan"), "'eps' of group 1 must be a number that is not negative, but is nan"),
    "betas": ((*B, "betas"), (0.9, 0.9, 0.9), "'betas' of group 1 must be two numbers .*, but is .0.9, 0.9, 0.9."),
    "beta_of_one": (
        (*B, "betas"),
        (0.9, 1.0),
        r"'betas' of group 1 must be two numbers in \[0, 1\), but is .0.9, 1.0.",
    ),
    "seed": ((*B, "seed"), -1, "seed must be an int .*, but is -1 in group 1 of the loaded state dict"),
}


@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize(("path", "value", "message"), LOADING.values(), ids=LOADING.keys())
def test_a_dict_that_does_not_fit_changes_nothing(path: tuple[Any, ...], value: Any, message: str, kind: str) -> None:
    source = AdamW(groups_of(make_params(torch.bfloat16)), master_weights="fp32")
    train(source, range(3))
    exported = checkpoint.export_float32(source)
    put(path, value)(exported)
    target: torch.optim.AdamW = AdamW(groups_of(make_params(torch.bfloat16)), master_weights="split")
    if kind == "torch":
        target = torch.optim.AdamW(groups_of(make_params(torch.float32)))
    train(target, range(5, 6))
    before = copy.deepcopy(everything(target)), copy.deepcopy(target.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        checkpoint.import_float32(target, exported)
    assert_same_bits(everything(target), before[0])
    assert target.state_dict()["param_groups"] == before[1]


@pytest.mark.parametrize("value", [None, [], "state"], ids=repr)
def test_what_is_no_dict_is_refused(value: Any) -> None:
    for load in (
        lambda v: checkpoint.import_float32(AdamW(make_params(torch.float32)), v),
        checkpoint.from_apex,
        lambda v: checkpoint.from_transformer_engine(v, []),
        checkpoint.from_bitsandbytes,
    ):
        with pytest.raises(ValueError, match="must be a dict with 'state' and 'param_groups', but is"):
            load(value)


GROUPS: dict[str, tuple[str, Any, str]] = {
    "no_bias_correction": ("bias_correction", False, "must be True, for AdamW, but is False"),
    "l2": ("adam_w_mode", 0, "must be True, for AdamW, but is 0"),
    "amsgrad": ("amsgrad", True, "must be False, for AdamW, but is True"),
    "maximize": ("maximize", True, "must be False, for AdamW, but is True"),
    "ademamix": ("alpha", 5.0, "must be 0.0, for AdamW, but is 5.0"),
    "three_betas": ("betas", (0.9, 0.9, 0.9), "must be two numbers .*, but is .0.9, 0.9, 0.9."),
    "no_betas": ("betas", MISSING, "must be two numbers .*, but is missing: there are 'lr'"),
    "no_lr": ("lr", MISSING, "must be a number that is not negative, but is missing: there are 'betas'"),
    "bad_eps": ("eps", "small", "must be a number that is not negative, but is 'small'"),
    "no_weight_decay": ("weight_decay", MISSING, "must be a number that is not negative, but is missing"),
}
CONVERTERS: dict[str, tuple[str, Callable[[Peer], dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "apex": ("apex FusedAdam", Peer.as_apex, checkpoint.from_apex),
    "transformer_engine": (
        "TransformerEngine FusedAdam",
        lambda peer: peer.as_transformer_engine(MIXED, True),
        lambda state_dict: checkpoint.from_transformer_engine(state_dict, make_peer().model(MIXED)),
    ),
    "bitsandbytes": ("bitsandbytes", lambda peer: peer.as_bitsandbytes(False), checkpoint.from_bitsandbytes),
}


@pytest.mark.parametrize("source", CONVERTERS)
@pytest.mark.parametrize(("key", "value", "message"), GROUPS.values(), ids=GROUPS.keys())
def test_a_group_of_another_update_is_refused(key: str, value: Any, message: str, source: str) -> None:
    name, layout, convert = CONVERTERS[source]
    state_dict = layout(make_peer())
    put(("param_groups", 1, key), value)(state_dict)
    with pytest.raises(ValueError, match=f"state dict of {name}: {key!r} of group 1 {message}"):
        convert(state_dict)


NUMBERS = torch.ones(7, 5)
ITEMS: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "apex_no_step": (
        "apex",
        ("param_groups", 0, "step"),
        MISSING,
        "'step' of param 0 must be a whole number .* missing",
    ),
    "apex_bad_step": ("apex", ("param_groups", 0, "step"), 1.5, "'step' of param 0 must be a whole number .* is 1.5"),
    "apex_missing": ("apex", (*A, "exp_avg"), MISSING, "'exp_avg' of param 0 .* is missing: there are 'exp_avg_sq'"),
    "apex_dtype": ("apex", (*A, "exp_avg"), NUMBERS.double(), "'exp_avg' of param 0 .*float16, but is a torch.float64"),
    "apex_unknown": (
        "apex",
        (*A, "master"),
        NUMBERS,
        r"'master' of param 0 must be absent \(known are exp_avg, exp_avg_s",
    ),
    "apex_no_group": ("apex", ("state", 9), {}, "'state' must be of params in a group, but is of param 9"),
    "apex_no_dict": ("apex", A, 5, "'state' of param 0 must be a dict, but is 5"),
    "te_float16": (
        "transformer_engine",
        (*A, "exp_avg"),
        NUMBERS.half(),
        "'exp_avg' of param 0 must be a tensor of torch.float32, but is a torch.float16",
    ),
    "te_float8": (
        "transformer_engine",
        (*A, "exp_avg_sq"),
        NUMBERS.byte(),
        "'exp_avg_sq' of param 0 must be a tensor of torch.float32, but is a torch.uint8",
    ),
    "te_master": (
        "transformer_engine",
        (*A, "master_param"),
        NUMBERS.half(),
        "'master_param' of param 0 must be a tensor of torch.float32 or torch.int16, but is a torch.float16",
    ),
    "te_no_master": ("transformer_engine", (*A, "master_param"), None, "'master_param' of param 0 .*, but is None"),
    "te_remainder_shape": (
        "transformer_engine",
        (*A, "master_param"),
        torch.ones(3).short(),
        r"'master_param' of param 0 must be of a torch.bfloat16 param of shape \(3,\), but is of a",
    ),
    "bnb_8bit": (
        "bitsandbytes",
        (*A, "state1"),
        NUMBERS.byte(),
        "'state1' of param 0 must be a tensor of torch.float32, but is a torch.uint8 tensor",
    ),
    "bnb_no_step": (
        "bitsandbytes",
        (*A, "step"),
        MISSING,
        "'step' of param 0 must be a whole number .* there are 'state1'",
    ),
    "bnb_no_group": ("bitsandbytes", ("state", 9), {}, "'state' must be of params in a group, but is of param 9"),
    "bnb_clipping": (
        "bitsandbytes",
        (*A, "gnorm_vec"),
        torch.zeros(100),
        r"'gnorm_vec' of param 0 must be absent \(known are state1, state2, step\), but is a torch.float32",
    ),
    "bnb_is_torchs": (
        "bitsandbytes",
        A,
        {"step": 1.0, "exp_avg": NUMBERS},
        "'state1' of param 0 must be a tensor of torch.float32, but is missing: there are 'step', 'exp_avg'",
    ),
}


@pytest.mark.parametrize(("source", "path", "value", "message"), ITEMS.values(), ids=ITEMS.keys())
def test_a_state_of_another_layout_is_refused(source: str, path: tuple[Any, ...], value: Any, message: str) -> None:
    name, layout, convert = CONVERTERS[source]
    state_dict = layout(make_peer())
    put(path, value)(state_dict)
    with pytest.raises(ValueError, match=f"state dict of {name}: {message}"):
        convert(state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
def test_remainders_need_the_bfloat16_params_that_they_belong_to(dtype: torch.dtype) -> None:
    peer = make_peer()
    state_dict = peer.as_transformer_engine(MIXED, True)
    with pytest.raises(ValueError, match=rf"of param 0 must be of a torch.bfloat16 param .*, but is .* {dtype}"):
        checkpoint.from_transformer_engine(state_dict, peer.model([dtype] * len(SHAPES)))


def test_transformer_engines_params_are_counted() -> None:
    peer = make_peer()
    with pytest.raises(ValueError, match="'params' of all groups must be of length 3, but is of length 4"):
        checkpoint.from_transformer_engine(peer.as_transformer_engine(MIXED, True), peer.model(MIXED)[:3])


@pytest.mark.parametrize("source", CONVERTERS)
def test_a_conversion_leaves_what_it_converts_alone(source: str) -> None:
    """And so does an import, though torch's load_state_dict keeps the tensors that it is given."""
    _, layout, convert = CONVERTERS[source]
    state_dict, untouched = layout(make_peer()), layout(make_peer())
    converted = convert(state_dict)
    before = copy.deepcopy(converted)
    optimizer = torch.optim.AdamW(two_groups(make_peer().model(FLOAT32)))
    checkpoint.import_float32(optimizer, converted)
    train(optimizer, range(1))
    assert_same_contents(state_dict, untouched)
    assert_same_contents(converted, before)
