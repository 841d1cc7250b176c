"""`moment_dtype`: what new and loaded moments are stored in."""

import copy
import pickle

import pytest
import torch

from adamw_ext import AdamW
from tests.reference import Textbook

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(7, 5), (64,), (0,)]]


def train(optimizer: AdamW, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def moments_of(optimizer: AdamW) -> list[torch.Tensor]:
    return [state[key] for state in optimizer.state.values() for key in state if key != "step"]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param", PARAM_DTYPES, ids=str)
def test_moments_have_the_dtype_and_the_textbooks_numbers(param, moment, amsgrad):
    params = make_params(param)
    optimizer = AdamW(params, lr=0.01, moment_dtype=moment, amsgrad=amsgrad)
    textbook = Textbook(params, lr=0.01, amsgrad=amsgrad)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(param)
        textbook.step([p.grad for p in params])
        optimizer.step()
    moments = moments_of(optimizer)
    assert len(moments) == len(params) * (3 if amsgrad else 2)
    assert {m.dtype for m in moments} == {moment}
    tolerance = 1e-6 if moment == torch.float32 else 2e-2
    for p, exp_avg, exp_avg_sq in zip(params, textbook.exp_avgs, textbook.exp_avg_sqs, strict=True):
        state = optimizer.state[p]
        torch.testing.assert_close(state["exp_avg"].double(), exp_avg, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["exp_avg_sq"].double(), exp_avg_sq, rtol=tolerance, atol=tolerance)


def test_every_group_may_have_its_own():
    params = make_params(torch.bfloat16)
    groups = [{"params": params[:1]}, {"params": params[1:], "moment_dtype": None}]
    optimizer = AdamW(groups, moment_dtype=torch.float32)
    optimizer.add_param_group({"params": make_params(torch.bfloat16), "moment_dtype": torch.bfloat16})
    optimizer.add_param_group({"params": make_params(torch.float32)})
    optimizer.init_state()
    found = [optimizer.state[group["params"][0]]["exp_avg"].dtype for group in optimizer.param_groups]
    assert found == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def test_without_it_group_keys_are_torchs():
    params = make_params(torch.float32)
    assert AdamW(params).param_groups[0].keys() == torch.optim.AdamW(params).param_groups[0].keys()


def test_loaded_moments_are_converted_to_what_was_asked_for():
    source = AdamW(make_params(torch.bfloat16), moment_dtype=torch.float32)
    train(source, 2)
    for moment_dtype in (torch.float32, torch.bfloat16, None):
        target = AdamW(make_params(torch.bfloat16), moment_dtype=moment_dtype)
        target.load_state_dict(source.state_dict())
        loaded, expected = moments_of(target), moments_of(source)
        # None keeps what the dict has.
        assert {m.dtype for m in loaded} == {moment_dtype or torch.float32}
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(loaded, expected, strict=True))
        assert target.param_groups[0].get("moment_dtype") == moment_dtype
        train(target, 1)
        assert {m.dtype for m in moments_of(target)} == {moment_dtype or torch.float32}


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_keeps_it_for_groups_to_come(make_copy):
    original = AdamW(make_params(torch.bfloat16), moment_dtype=torch.float32)
    train(original, 1)
    duplicate = make_copy(original)
    duplicate.add_param_group({"params": make_params(torch.bfloat16)})
    train(duplicate, 1)
    assert {m.dtype for m in moments_of(duplicate)} == {torch.float32}


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path):
    runs = []
    for stops in (False, True):
        params = make_params(torch.float32)
        optimizer = AdamW(params, moment_dtype=torch.bfloat16)
        train(optimizer, 3, seed=1)
        if stops:
            torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
            optimizer = AdamW(params, moment_dtype=torch.bfloat16)
            optimizer.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        train(optimizer, 3, seed=2)
        runs.append([*(param.detach() for param in params), *moments_of(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("value", [torch.float16, torch.float64, torch.int8, "bfloat16", 16], ids=str)
def test_other_dtypes_are_refused(value):
    with pytest.raises(ValueError, match=r"moment_dtype must be torch.float32, torch.bfloat16 or None, but is"):
        AdamW(make_params(torch.float32), moment_dtype=value)


@pytest.mark.parametrize(
    ("dtype", "moment"), [(torch.float64, torch.float32), (torch.complex64, torch.bfloat16)], ids=str
)
def test_a_param_without_such_a_kernel_is_refused_and_nothing_is_left_behind(dtype, moment):
    params = [torch.ones(3, requires_grad=True), torch.ones(3, dtype=dtype, requires_grad=True)]
    optimizer = AdamW(params, moment_dtype=moment)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=f"moment_dtype={moment} has no kernel for a {dtype} param on cpu"):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(param, torch.ones(3, dtype=param.dtype)) for param in params)


def test_moments_of_two_bytes_take_two_bytes():
    """Measured from storages, as bytes for one param: param, gradient and two moments."""

    def state_bytes(moment_dtype):
        param = torch.nn.Parameter(torch.ones(1000))
        optimizer = AdamW([param], moment_dtype=moment_dtype)
        optimizer.init_state()
        moments = [value for key, value in optimizer.state[param].items() if key != "step"]
        return sum(moment.untyped_storage().nbytes() for moment in moments) / 1000

    assert state_bytes(None) == state_bytes(torch.float32) == 8
    assert state_bytes(torch.bfloat16) == 4
