"""What the long run trains, the demo's GPT on the demo's text, and what it looks at on the way.

``follow`` trains with one optimizer and watches memory, and where it is asked to, leaves the run at random steps and
goes on in fresh objects. ``feed`` trains on float64 params and gives the gradients of that run to every optimizer.
"""

import array
import gc
import io
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import adamw_ext
from benchmarks.allocations import status_bytes
from examples.compare import differing
from examples.gpt import decay_groups
from examples.train import SHORT, Run, RunConfig, make_reproducible, warmup_then_cosine
from tests.reference import Textbook

OURS, FUSED, FOREACH = "adamw_ext", "torch fused", "torch foreach"
BETAS = (0.9, 0.95)  # the demo's
MAKERS: dict[str, Callable[..., Optimizer]] = {
    OURS: adamw_ext.AdamW,
    FUSED: lambda groups, **options: torch.optim.AdamW(groups, fused=True, **options),
    FOREACH: lambda groups, **options: torch.optim.AdamW(groups, foreach=True, **options),
}
ONE_ROUNDING = "one rounding"
STEPS_AFTER_RESUME = 5
TEXTBOOK_STEPS = 100
SAMPLES = 100  # of memory in a run


@dataclass(frozen=True)
class Plan:
    """The demo's short preset, half as wide, for many more steps."""

    steps: int = 10_000
    width: int = 64
    resumes: int = 100

    @property
    def config(self) -> RunConfig:
        return replace(
            SHORT,
            model=replace(SHORT.model, width=self.width),
            steps=self.steps,
            warmup=max(1, self.steps // 50),
            evaluate_every=max(1, self.steps // 40),
        )

    @property
    def logged_steps(self) -> set[int]:
        """Evenly spaced on a logarithmic axis, from the first to the last."""
        return {round(self.steps ** (i / 40)) for i in range(41)}


class LongRun(Run):
    """A run of the demo with any of the optimizers. ``moved``: every weight of the start is multiplied by 1 + moved."""

    def __init__(self, name: str, config: RunConfig, moved: float = 0.0) -> None:
        super().__init__("adamw_ext", config)
        with torch.no_grad():
            for param in self.model.parameters():
                param.mul_(1 + moved)
        self.optimizer = MAKERS[name](decay_groups(self.model, config.weight_decay), lr=config.lr, betas=BETAS)
        self.scheduler = warmup_then_cosine(self.optimizer, config)

    def losses(self) -> dict[str, Any]:
        last = list(self.train_losses.values())[-max(1, self.config.steps // 10) :]
        return {"held_out": self.held_out_losses, "last_train": sum(last) / len(last)}


def checkpoint(run: Run) -> io.BytesIO:
    buffer = io.BytesIO()
    run.save(buffer)
    buffer.seek(0)
    return buffer


@dataclass
class Resumes:
    """Leaves ``run`` at the steps ``at``, goes on in fresh objects, and compares with the run that never stopped."""

    run: LongRun
    name: str
    at: set[int]
    due: dict[int, tuple[int, dict[int, float], io.BytesIO]] = field(default_factory=dict)
    compared: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def after_step(self) -> None:
        step = self.run.step
        if step in self.due:
            self.compare(*self.due.pop(step))
        if step in self.at:
            self.due[step + STEPS_AFTER_RESUME] = (step, *self.go_on(checkpoint(self.run)))

    def go_on(self, saved: io.BytesIO) -> tuple[dict[int, float], io.BytesIO]:
        random_state = torch.get_rng_state()
        fresh = LongRun(self.name, self.run.config)
        fresh.resume(saved)
        for _ in range(STEPS_AFTER_RESUME):
            fresh.train_step()
        ended = checkpoint(fresh)
        torch.set_rng_state(random_state)
        return fresh.train_losses, ended

    def compare(self, step: int, losses: dict[int, float], ended: io.BytesIO) -> None:
        ends = [torch.load(buffer, weights_only=True) for buffer in (checkpoint(self.run), ended)]
        places = differing(*ends, "checkpoint")
        places += [f"loss of step {at}" for at, loss in losses.items() if loss != self.run.train_losses[at]]
        self.compared.append(step)
        self.differences += [f"resumed at step {step}: {place}" for place in places]


class Memory:
    """Samples of what the process holds; of Python objects, those made since this one. They are kept in arrays, which
    add no objects."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # leaves out the 300,000 of the imports
        self.samples = {key: array.array("q") for key in ("step", "resident_bytes", "objects", "tensors")}

    def sample(self, step: int) -> None:
        gc.collect()
        objects = gc.get_objects()
        # By type(): isinstance() asks objects for their class, and lazy modules import themselves then.
        numbers = (len(objects), sum(issubclass(type(one), Tensor) for one in objects))
        del objects
        for key, value in zip(self.samples, (step, status_bytes("VmRSS"), *numbers), strict=True):
            self.samples[key].append(value)

    def lists(self) -> dict[str, list[int]]:
        return {key: values.tolist() for key, values in self.samples.items()}


def follow(name: str, plan: Plan, moved: float = 0.0, resume_at: tuple[int, ...] = ()) -> dict[str, Any]:
    """Trains with one optimizer. Returns its losses, samples of memory and, with ``resume_at``, how resuming went."""
    make_reproducible(threads=1)
    run = LongRun(name, plan.config, moved)
    resumes = Resumes(run, name, set(resume_at))
    memory = Memory()
    every = max(1, plan.steps // SAMPLES)
    run.evaluate()
    while run.step < plan.steps:
        run.train_step()
        resumes.after_step()
        if run.step % plan.config.evaluate_every == 0 or run.step == plan.steps:
            run.evaluate()
        if run.step % every == 0:
            memory.sample(run.step)
    result: dict[str, Any] = {"losses": run.losses(), "memory": memory.lists()}
    if resume_at:
        result["resumes"] = {"steps": resumes.compared, "differences": resumes.differences}
    return result


class Fed:
    """In the optimizer's place in a run: float64 params that torch.optim.AdamW steps, of which the model has the
    nearest float32. Every other optimizer gets the same gradients for float32 params of its own."""

    def __init__(self, model: torch.nn.Module, config: RunConfig) -> None:
        self.params = list(model.parameters())
        models = {name: deepcopy(model) for name in MAKERS}
        exact = deepcopy(model).double()
        self.exact = list(exact.parameters())
        self.copies = {name: list(copied.parameters()) for name, copied in models.items()}
        options = {"lr": config.lr, "betas": BETAS}
        self.oracle = torch.optim.AdamW(decay_groups(exact, config.weight_decay), foreach=False, **options)
        self.optimizers = {
            name: MAKERS[name](decay_groups(copied, config.weight_decay), **options) for name, copied in models.items()
        }
        self.textbooks = [
            Textbook(group["params"], weight_decay=group["weight_decay"], **options)
            for group in self.oracle.param_groups
        ]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for param, exact in zip(self.params, self.exact, strict=True):
            exact.grad = param.grad.double()
        if self.steps <= TEXTBOOK_STEPS:
            for textbook, group in zip(self.textbooks, self.oracle.param_groups, strict=True):
                textbook.lr = group["lr"]
                textbook.step([param.grad for param in group["params"]])
        self.oracle.step()
        for name, optimizer in self.optimizers.items():
            for group, other in zip(optimizer.param_groups, self.oracle.param_groups, strict=True):
                group["lr"] = other["lr"]
            for copied, param in zip(self.copies[name], self.params, strict=True):
                copied.grad = param.grad
            optimizer.step()
        for param, exact in zip(self.params, self.exact, strict=True):
            param.copy_(exact)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def errors(self) -> dict[str, dict[str, dict[str, float]]]:
        """Of each optimizer's params, and of the float64 params rounded to float32 once: the least that there is.

        Of all params, and of those with and without weight decay.
        """
        held = {**self.copies, ONE_ROUNDING: [exact.float() for exact in self.exact]}
        decayed = [exact.dim() >= 2 for exact in self.exact]
        parts = {"all": [True] * len(decayed), "decayed": decayed, "not decayed": [not flag for flag in decayed]}

        def of(params: list[Tensor], flags: list[bool]) -> dict[str, float]:
            return distances(list(compress(params, flags)), list(compress(self.exact, flags)))

        return {name: {part: of(params, flags) for part, flags in parts.items()} for name, params in held.items()}

    @torch.no_grad()
    def textbook_distance(self) -> float:
        """The largest difference of torch's float64 params from the textbook's, after at most TEXTBOOK_STEPS."""
        pairs = zip(self.oracle.param_groups, self.textbooks, strict=True)
        return max(distances(group["params"], textbook.params)["max"] for group, textbook in pairs)


def distances(params: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    differences = torch.cat([(a.double() - b).flatten() for a, b in zip(params, exact, strict=True)])
    return {"rms": differences.square().mean().sqrt().item(), "max": differences.abs().max().item()}


def feed(plan: Plan) -> dict[str, Any]:
    """Trains on float64 params and feeds their gradients to every optimizer. Returns errors by step, and the losses."""
    make_reproducible(threads=1)
    run = LongRun(OURS, plan.config)
    fed = Fed(run.model, plan.config)
    run.optimizer, run.scheduler = fed, warmup_then_cosine(fed.oracle, plan.config)
    errors: dict[int, Any] = {}
    textbook = float("nan")
    run.evaluate()
    while run.step < plan.steps:
        run.train_step()
        if run.step == min(TEXTBOOK_STEPS, plan.steps):
            textbook = fed.textbook_distance()
        if run.step in plan.logged_steps:
            errors[run.step] = fed.errors()
        if run.step % plan.config.evaluate_every == 0 or run.step == plan.steps:
            run.evaluate()
    sizes = distances(fed.exact, [torch.zeros_like(exact) for exact in fed.exact])
    return {
        "parameters": sum(param.numel() for param in fed.params),
        "losses": run.losses(),
        "errors": errors,
        "textbook_distance": textbook,
        "params_rms": sizes["rms"],
    }
