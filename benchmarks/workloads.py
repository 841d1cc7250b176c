"""What is stepped: lists of parameter shapes of real models, and tensors of these shapes."""

from dataclasses import dataclass
from math import prod

import torch
from torch.nn import Parameter

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    dtype: torch.dtype
    shapes: Shapes

    @property
    def numel(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    @property
    def step_bytes(self) -> int:
        """What a step must move: read p, g, m, v, write p, m, v."""
        return 7 * self.numel * self.dtype.itemsize

    def make_params(self, device: str) -> list[Parameter]:
        """Random params with random gradients, which stay for all steps."""
        params = [Parameter(torch.empty(shape, dtype=self.dtype, device=device)) for shape in self.shapes]
        for param in params:
            param.grad = torch.empty_like(param)
        randomize(params)
        return params


@torch.no_grad()
def randomize(params: list[Parameter]) -> None:
    """Standard normal params and gradients, the same each time."""
    generator = torch.Generator(params[0].device).manual_seed(0)
    for param in params:
        param.normal_(generator=generator)
        param.grad.normal_(generator=generator)


def gpt2_shapes(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2 (Radford et al. 2019); the defaults are GPT-2 small: 148 tensors, 124,439,808 parameters."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return ((vocabulary, width), (context, width), *(norm + attention + norm + mlp) * layers, *norm)


def resnet_shapes(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> Shapes:
    """ResNet with bottlenecks (He et al. 2015); the defaults are ResNet-50: 161 tensors, 25,557,032 parameters."""

    def conv_norm(inputs: int, outputs: int, kernel: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = conv_norm(3, width, 7)
    inputs = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        outputs = 4 * inner
        for block in range(count):
            shapes += conv_norm(inputs, inner, 1) + conv_norm(inner, inner, 3) + conv_norm(inner, outputs, 1)
            if block == 0:
                shapes += conv_norm(inputs, outputs, 1)
            inputs = outputs
    return (*shapes, (classes, inputs), (classes,))


def neox_shapes(layers: int = 16, width: int = 2048, vocabulary: int = 50304) -> Shapes:
    """GPT-NeoX; the defaults are Pythia-1B (Biderman et al. 2023): 196 tensors, 1,011,781,632 parameters."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return ((vocabulary, width), *(norm + norm + attention + mlp) * layers, *norm, (vocabulary, width))


def workloads_on(device: str, quick: bool = False) -> list[Workload]:
    """``quick`` gives the same list for small models: shows that the benchmark runs, and says nothing about speed."""
    both = quick_workloads() if quick else full_workloads()
    large = quick_large_workloads() if quick else large_workloads()
    return both if device == "cpu" else large + both


def full_workloads() -> list[Workload]:
    return [
        Workload("gpt2-fp32", "GPT-2 small, float32", torch.float32, gpt2_shapes()),
        Workload("gpt2-bf16", "GPT-2 small, bfloat16", torch.bfloat16, gpt2_shapes()),
        Workload("small-tensors", "1,000 tensors of 64 elements, float32", torch.float32, ((64,),) * 1000),
        Workload("resnet50", "ResNet-50, float32", torch.float32, resnet_shapes()),
    ]


def large_workloads() -> list[Workload]:
    return [
        Workload("large-fp32", "Pythia-1B, float32", torch.float32, neox_shapes()),
        Workload("large-bf16", "Pythia-1B, bfloat16", torch.bfloat16, neox_shapes()),
    ]


def quick_workloads() -> list[Workload]:
    gpt2 = gpt2_shapes(layers=2, width=64, vocabulary=1000, context=64)
    return [
        Workload("gpt2-fp32", "small GPT-2, float32", torch.float32, gpt2),
        Workload("gpt2-bf16", "small GPT-2, bfloat16", torch.bfloat16, gpt2),
        Workload("small-tensors", "100 tensors of 64 elements, float32", torch.float32, ((64,),) * 100),
        Workload("resnet50", "small ResNet, float32", torch.float32, resnet_shapes((1, 1), width=16, classes=10)),
    ]


def quick_large_workloads() -> list[Workload]:
    neox = neox_shapes(layers=2, width=128, vocabulary=2000)
    return [
        Workload("large-fp32", "small GPT-NeoX, float32", torch.float32, neox),
        Workload("large-bf16", "small GPT-NeoX, bfloat16", torch.bfloat16, neox),
    ]
