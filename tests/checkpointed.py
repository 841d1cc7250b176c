"""Small models, whole and sharded, trained with the same whole gradients for any number of processes."""

import functools
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import adamw_ext
from tests.helpers import assert_same_bits

# Of each mode: the param dtype, and the optimizer's options.
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "capturable": (torch.float32, {"capturable": True}),
    "clipped": (torch.float32, {"max_grad_norm": 0.75}),
    "bfloat16": (torch.bfloat16, {}),
    "float32 moments": (torch.bfloat16, {"moment_dtype": torch.float32}),
    "float32 masters": (torch.bfloat16, {"master_weights": "fp32", "moment_dtype": torch.float32}),
    "float16": (torch.float16, {"master_weights": "fp32", "capturable": True, "amsgrad": True}),
    "split": (torch.bfloat16, {"master_weights": "split", "moment_dtype": torch.float32}),
    "rounded": (torch.bfloat16, {"stochastic_rounding": True, "seed": 3}),
    "rounded and split": (
        torch.bfloat16,
        {"master_weights": "split", "stochastic_rounding": True, "seed": 2**63 + 1, "max_grad_norm": 0.5},
    ),
}


def make_model(dtype: torch.dtype = torch.float32, *, sharded: bool = False) -> nn.Module:
    """Of 4 processes, some have more rows of a param than others, and some have none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1)).to(dtype)
    if sharded:
        for module in (*model, model):
            fully_shard(module, mesh=mesh())
    return model


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def make_optimizer(model: nn.Module, lr: float = 0.05, **options: Any) -> adamw_ext.AdamW:
    """Of named params, whose numbers follow another order than the model's. Capturable ones have their learning rates
    and betas in tensors."""
    hold = functools.partial(torch.tensor, dtype=torch.float64) if options.get("capturable") else float
    return adamw_ext.AdamW(groups_of(model, hold(lr), hold(lr / 2)), betas=(hold(0.8), hold(0.9)), **options)


def groups_of(model: nn.Module, lr: float | Tensor, bias_lr: float | Tensor) -> list[dict[str, Any]]:
    weights, biases = (
        [(name, param) for name, param in model.named_parameters() if name.endswith(kind)]
        for kind in ("weight", "bias")
    )
    return [
        {"params": weights, "lr": lr, "weight_decay": 0.1},
        {"params": biases, "lr": bias_lr, "weight_decay": 0.0},
    ]


def make(mode: str, *, sharded: bool = False, lr: float = 0.05) -> tuple[nn.Module, adamw_ext.AdamW]:
    dtype, options = MODES[mode]
    model = make_model(dtype, sharded=sharded)
    return model, make_optimizer(model, lr, **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: range, *, without: tuple[int, ...] = ()) -> None:
    """Steps with gradients that depend on nothing but the step and the param's number.

    The sums of their squares are exact, so that the norm has the same bits however they are cut.

    Args:
        without: the numbers of params that get no gradient.
    """
    params = params_of(optimizer)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for number, param in enumerate(params):
            grad = (torch.randint(-127, 128, param.shape, generator=generator) / 64).to(param.dtype)
            param.grad = None if number in without else like(grad, param)
        optimizer.step()
    optimizer.zero_grad()


def like(value: Tensor, param: Tensor) -> Tensor:
    """A tensor that every process has whole, placed as the param."""
    if not isinstance(param, DTensor):
        return value
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def forget(model: nn.Module) -> None:
    """Weights that no training would give."""
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)


def own(value: Tensor) -> Tensor:
    """The part of a tensor in this process."""
    return value.detach().to_local() if isinstance(value, DTensor) else value.detach()


def assert_same(
    actual: tuple[nn.Module, torch.optim.Optimizer], whole: tuple[nn.Module, torch.optim.Optimizer], what: object
) -> None:
    """Params and state of a run, in this process, have the bits of an unsharded run."""
    (model, optimizer), (whole_model, whole_optimizer) = actual, whole
    for (name, param), whole_param in zip(model.named_parameters(), whole_model.parameters(), strict=True):
        assert_same_bits([own(param)], [own(like(whole_param.detach(), param))], (what, name))
        state, whole_state = optimizer.state.get(param, {}), whole_optimizer.state.get(whole_param, {})
        assert state.keys() == whole_state.keys(), (what, name)
        for key, value in state.items():
            expected = whole_state[key] if key == "step" else like(whole_state[key], param)
            if isinstance(expected, DTensor):
                assert (value.shape, value.placements) == (expected.shape, expected.placements), (what, name, key)
            assert_same_bits([own(value)], [own(expected)], (what, name, key))
