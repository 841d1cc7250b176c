"""Every way to step a job: the Python class in all its forms, the functional form and the operators, the script class.

A way updates the job's params and returns the state that it ends with, which is that of no step where there was none.
"""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamw_ext import AdamW, functional
from tests.helpers import assert_same_bits, on_cpu, running_on
from tests.jobs import MOMENTS, Job
from tests.scenarios import Brief, Group, Scenario, Step

State = dict[str, Tensor]
Watch = Callable[[AdamW, Step], AbstractContextManager[None]]


@dataclass(frozen=True, repr=False)
class Class(Brief):
    """The Python class. As by default: the baseline instruction set on one thread, step counts on the host."""

    isa: str = "baseline"
    threads: int = 1
    units_per_chunk: int = 0  # 0: chosen from the work
    emulated_arguments: int = 0  # the CUDA kernels, walked over on the host, with so many bytes of arguments; 0: no
    flag: str | None = None  # or "capturable", "fused"
    has_tensor_hyper: bool = False  # lr and betas in tensors
    is_guarded: bool = False  # the first state is given, and lies between guard bytes
    is_dense: bool = False  # contiguous copies of all tensors
    is_apart: bool = False  # one optimizer for each param
    saved_after: int | None = None  # so many steps, then loaded into another optimizer
    saved_flag: str | None = None  # the other optimizer's flag

    def run(self, job: Job, watch: Watch = lambda *_: nullcontext()) -> list[State]:
        """``watch``: entered around every step."""
        with running_on(isa=self.isa):
            if self.is_apart:
                optimizers = [self.make(job, self.flag, i) for i in range(len(job.params))]
            else:
                optimizers = [self.make(job, self.flag)]
            for optimizer in optimizers:
                give_state(optimizer, job)
            for made, step in enumerate(job.steps()):
                if made == self.saved_after:
                    optimizers = [
                        self.resumed(optimizer, job, i if self.is_apart else None)
                        for i, optimizer in enumerate(optimizers)
                    ]
                for optimizer in optimizers:
                    set_lr(optimizer, step)
                    optimizer.grad_scale, optimizer.found_inf = scaling(step)
                    with watch(optimizer, step), running_on(threads=self.threads):
                        self.step(optimizer)
        for optimizer in optimizers:
            optimizer.init_state()
        states = {param: state for optimizer in optimizers for param, state in optimizer.state.items()}
        results = [states[param] for param in job.params]
        if self.saved_after is None:
            assert_state_was_kept(job, results)
        skipped = sum(step.is_skipped and any(map(step.gives, range(len(job.params)))) for step in job.scenario.steps)
        if self.saved_after is None and not self.is_apart:
            counted = optimizers[0].skipped_steps.item()
            assert counted == skipped, f"{counted} skipped steps are counted, but {skipped} were skipped"
        return results

    def make(self, job: Job, flag: str | None, only: int | None = None) -> AdamW:
        """With a group for each of the scenario's."""
        groups = []
        for group, members in zip(job.scenario.groups, job.scenario.members, strict=True):
            hyper = dict(group.hyper)
            if self.has_tensor_hyper:
                hyper["lr"] = torch.tensor(group.lr, dtype=torch.float64)
                hyper["betas"] = tuple(torch.tensor(beta, dtype=torch.float64) for beta in group.betas)
            params = [job.params[i] for i in members if only is None or i == only]
            if params or only is None:
                groups.append({"params": params, "first_lr": group.lr, **hyper, **group.storage})
        return AdamW(groups, **({flag: True} if flag else {}))

    def resumed(self, optimizer: AdamW, job: Job, only: int | None) -> AdamW:
        """Another optimizer over the same params, which has everything else from the file."""
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = self.make(job, self.saved_flag, only)
        for group in other.param_groups:
            group.update(weight_decay=0.5, eps=0.5, amsgrad=not group["amsgrad"], maximize=not group["maximize"])
            group.update({key: 1 for key in ("seed", "max_grad_norm") if key in group})
            set_number(group, "lr", 0.5)
        other.load_state_dict(torch.load(file, weights_only=True))
        return other

    def step(self, optimizer: AdamW) -> None:
        if not self.units_per_chunk and not self.emulated_arguments:
            optimizer.step()
            return
        if optimizer._stepper is None:
            optimizer.init_state()
            optimizer._stepper = optimizer._make_stepper([])
        stepper = optimizer._stepper
        stepper.units_per_chunk, stepper.emulated_arguments = self.units_per_chunk, self.emulated_arguments
        optimizer.step()
        assert optimizer._stepper is stepper  # another one would have gone the usual way


@dataclass(frozen=True, repr=False)
class Functional(Brief):
    """The functional form and its operators, with explicit lists: a call for each group."""

    form: str = "functional"  # or an overload: "default", "tensor_lr", "unmarked", "unmarked_tensor_lr"
    isa: str = "baseline"
    is_guarded = True
    is_dense = False

    def run(self, job: Job) -> list[State]:
        lrs = [group.lr for group in job.scenario.groups]
        with running_on(isa=self.isa), torch.no_grad():
            for step in job.steps():
                if step.lr_factor is not None:
                    lrs = [group.lr * step.lr_factor for group in job.scenario.groups]
                for group, members, lr in zip(job.scenario.groups, job.scenario.members, lrs, strict=True):
                    self.step_group(job, group, [i for i in members if job.grads[i] is not None], lr, step)
        return job.state

    def step_group(self, job: Job, group: Group, members: list[int], lr: float, step: Step) -> None:
        lists = [[job.params[i] for i in members], [job.grads[i] for i in members]]
        lists += [[job.state[i][key] for i in members if key in job.state[i]] for key in (*MOMENTS, "step")]
        call = functional.adamw if self.form == "functional" else getattr(torch.ops.adamw_ext.adamw_, self.form)
        call(
            *lists,
            *scaling(step),
            lr=torch.tensor(lr, dtype=torch.float64) if "tensor" in self.form else lr,
            beta1=group.betas[0],
            beta2=group.betas[1],
            weight_decay=group.weight_decay,
            eps=group.eps,
            amsgrad=group.amsgrad,
            maximize=group.maximize,
        )


@dataclass(frozen=True, repr=False)
class Script(Brief):
    """torch.classes.adamw_ext.AdamW, which goes on from the Python class's state dict."""

    after: int = 0  # so many steps of the Python class
    isa: str = "baseline"
    flag: str | None = None
    takes_list: bool = False  # gradients as an argument, not the params' own
    is_guarded: bool = False
    is_dense = False

    def run(self, job: Job) -> list[State]:
        python = Class(self.isa, flag=self.flag)
        optimizer = python.make(job, self.flag)
        give_state(optimizer, job)
        script = None
        with running_on(isa=self.isa):
            for made, step in enumerate(job.steps()):
                if made < self.after:
                    set_lr(optimizer, step)
                    optimizer.grad_scale, optimizer.found_inf = scaling(step)
                    optimizer.step()
                    continue
                script = self.make(optimizer) if script is None else script
                if step.lr_factor is not None:
                    for number, group in enumerate(job.scenario.groups):
                        script.set_lr(group.lr * step.lr_factor, number)
                script.step(job.grads if self.takes_list else None, *scaling(step))
            script = self.make(optimizer) if script is None else script
            script.init_state()
        state = script.state_dict()["state"]
        return [state[i] for i in range(len(job.params))]

    def make(self, optimizer: AdamW) -> Any:
        groups = [{key: value for key, value in g.items() if key != "first_lr"} for g in optimizer.param_groups]
        script = torch.classes.adamw_ext.AdamW.from_groups(groups)
        script.load_state_dict(**optimizer.state_dict())
        return script


Way = Class | Functional | Script


def give_state(optimizer: AdamW, job: Job) -> None:
    of = {param: state for param, state in zip(job.params, job.state, strict=True) if state}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param in of:
                optimizer.state[param] = dict(of[param])


def assert_state_was_kept(job: Job, states: list[State]) -> None:
    """Tensors that were given are those that were used: else their guards have guarded nothing."""
    for given, used in zip(job.state, states, strict=True):
        for key in given.keys() - {"step"}:
            assert used[key].data_ptr() == given[key].data_ptr(), f"{key} was replaced"


def set_lr(optimizer: AdamW, step: Step) -> None:
    if step.lr_factor is not None:
        for group in optimizer.param_groups:
            set_number(group, "lr", group["first_lr"] * step.lr_factor)


def set_number(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def scaling(step: Step) -> tuple[Tensor | None, Tensor | None]:
    """grad_scale and found_inf, as a GradScaler hands them over."""
    numbers = (step.grad_scale, step.found_inf)
    return tuple(None if number is None else torch.tensor(number) for number in numbers)  # type: ignore[return-value]


@running_on(threads=1)  # the steps may take more; torch.exp2, which makes the numbers, has other bits on other threads
def results(scenario: Scenario, way: Way) -> dict[str, list[Tensor]]:
    """Everything that a run leaves, by what it is."""
    job = Job(scenario, gives_state=way.is_guarded, is_dense=way.is_dense)
    states = way.run(job)
    left = {"param": on_cpu(job.params)}
    left["gradient"] = [torch.zeros(0) if grad is None else grad.detach().clone() for grad in job.grads]
    for key in sorted({key for state in states for key in state}):
        left[key] = [state[key].clone() if key in state else torch.zeros(0) for state in states]
    steps = [int(step) for step in left["step"]]
    assert steps == job.steps_made, f"steps are counted as {steps}, but {job.steps_made} were made"
    return left


def assert_same_results(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    assert actual.keys() == expected.keys(), f"{sorted(actual)} are left, expected {sorted(expected)}"
    for what in expected:
        if what == "param_remainder":
            assert all(map(torch.equal, actual[what], expected[what])), "remainders differ"
        else:
            assert_same_bits(actual[what], expected[what], what)
