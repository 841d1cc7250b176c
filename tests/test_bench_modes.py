"""The precision modes' benchmark: bytes are counted where they lie, the floor moves them, the report shows it all."""

import json

import pytest
import torch
from torch.nn import Parameter

from adamw_ext import AdamW
from benchmarks import mode_bytes, mode_timing, modes, modes_report
from benchmarks.buffers_floor import buffers_floor, part
from benchmarks.mode_peers import FUSED, OTHER, Subject, subjects, torch_fused
from benchmarks.precision import BF16, FP32, MODES
from benchmarks.workloads import Workload
from tests.helpers import assert_same_bits, running_on

# param + state, by the constructor's arguments alone
BYTES_KEPT = {
    "float32": 4 + 8,
    "float32, bf16 moments, SR": 4 + 4,
    "bf16": 2 + 4,
    "bf16, fp32 moments": 2 + 8,
    "bf16, fp32 master, fp32 moments": 2 + 4 + 8,
    "bf16, split master, fp32 moments": 2 + 2 + 8,
    "bf16, split master": 2 + 2 + 4,
    "bf16, split master, SR": 2 + 2 + 4,
    "bf16, SR, fp32 moments": 2 + 8,
    "bf16, SR": 2 + 4,
}


def make_params(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[Parameter]:
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_bytes_are_those_of_the_storages(mode):
    params = make_params(mode.dtype, [(1000, 64), (64,)])
    optimizer = AdamW(params, **mode.options)
    optimizer.step()
    per_param = mode_bytes.memory(optimizer, params)
    # Step counts are 4 bytes for each tensor.
    assert mode_bytes.kept(per_param) == pytest.approx(BYTES_KEPT[mode.name], abs=0.001)
    assert per_param["grad"] == mode.dtype.itemsize
    assert mode_bytes.moved(per_param) == pytest.approx(2 * BYTES_KEPT[mode.name] + mode.dtype.itemsize, abs=0.001)
    assert mode_bytes.moved(per_param, clips=True) == mode_bytes.moved(per_param) + mode.dtype.itemsize


def test_every_byte_to_be_moved_is_a_buffer_of_the_floor():
    params = make_params(BF16, [(33, 7), (5,)])
    optimizer = AdamW(params, master_weights="split", moment_dtype=FP32)
    optimizer.step()
    buffers = [buffer for row in mode_bytes.step_buffers(optimizer, params) for buffer in row]
    touched = sum(tensor.nbytes * (2 if is_written else 1) for tensor, is_written in buffers)
    assert touched == (33 * 7 + 5) * (2 * 2 + 2 * 2 + 2 * 8 + 2)


def test_the_formula_names_each_tensor_and_leaves_step_counts_out():
    params = make_params(BF16, [(1000, 64)])
    optimizer = AdamW(params, master_weights="split", moment_dtype=FP32)
    optimizer.step()
    state = "exp_avg 4 + exp_avg_sq 4 + param_remainder 2"
    text = f"read param 2 + {state} + grad 2; write param 2 + {state}"
    assert mode_bytes.formula(mode_bytes.memory(optimizer, params)) == text
    clipping = mode_bytes.formula(mode_bytes.memory(optimizer, params), clips=True)
    assert clipping == f"read grad 2, then {text}"


def test_wrapped_state_is_counted_by_what_it_holds():
    class Wrapped(torch.Tensor):
        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    wrapped = Wrapped()
    wrapped.codes, wrapped.scale = torch.zeros(256, dtype=torch.uint8), torch.zeros(1)
    assert mode_bytes.stored_bytes(mode_bytes.plain_tensors(wrapped)) == 256 + 4
    assert mode_bytes.stored_bytes([wrapped.codes, wrapped.codes[:3]]) == 256


@pytest.mark.parametrize("nbytes", [1, 63, 64, 1000, 64 * 1024 + 8])
@pytest.mark.parametrize("pieces", [1, 3, 17])
def test_parts_of_a_buffer_follow_each_other_and_cover_it(nbytes, pieces):
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    parts = [part(buffer, True, nbytes, piece, pieces) for piece in range(pieces)]
    assert sum(one.bytes for one in parts) == nbytes
    at = buffer.data_ptr()
    for one in (one for one in parts if one.bytes):
        assert one.data == at
        at += one.bytes


def test_the_floor_reads_and_writes_everything_and_changes_nothing():
    rows = []
    for count in (1, 31, 70_001):
        noise = [torch.randn(count), torch.randn(count).to(BF16), torch.randint(256, (count,), dtype=torch.uint8)]
        noise.append(torch.randn(1 + count // 256))
        rows.append([(tensor, index != 1) for index, tensor in enumerate(noise)])
    before = [tensor.clone() for row in rows for tensor, _ in row]
    step = buffers_floor(rows)
    step()
    after = [tensor for row in rows for tensor, _ in row]
    assert_same_bits([t for t in after if t.is_floating_point()], [t for t in before if t.is_floating_point()])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    # With a mask that is not zero, what is written shows: every word of what is to be written, and nothing else.
    step(mask=2**64 - 1)
    for (tensor, is_written), old in zip([pair for row in rows for pair in row], before, strict=True):
        flipped = old.view(torch.uint8).bitwise_not()
        assert torch.equal(tensor.view(torch.uint8), flipped if is_written else old.view(torch.uint8))


def make_bench() -> mode_timing.Bench:
    shapes = ((64, 16), (16,))
    return mode_timing.Bench({dtype: Workload("tiny", "tiny, one of two", dtype, shapes) for dtype in (FP32, BF16)})


@pytest.fixture(scope="module")
def result():
    """A run over a tiny model, with subjects of which nothing can be measured."""
    bench = make_bench()
    chosen = [subject for subject in subjects() if subject.kind != OTHER]
    chosen.append(Subject("broken", OTHER, BF16, lambda params: torch_fused([]), least_seconds=0.0))
    chosen.append(Subject("idle", OTHER, BF16, lambda params: torch.optim.SGD(params, lr=0.0), least_seconds=0.0))
    chosen.append(Subject("absent", OTHER, BF16, torch_fused, "no_such_module"))
    chosen.append(Subject("late", OTHER, BF16, torch_fused, least_seconds=1e9))
    measured = modes.facts(bench)
    with running_on(threads=1):
        modes.measure_all(chosen, bench, measured, seconds=0.01, longest=1000.0, save=lambda: None)
    return json.loads(json.dumps(measured))


def test_a_run_has_every_mode_with_its_floor_and_both_of_torchs(result):
    assert set(result["modes"]) == {mode.name for mode in MODES} | set(FUSED.values())
    for mode in result["modes"].values():
        assert set(mode["fused_over_it"]) == set(FUSED.values())
        assert 0 < mode["over_floor"]["q1"] <= mode["over_floor"]["q3"]
        assert mode["rounds"] >= 9
    for entry in result["clipping"].values():
        assert set(entry["over_it"]) >= {mode_timing.TORCH_AFTER, mode_timing.OURS_AFTER, mode_timing.NOT_CLIPPED}
    assert set(result["clipping"]) == {"float32", "bf16"}


def test_what_could_not_be_measured_has_a_line_that_says_why(result):
    text = modes_report.markdown(result).partition("## Not measured")[2]
    assert set(result["failures"]) == {"broken", "idle", "absent", "late"}
    assert "- broken: ValueError" in text
    assert "- idle: RuntimeError: a step of idle left" in text
    assert "- absent: no_such_module is not installed." in text
    assert "- late: no time was left for it." in text


def test_the_report_has_a_row_for_each_mode_and_judges_clipping(result):
    text = modes_report.markdown(result)
    for name in result["modes"]:
        assert text.count(f"| **{name}** |") + text.count(f"| {name} |") >= 2  # of the times and of the formulas
    judged = dict(result, clipping={"float32": json.loads(json.dumps(result["clipping"]["float32"]))})
    for median, verdict in ((1.31, ", reached."), (1.29, ", not reached.")):
        judged["clipping"]["float32"]["over_it"][mode_timing.TORCH_AFTER]["median"] = median
        assert verdict in modes_report.markdown(judged)


def test_a_step_that_is_too_slow_to_interleave_is_timed_all_the_same(monkeypatch, one_thread):
    monkeypatch.setattr(mode_timing, "SLOW_SECONDS", 0.0)
    bench = make_bench()
    measured = modes.facts(bench)
    slow = Subject("slow", OTHER, BF16, torch_fused)
    mode_timing.measure_group([slow], bench, measured, 0.01)
    assert measured["modes"]["slow"]["rounds"] == mode_timing.SLOW_ROUNDS
    assert "2 steps, too slow to interleave" in modes_report.markdown(measured)


def test_the_picture_is_drawn(result, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.modes_picture import draw

    draw(result, tmp_path / "modes.png")
    assert (tmp_path / "modes.png").read_bytes().startswith(b"\x89PNG")
