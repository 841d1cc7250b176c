"""FSDP2 and tensor parallelism as users run them: real backward passes, and the bits of the unsharded optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamw_ext import AdamW
from tests.helpers import assert_same_bits
from tests.processes import run
from tests.test_sharded import HYPER, whole

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")

BFLOAT16 = torch.bfloat16
STEPS = 4


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Odd sizes: shards are uneven, on 4 processes some are empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3), nn.LayerNorm(3), nn.Linear(3, 2)).to(dtype)


def batch(step: int, part: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + part)).to(dtype)


def fsdp(net: nn.Sequential, mesh: Any, **options: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def cpu_mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (torch.distributed.get_world_size(),), mesh_dim_names=names)


def train_beside_the_whole(
    net: nn.Module, options: dict[str, Any], dtype: torch.dtype = torch.float32, part: int | None = None
) -> tuple[AdamW, float]:
    """Train a sharded net, and an unsharded one with the same gradients; they must have the same bits, and the loss
    must fall. Returns the optimizer, and the difference from torch's AdamW at the end."""
    part = torch.distributed.get_rank() if part is None else part
    params = list(net.parameters())
    twins, thirds = ([whole(param).clone().requires_grad_() for param in params] for _ in range(2))
    optimizer, reference = AdamW(params, **HYPER, **options), AdamW(twins, **HYPER, **options)
    theirs = torch.optim.AdamW(thirds, **HYPER)
    losses, steppers = [], set()
    for step in range(STEPS):
        loss = net(batch(step % 2, part, dtype)).square().mean()
        loss.backward()
        losses.append(loss.item())
        for param, twin, third in zip(params, twins, thirds, strict=True):
            twin.grad = whole(param.grad)
            third.grad = twin.grad.to(third.dtype)
        optimizer.step()
        reference.step()
        theirs.step()
        steppers.add(id(optimizer._stepper))
        optimizer.zero_grad()
    assert len(steppers) == 1
    assert optimizer._elsewhere == []
    assert [optimizer.state[param]["step"].item() for param in params] == [STEPS] * len(params)
    assert_same_bits([whole(param) for param in params], [twin.detach() for twin in twins])
    for param, twin in zip(params, twins, strict=True):
        state, expected = optimizer.state[param], reference.state[twin]
        assert_same_bits([whole(state[key]) for key in expected], list(expected.values()))
    assert losses[-1] < 0.9 * losses[0]
    return optimizer, max((whole(p) - third).abs().max().item() for p, third in zip(params, thirds, strict=True))


# --- FSDP2 ------------------------------------------------------------------------------------------------------------

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "clipped": (torch.float32, {"max_grad_norm": 0.3}),
    "capturable": (torch.float32, {"capturable": True, "max_grad_norm": 0.3}),
    "fp32 masters": (BFLOAT16, {"master_weights": "fp32"}),
    "split masters": (BFLOAT16, {"master_weights": "split", "moment_dtype": torch.float32}),
    "random weights": (BFLOAT16, {"stochastic_rounding": True}),
}


def train_modes() -> None:
    for dtype, options in MODES.values():
        _, difference = train_beside_the_whole(fsdp(make_net(dtype), cpu_mesh()), options, dtype)
        if options == {}:
            assert 0.0 < difference < 1e-6  # another rounding of the decay


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_fsdp_trains_with_the_bits_of_the_unsharded_optimizer(processes: int):
    run(train_modes, processes)


def train_hybrid() -> None:
    mesh = cpu_mesh(2, 2, names=("replicate", "shard"))
    for dtype, options in MODES.values():
        train_beside_the_whole(fsdp(make_net(dtype), mesh), options, dtype)


def test_hybrid_sharding_trains_with_the_bits_of_the_unsharded_optimizer():
    run(train_hybrid, 4)


def train_cut_across() -> None:
    from torch.distributed.tensor import Shard

    def last_dimension(param: nn.Parameter) -> Shard:
        return Shard(param.dim() - 1)

    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(BFLOAT16)
    net = fsdp(net, cpu_mesh(), shard_placement_fn=last_dimension)
    assert any(param.placements == (Shard(1),) for param in net.parameters())
    train_beside_the_whole(net, {"stochastic_rounding": True}, BFLOAT16)


def test_weights_that_are_cut_across_their_rows_have_the_random_bits_of_the_whole():
    run(train_cut_across, 2)


def train_with_policies() -> dict[str, torch.dtype]:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    found = {}
    policies = {
        "bfloat16 compute": (torch.float32, MixedPrecisionPolicy(param_dtype=BFLOAT16)),
        "float32 reduction": (BFLOAT16, MixedPrecisionPolicy(reduce_dtype=torch.float32)),
    }
    for name, (dtype, policy) in policies.items():
        net = fsdp(make_net(dtype), cpu_mesh(), mp_policy=policy)
        net(batch(0, 0, dtype)).float().square().mean().backward()
        found[name] = next(net.parameters()).grad.dtype
        net.zero_grad()
        train_beside_the_whole(net, {"max_grad_norm": 0.3}, dtype)
    net = fsdp(make_net(), cpu_mesh(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    train_beside_the_whole(net, {})
    return found


def test_mixed_precision_and_offload_policies():
    found = run(train_with_policies, 2)
    # FSDP2 hands out gradients of the param's dtype. For others see test_sharded.py.
    assert found == [{"bfloat16 compute": torch.float32, "float32 reduction": BFLOAT16}] * 2


def train_and_clip_with_torch() -> None:
    ours, theirs = (fsdp(make_net(), cpu_mesh()) for _ in range(2))
    optimizers = AdamW(ours.parameters(), **HYPER, max_grad_norm=0.3), torch.optim.AdamW(theirs.parameters(), **HYPER)
    for step in range(STEPS):
        for net in (ours, theirs):
            net(batch(step, torch.distributed.get_rank(), torch.float32)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3).full_tensor()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(optimizers[0].grad_norm, norm.double(), rtol=1e-6, atol=0.0)
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(whole(param), whole(other), rtol=1e-5, atol=1e-6)


def test_clipping_is_by_the_global_norm_as_clip_grad_norm_():
    run(train_and_clip_with_torch, 2)


def accumulate() -> None:
    nets = [fsdp(make_net(), cpu_mesh()) for _ in range(2)]
    optimizers = [AdamW(net.parameters(), **HYPER) for net in nets]
    rank = torch.distributed.get_rank()
    for step in range(3):
        for i, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            if i == 0:
                net.set_requires_gradient_sync(False)
                net(batch(step, rank, torch.float32)).square().sum().backward()
                net.set_requires_gradient_sync(True)
                net(batch(step, rank + 10, torch.float32)).square().sum().backward()
            else:
                inputs = torch.cat([batch(step, part, torch.float32) for part in (rank, rank + 10)])
                net(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for param, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(whole(param), whole(other), rtol=1e-5, atol=1e-6)


def test_gradients_that_were_accumulated_without_a_reduction():
    run(accumulate, 2)


# --- Tensor parallelism -----------------------------------------------------------------------------------------------


def parallel_net(mesh: Any, dtype: torch.dtype) -> nn.Sequential:
    """Weights cut by columns and by rows, and a norm whose gradients come as summands."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    plan = {
        "0": SequenceParallel(sequence_dim=0),
        "1": [
            PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()),
            ColwiseParallel(),
        ],
        "3": RowwiseParallel(),
    }
    for name, styles in plan.items():
        for style in styles if isinstance(styles, list) else [styles]:
            parallelize_module(net.get_submodule(name), mesh, style)
    return net


def train_parallel(build: Callable[[torch.dtype], nn.Module]) -> None:
    for dtype, options in MODES.values():
        net = build(dtype)
        train_beside_the_whole(net, options, dtype, part=0)


def tensor_parallel(dtype: torch.dtype) -> nn.Module:
    return parallel_net(cpu_mesh(), dtype)


def fsdp_over_tensor_parallel(dtype: torch.dtype) -> nn.Module:
    mesh = cpu_mesh(2, 2, names=("data", "tensor"))
    return fsdp(parallel_net(mesh["tensor"], dtype), mesh["data"])


def test_tensor_parallel_params_have_the_bits_of_the_unsharded_optimizer():
    run(train_parallel, 2, tensor_parallel)


def test_fsdp_over_tensor_parallelism_has_the_bits_of_the_unsharded_optimizer():
    run(train_parallel, 4, fsdp_over_tensor_parallel)
