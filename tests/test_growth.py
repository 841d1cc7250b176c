"""The growth benchmark steps what it says it steps, and keeps within the memory that it may take."""

import json

import pytest
import torch

from benchmarks import growth
from benchmarks.growth import MAKERS, SINGLE, Point
from benchmarks.peers import FLOOR, OURS
from tests.helpers import assert_same_bits

GIGABYTE = 10**9


def test_large_tensors_are_float32_where_that_fits_then_bfloat16_then_left_out():
    assert growth.fitting(10**9, 25 * GIGABYTE) == Point(1, 10**9, torch.float32)
    assert growth.fitting(10**9, 23 * GIGABYTE) == Point(1, 10**9, torch.bfloat16)
    assert growth.fitting(10**9, 11 * GIGABYTE) is None


@pytest.mark.parametrize("elements", [1, 64, growth.PATTERN + 5])
def test_params_and_gradients_are_normal_numbers_of_the_size_asked_for(elements):
    params = growth.make_params(Point(2, elements))
    assert [param.shape for param in params] == [(elements,)] * 2
    for param in params:
        assert param.grad.shape == param.shape
        assert param.isfinite().all()
        assert param.grad.abs().max() > 0


@pytest.mark.usefixtures("one_thread")
def test_with_shared_state_every_optimizer_steps_the_same_moments():
    (param,) = params = growth.make_params(Point(1, 1000))
    steps = growth.shared_state(params, MAKERS)
    state = steps[OURS].__self__.state[param]
    for name in MAKERS:
        before = state["exp_avg"].clone()
        steps[name]()
        assert (state["exp_avg"] != before).any(), name
    assert state["step"] == len(MAKERS)
    kept = [tensor.detach().clone() for tensor in (param, param.grad, state["exp_avg"], state["exp_avg_sq"])]
    steps[FLOOR]()
    assert_same_bits([param, param.grad, state["exp_avg"], state["exp_avg_sq"]], kept)


def test_a_step_that_leaves_a_tensor_as_it_was_is_refused():
    params = growth.make_params(Point(3, 64))
    optimizer = torch.optim.AdamW(params[:2])
    with pytest.raises(RuntimeError, match="elements of tensor 2 of 3"):
        growth.check_moves("partial", optimizer.step, params)


@pytest.mark.usefixtures("one_thread")
def test_a_run_has_both_curves_a_report_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks.growth_picture import draw

    monkeypatch.setattr(growth, "SINGLE_TENSORS", 3)
    curves = growth.measure_all((1, 10), (1000, 3000, 10**12), 0.01, GIGABYTE)
    result = json.loads(json.dumps({**growth.conditions(), "threads": 1, "quick": True, **curves}))
    assert [point["tensors"] for point in result["by_tensors"]] == [1, 10]
    assert [SINGLE in point["seconds"] for point in result["by_tensors"]] == [True, False]
    assert [point["elements"] for point in result["by_elements"]] == [1000, 3000]
    for point in result["by_tensors"] + result["by_elements"]:
        assert 0 < point["over_floor"][OURS]["q1"] <= point["over_floor"][OURS]["q3"]
        assert point["over_ours"][OURS]["median"] == 1
    text = growth.markdown(result)
    assert "Left out: 1,000,000,000,000 elements" in text
    result["by_elements"][1]["dtype"] = "bf16"  # drawn as circles
    draw(result, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"growth-elements-{result['date']}.png",
        f"growth-tensors-{result['date']}.png",
    ]
