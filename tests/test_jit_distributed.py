"""The parts of torch.distributed that want a functional optimizer find ours, in real processes on this machine."""

import inspect
import os

import pytest
import torch
from torch import Tensor, nn

import adamw_ext
from adamw_ext.jit import FunctionalAdamW
from tests import processes
from tests.helpers import assert_same_bits

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported):DeprecationWarning"),
]

HYPER = {"lr": 0.1, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True}
PROCESSES = 2
STEPS = 5


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(net: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return net(torch.randn(8, 6, generator=generator)).square().mean()


# --- The registration ------------------------------------------------------------------------------------------------


def test_torch_finds_the_functional_optimizer():
    from torch.distributed.optim import as_functional_optim
    from torch.distributed.optim.utils import functional_optim_map

    assert functional_optim_map[adamw_ext.AdamW] is FunctionalAdamW
    functional = as_functional_optim(adamw_ext.AdamW, lr=0.25, betas=(0.5, 0.75))
    assert type(functional) is FunctionalAdamW
    assert functional.defaults["lr"] == 0.25
    assert functional.param_group == {"params": []}
    assert "_allow_empty_param_list" in inspect.signature(FunctionalAdamW).parameters


def test_torchs_own_optimizers_keep_theirs():
    from torch.distributed.optim.functional_adamw import _FunctionalAdamW
    from torch.distributed.optim.utils import functional_optim_map

    assert functional_optim_map[torch.optim.AdamW] is _FunctionalAdamW


# --- DistributedOptimizer over RPC -----------------------------------------------------------------------------------

OWNED: list[Tensor] = []  # what this process keeps alive for the other


def own_param(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    OWNED.append(torch.randn(4, 3, generator=generator).requires_grad_())
    return OWNED[-1]


def assert_runs_functional(optimizer: object) -> None:
    """In the owner's process: the local optimizer is a compiled script that holds ours and calls the operator."""
    step = optimizer.local_value()._get_method("step")
    assert "adamw_ext.jit.FunctionalAdamW" in str(step.graph)
    assert "adamw_ext::adamw_" in str(step.inlined_graph)


def train_over_rpc() -> None:
    import torch.distributed.autograd as dist_autograd
    from torch.distributed import rpc
    from torch.distributed.optim import DistributedOptimizer

    rank = int(os.environ["RANK"])
    options = rpc.TensorPipeRpcBackendOptions(init_method=processes.rendezvous(), rpc_timeout=60.0)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=PROCESSES, rpc_backend_options=options)
    if rank == 0:
        owners = ["worker0", "worker1", "worker1"]
        rrefs = [rpc.remote(owner, own_param, args=(seed,)) for seed, owner in enumerate(owners)]
        optimizer = DistributedOptimizer(adamw_ext.AdamW, rrefs, **HYPER)
        twins = [own_param(seed) for seed in range(3)]
        local = adamw_ext.AdamW(twins, **HYPER)
        assert optimizer.is_functional_optim
        for each in optimizer.remote_optimizers:
            rpc.rpc_sync(each.owner(), assert_runs_functional, args=(each,))
        for step in range(STEPS):
            used = slice(0, 3 if step % 2 else 2)  # the last param has no gradient at some steps
            with dist_autograd.context() as context:
                values = [rref.to_here() for rref in rrefs[used]]
                dist_autograd.backward(context, [sum((value * value.tanh()).sum() for value in values)])
                optimizer.step(context)
            local.zero_grad()
            sum((value * value.tanh()).sum() for value in twins[used]).backward()
            local.step()
            assert_same_bits([rref.to_here() for rref in rrefs], twins, f"step {step}")
        assert all(not torch.equal(twin, own_param(seed)) for seed, twin in enumerate(twins))
    rpc.shutdown()


@pytest.mark.skipif(not hasattr(torch._C, "_rpc_init"), reason="this torch is built without RPC")
def test_distributed_optimizer_gives_the_bits_of_a_local_run():
    processes.run(train_over_rpc, PROCESSES, backend=None)


# --- DDP -------------------------------------------------------------------------------------------------------------


# DDP's destructor holds the interpreter lock and waits for gloo's threads, one of which may wait for that lock to drop
# a hook that is done: a process keeps its models and ends without destructors.
KEPT: list[nn.Module] = []


def wrap(net: nn.Module) -> nn.parallel.DistributedDataParallel:
    """With a bucket for every few params."""
    ddp = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1e-4)
    KEPT.append(ddp)
    return ddp


def train_plain(idle_steps: int = 0) -> nn.Module:
    """DDP and the optimizer class after backward, which is what the others must give the bits of."""
    rank = torch.distributed.get_rank()
    net = make_net()
    ddp = wrap(net)
    optimizer = adamw_ext.AdamW(net.parameters(), **HYPER)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        if step >= idle_steps:
            optimizer.step()
    assert not torch.equal(net[0].weight, make_net()[0].weight)
    return net


def train_with_optimizer_in_the_hook() -> None:
    rank = torch.distributed.get_rank()
    expected = train_plain()

    net = make_net()
    ddp = wrap(net)
    ddp._register_fused_optim(adamw_ext.AdamW, **HYPER)
    for step in range(STEPS):
        loss_of(ddp, rank, step).backward()
        ddp.zero_grad()
    assert_same_bits(list(net.parameters()), list(expected.parameters()))

    net = make_net()
    ddp = wrap(net)
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, optimizer_overlap_hooks
    from torch.distributed.optim import as_functional_optim

    functional = as_functional_optim(adamw_ext.AdamW, **HYPER)
    state = optimizer_overlap_hooks._OptimizerHookState(functional)
    ddp.register_comm_hook(None, optimizer_overlap_hooks._hook_then_optimizer(default_hooks.allreduce_hook, state))
    for step in range(STEPS):
        loss_of(ddp, rank, step).backward()
        ddp.zero_grad()
    assert_same_bits(list(net.parameters()), list(expected.parameters()))
    assert [state["step"].item() for state in functional.state.values()] == [STEPS] * 6


def test_ddp_with_the_optimizer_in_its_hook_gives_the_bits_of_a_step_after_backward():
    processes.run(train_with_optimizer_in_the_hook, PROCESSES)


def train_with_overlapping_zero() -> None:
    """torch refuses gloo by its name here, because collectives of the interleaved hook may start in another order on
    another rank. This hook starts them in one order, so that the check is all that keeps it from the CPU: gloo under
    another name passes.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make_gloo(store, group_rank, group_size, timeout):
        return torch.distributed.ProcessGroupGloo(store, group_rank, group_size, timeout=timeout)

    torch.distributed.Backend.register_backend("renamed_gloo", make_gloo, devices=["cpu"])
    processes.start_group("renamed_gloo")
    rank = torch.distributed.get_rank()
    expected = train_plain(idle_steps=2)  # those in which the hook learns DDP's buckets

    net = make_net()
    ddp = wrap(net)
    zero = ZeroRedundancyOptimizer(net.parameters(), adamw_ext.AdamW, overlap_with_ddp=True, **HYPER)
    ddp.register_comm_hook(None, hook_with_zero_step(allreduce_hook, ddp, zero))
    for step in range(STEPS):
        ddp.zero_grad()
        loss_of(ddp, rank, step).backward()
    assert type(zero.optim) is FunctionalAdamW
    assert 0 < len(zero.optim.state) < len(list(net.parameters()))  # a shard
    assert {state["step"].item() for state in zero.optim.state.values()} == {STEPS - 2}
    assert_same_bits(list(net.parameters()), list(expected.parameters()))


def test_zero_that_overlaps_with_ddp_gives_the_bits_of_plain_ddp():
    processes.run(train_with_overlapping_zero, PROCESSES, backend=None)


# --- Steps within backward -------------------------------------------------------------------------------------------


def test_steps_applied_in_backward_give_the_bits_of_a_step_after_it():
    from torch.distributed.optim import _apply_optimizer_in_backward

    net, twin = make_net(), make_net()
    _apply_optimizer_in_backward(adamw_ext.AdamW, net.parameters(), HYPER)
    optimizer = adamw_ext.AdamW(twin.parameters(), **HYPER)
    for step in range(STEPS):
        loss_of(net, 0, step).backward()
        optimizer.zero_grad()
        loss_of(twin, 0, step).backward()
        optimizer.step()
        assert_same_bits(list(net.parameters()), list(twin.parameters()), f"step {step}")
    assert all(param.grad is None for param in net.parameters())
    assert not torch.equal(net[0].weight, make_net()[0].weight)
