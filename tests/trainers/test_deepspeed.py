"""DeepSpeed: our optimizer as its client optimizer, in two processes on the CPU, with every stage of ZeRO."""

from typing import Any

import pytest
import torch

from tests.helpers import assert_same_bits, on_cpu
from tests.trainers.deepspeed_processes import CONFIGS, STEPS, make_model, train_all
from tests.trainers.helpers import assert_continued, assert_trained_alike, run_processes

pytestmark = pytest.mark.trainers

# Float32 params differ by their rounding, about 1e-7 of each in a step; eps keeps gradients that are nearly 0 from
# blowing it up. Bfloat16 ones, rounded from float32 masters at each step, may differ by one bit of 8, and the next
# gradients with them. A param moves by about 4e-2 in all.
TOLERANCES = {"float32": {"rtol": 1e-4, "atol": 1e-5}, "bfloat16": {"rtol": 2e-2, "atol": 2e-3}}

# Whatever the optimizer, this one makes a step with zero gradients when its engine is built.
EXTRA_STEPS = {"stage0-bfloat16": 1}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes got. DeepSpeed first compiles its shared-memory operator, which takes longest."""
    folder = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        # A folder of its own: in a kept one, a build that was killed leaves a lock on which the next waits for ever.
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        patch.setenv("DS_ACCELERATOR", "cpu")
        run_processes(train_all, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("config", CONFIGS)
def test_trains_as_with_torchs(ranks: list[dict[str, Any]], config: str):
    dtype = "bfloat16" if "bfloat16" in config else "float32"
    start = on_cpu(make_model().to(getattr(torch, dtype)).parameters())
    steps = STEPS + EXTRA_STEPS.get(config, 0)
    for results in ranks:
        ours, theirs, _, _ = results[config]
        assert_trained_alike(ours, theirs, start, steps=steps, **TOLERANCES[dtype])
    (one, *_), (other, *_) = (results[config] for results in ranks)
    assert one.losses != other.losses  # each has its own batches
    assert_same_bits(one.params, other.params)
    is_shared_out = "stage0" not in config
    assert (sum(t.numel() for t in one.state) < 2 * sum(p.numel() for p in start)) == is_shared_out


@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_from_deepspeeds_checkpoint_the_bits_are_those_of_never_stopping(
    ranks: list[dict[str, Any]], config: str
):
    for results in ranks:
        _, _, unbroken, resumed = results[config]
        assert len(resumed.losses) < len(unbroken.losses)
        assert_continued(resumed, unbroken)


def test_zero_wants_to_be_told_of_an_untested_optimizer(ranks: list[dict[str, Any]]):
    assert all("zero_allow_untested_optimizer" in results["untested"] for results in ranks)


def test_offload_wants_to_be_told_of_an_optimizer_that_is_not_deepspeeds(ranks: list[dict[str, Any]]):
    assert all("zero_force_ds_cpu_optimizer" in results["offload"] for results in ranks)
