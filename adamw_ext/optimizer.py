"""The optimizer class: torch.optim.AdamW's interface over the multi-tensor kernel."""

import functools
import math
from collections.abc import Callable, Iterable
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamw_ext import _C
from adamw_ext.numbered import take_number
from adamw_ext.options import (
    DEFAULTS,
    STORAGE_OPTIONS,
    Refill,
    check_flags,
    check_left_to_torch,
    check_options,
    check_readable,
    check_ready_for_capture,
    filled,
    is_pair,
    param_name,
)
from adamw_ext.sharded import (
    Member,
    SumsOfSquares,
    check_has_all_params,
    check_placement,
    collectable,
    elements_of,
    place_grad,
)
from adamw_ext.state import conform_state, describe, drop_other_masters, misfits, new_state, runs_in_kernel
from adamw_ext.state_load import Carried, StateLoad, carry_tensors, check_is_state_dict, storage_addresses
from adamw_ext.torch_path import find_group_problem, find_problem, find_state_problem, step_group
from adamw_ext.turns import take_turns

if TYPE_CHECKING:
    from adamw_ext.compiled import Given

_ABSENT: Any = object()  # in the place of the state of a param that has none

# What a checkpoint may not change: how this optimizer is run, as opposed to what it computes.
_IMPLEMENTATION_FLAGS = ("foreach", "capturable", "differentiable", "fused")


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), all parameters in one multi-tensor kernel.

    A drop-in for :class:`torch.optim.AdamW`: the same arguments, defaults, errors, group keys, state keys and state
    dicts. CPU params are updated by the hand-written kernel, in one parallel region for the whole model, with the same
    bits for every instruction set and thread count; CUDA params by one launch for up to 500 tensors of a dtype, with
    small ones before it where the device counts steps or a norm is clipped, on the current stream and without a
    synchronisation, written to give the CPU's bits (they have not yet run on a GPU). DTensors (FSDP2, tensor
    parallelism) are updated in the same pass, each process its parts, with the bits of the unsharded run. Params on
    other devices and of other tensor subclasses, groups with ``differentiable=True``, and CUDA params where the build
    has no CUDA kernels, go through torch's own functional AdamW.

    Args:
        params: tensors, (name, tensor) pairs, or group dicts. float64, float32, bfloat16, float16, or complex;
            any strides. Gradients have the param's shape and device; those of float32, bfloat16 and float16 params may
            be of any of these dtypes.
        lr: learning rate, a float or a 1-element tensor (read at every step; a capturable step of CUDA params leaves
            a CUDA tensor on the device, and so does its replay).
        betas: decay rates of the two moments, in [0, 1); floats or 1-element tensors.
        eps: added to the denominator, in units of the gradient.
        weight_decay: decoupled weight decay; each step takes ``lr * weight_decay`` of the param away.
        amsgrad: divide by the largest second moment so far (Reddi, Kale and Kumar 2018, arXiv 1904.09237).
        maximize: ascend instead of descending.
        foreach: accepted; the multi-tensor kernel is always used.
        capturable: keep ``step`` on the param's device and read no number on the host, so that steps can be captured
            in a CUDA graph and replayed; see :meth:`init_state` and :meth:`sync_hyperparameters`.
        differentiable: let autograd record the step (torch's implementation).
        fused: also makes the optimizer apply ``GradScaler``'s scale itself (``_step_supports_amp_scaling``).
        master_weights: what the update of bfloat16 and float16 params runs on (a wider param is its own master).
            None: the param itself, rounded at every step. "fp32": a float32 master beside it, of which the param shows
            the nearest value. "split", bfloat16 only: the same master with the same bits, as the param and the 16 bits
            that it lacks, in 2 bytes less. Both round ties away from zero to bfloat16. A param that someone writes to
            keeps what was written: the next step starts from there (from a bfloat16 and the master's low bits, so from
            less than half a unit in the last place of it).
        moment_dtype: of new and of loaded moments, torch.float32 or torch.bfloat16; None: as the param's, and as
            loaded. Each element is rounded at every step; to nearest, bfloat16 moments stick where a step changes them
            by less than half a unit in the last place.
        stochastic_rounding: round to bfloat16 at random, without bias: the moments, and params without a master. The
            random bits are a function of ``seed``, the step, the param's place in the optimizer and the element's place
            in the param, hence the same in every replica, replay, resumed run and chunking, on the CPU and on CUDA.
        seed: of stochastic rounding, in [0, 2**64).
        max_grad_norm: clip the gradients of all groups to this L2 norm, as torch.nn.utils.clip_grad_norm_ before the
            step, but without changing them; None: do not. The norm is of the unscaled gradients. See :attr:`grad_norm`.
            All params must be ones that the hand-written kernel updates. Of DTensors it is the norm of the whole: then
            every step is a collective, which all processes must make.

    ``master_weights``, ``moment_dtype``, ``stochastic_rounding``, ``seed`` and ``max_grad_norm`` may be given for each
    group; a group without ``max_grad_norm`` counts in the norm and is not clipped.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.optim.AdamW for the same mistakes. ``step`` raises before it
            changes anything, and names the parameter, what was expected and what came.

    Threads that use one optimizer take turns: steps, loads, ``add_param_group`` and ``zero_grad`` come one after the
    other. Whoever writes to params, gradients or state by hand, or copies a state dict, must see to it that no other
    thread is stepping. A fork waits for steps of other threads.
    """

    _stepper: _C.Stepper | None = None
    _options: dict[str, Any] = {}  # noqa: RUF012  (those of DEFAULTS that were given)
    _elsewhere: list[tuple[int, list[Tensor]]] = []  # noqa: RUF012  (group index, params) that torch updates
    _traced_params: list[Tensor] | None = None  # all params, when a step was last traced for torch.compile
    _trace: str = ""  # what graphs know that list by

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: str | None = None,
        moment_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:
        given = (master_weights, moment_dtype, stochastic_rounding, seed, max_grad_norm)
        options = dict(zip(DEFAULTS, given, strict=True))
        check_options(options, "")
        check_readable({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._options = {key: value for key, value in options.items() if value != DEFAULTS[key]}
        self._make_tools()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(self._options)

    def _make_tools(self) -> None:
        """What belongs to this object and is neither copied nor pickled."""
        self._turn = take_turns()  # of the thread that steps or changes this optimizer
        self._mirror = _C.HyperMirror()
        self._skips = _C.DeviceNumbers("int64")
        self._sums_of_squares = _C.DeviceNumbers("float64")
        self._number = take_number(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of params, as torch's method. The options beyond torch's may be given for each group."""
        if isinstance(param_group, dict):  # torch's method refuses all else
            for key, value in self._options.items():
                param_group.setdefault(key, value)
            check_options(param_group, f" in param group {len(self.param_groups)}")
            if param_group.get("max_grad_norm") is not None:
                check_has_all_params()
        with self._turn:
            super().add_param_group(param_group)
            self._traced_params = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every param that has a gradient, all or none.

        Under ``torch.compile``, with ``fullgraph=True`` too, this is one operator in the graph, with the same bits,
        state and errors. Hyperparameters are read when the graph runs: no change of theirs makes a new graph; other
        params getting gradients does. CUDA graphs of inductor leave the operator out; captured by hand, the step is
        as outside of ``torch.compile`` (``capturable=True``, :meth:`init_state`, :meth:`sync_hyperparameters`). Dynamo
        does not enter an ``opt.step`` that a scheduler has wrapped, nor ``zero_grad``: with ``fullgraph=True`` call
        ``AdamW.step(opt)``, or compile ``opt.step`` before the scheduler is made. Params that are left to torch break
        the graph.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: under ``torch.compile``, the params of a group were exchanged by hand since the step was
                compiled, or are now left to torch. Nothing has changed, and the next call compiles anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if torch.compiler.is_dynamo_compiling():
            from adamw_ext.compiled import trace_step

            trace_step(self, grad_scale, found_inf)
        else:
            self._update(grad_scale, found_inf)
        return loss

    def init_state(self) -> None:
        """Create the state of every param that has none, as if before its first update.

        For checkpoints that must hold all state, of frozen and never-used params too, and for capturing the first step:
        what a captured step created would be created anew by every replay, so a captured step refuses to.
        """
        with self._turn:
            for group in self.param_groups:
                for param in group["params"]:
                    state = self.state.get(param)
                    if not state:
                        self.state[param] = new_state(param, group)
                    elif runs_in_kernel(param):
                        conform_state(param, state, group)
                        drop_other_masters(param, state, group)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as torch's
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. A step in another thread sees all gradients or none."""
        with self._turn:
            super().zero_grad(set_to_none)

    def sync_hyperparameters(self) -> None:
        """Hand the groups' present numbers (lr, betas, eps, weight_decay, max_grad_norm, seed) to captured steps.

        A captured step reads them in device memory, which this writes, in the order of the current stream: call it
        after a change, before the next replay. Tensor hyperparameters need no call; change them in place. Whatever is
        not captured reads all hyperparameters itself. A step that was captured without ``max_grad_norm`` never clips.
        There is one number for each group: steps captured with different floats replay with the same.

        Raises:
            ValueError, TypeError: a hyperparameter is not usable; those of groups before it have been handed over.
            RuntimeError: called while a graph is captured, which would write the same numbers at every replay.
        """
        with self._turn:
            self._mirror.sync(self.param_groups)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``found_inf`` has skipped since this optimizer was made, copied or unpickled.

        A 0-d int64 tensor that goes on counting: on the device of the first param where that counts its own steps (a
        CUDA param, ``capturable`` or ``fused``), else on the CPU. Reading it waits for nothing. Steps that a
        ``GradScaler`` leaves out without calling :meth:`step`, as it does where ``fused`` is not set, are not counted,
        nor are those in which no param has a gradient.
        """
        for group in self.param_groups:
            for param in group["params"][:1]:
                counts = param.is_cuda and (group["capturable"] or group["fused"])
                return self._skips.on(str(param.device) if counts else "cpu")
        return self._skips.on("cpu")  # ZeroRedundancyOptimizer leaves a rank without params

    @property
    def grad_norm(self) -> Tensor:
        """The L2 norm of all unscaled gradients of the last step that was not skipped, before clipping.

        A 0-d float64 tensor on the first param's device, 0 before the first step. Reading it waits for nothing. NaN and
        infinite gradients show here.

        Raises:
            RuntimeError: no group has ``max_grad_norm``, so no norm is measured.
        """
        if all(group.get("max_grad_norm") is None for group in self.param_groups):
            raise RuntimeError("grad_norm is measured only where max_grad_norm is set, but it is None in every group")
        devices = (param.device for group in self.param_groups for param in group["params"])
        sum_of_squares = self._sums_of_squares.on(str(next(devices, "cpu")))
        if sum_of_squares.is_cuda:
            return sum_of_squares.sqrt()
        return torch.tensor(math.sqrt(sum_of_squares.item()), dtype=torch.float64)  # torch's is off by a bit at times

    def state_dict(self) -> dict[str, Any]:
        """As torch's: groups, and references to the state. The remainders of sharded params ("split") are copies in
        int32, which every backend can gather; ``moment_dtype`` is a name."""
        with self._turn:
            return collectable(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.AdamW.

        Hyperparameters and state come from the dict. The constructor's implementation flags (``foreach``,
        ``capturable``, ``differentiable``, ``fused``), ``master_weights``, ``moment_dtype`` and
        ``stochastic_rounding``, a tensor ``lr`` or beta, and the addresses of state tensors that fit stay, so that
        captured steps remain valid; the loaded hyperparameters are handed to them. Moments keep the dict's dtype where
        a kernel takes it (float32 moments of a bfloat16 param). The masters of "fp32" and "split" load into each other,
        exactly; a param that shows one rounded half to even, as others round it, is then moved to the value equally
        near that "split" shows.

        Raises:
            ValueError: another number of groups or params, state of another shape or placed on other processes, two
                masters of a param, or one of a param that has none. Nothing has changed then.
        """
        hook_key = object()
        with self._turn:
            self._optimizer_load_state_dict_pre_hooks[hook_key] = carry_tensors  # type: ignore[index]
            try:
                super().load_state_dict(state_dict)
            finally:
                del self._optimizer_load_state_dict_pre_hooks[hook_key]  # type: ignore[arg-type]
            self.sync_hyperparameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "param_groups" in self.__dict__:  # torch's load_state_dict; unpickling starts from nothing
            self._finish_load(state)
        super().__setstate__(state)
        self._stepper = None
        if "_turn" not in self.__dict__:
            self._make_tools()
        self._options = {key: self.defaults[key] for key in DEFAULTS if key in self.defaults}
        if any(group.get("fused") for group in self.param_groups):
            self._step_supports_amp_scaling = True

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None, given: "Given | None" = None) -> None:
        """One step; ``given``: with the gradients, and where it has some the stand-ins for params, of a graph."""
        with self._turn:  # first: dynamo does not trace what takes a lock, and so none of this
            if not isinstance(self.param_groups, list):
                raise TypeError(f"param_groups must be a list, but is a {type(self.param_groups).__name__}")
            if not isinstance(self.state, dict):
                raise TypeError(f"state must be a dict, but is a {type(self.state).__name__}")
            if self._stepper is None or not self._try_step(grad_scale, found_inf, given):
                self._step_anew(grad_scale, found_inf, given)
            if self._elsewhere:
                self._accelerator_health_check()
                with torch.set_grad_enabled(self.defaults["differentiable"]):
                    for index, params in self._elsewhere:
                        step_group(self.param_groups[index], params, self.state, grad_scale, found_inf)

    def _try_step(self, grad_scale: Tensor | None, found_inf: Tensor | None, given: "Given | None") -> bool:
        """One step with the stepper at hand; False if it no longer fits, for whatever reason: nothing has changed."""
        assert self._stepper is not None
        if given and given.stand_ins:
            return False
        try:
            self._check_elsewhere(given)
        except (RuntimeError, ValueError, TypeError, LookupError):
            return False  # as below: what is left to torch may have changed since the stepper was made
        try:
            grads = given.grads if given else None
            return self._stepper.step(self.param_groups, self.state, grad_scale, found_inf, grads)
        except (RuntimeError, ValueError, TypeError, KeyError):
            if self._stepper.started:
                raise  # a launch has failed, after others: nothing may be done twice
            return False  # a new stepper either takes the change (params moved to another dtype) or raises the same

    def _step_anew(self, grad_scale: Tensor | None, found_inf: Tensor | None, given: "Given | None") -> None:
        """One step with a new stepper, which creates missing state and brings other state into form. On an error, the
        state is again what it was."""
        before: list[tuple[Tensor, Any, dict[str, Any] | None]] = []  # (param, its state, a copy of what changes)
        stepper = None
        try:
            stepper = self._make_stepper(before, given)
            self._stepper = None if given and given.stand_ins else stepper
            grads = given.grads if given else None
            if not stepper.step(self.param_groups, self.state, grad_scale, found_inf, grads):
                raise RuntimeError("params or state were changed by another thread during step()")
            for group in self.param_groups:
                for param in group["params"]:
                    if state := self.state.get(param):
                        drop_other_masters(param, state, group)
        except BaseException:
            self._stepper = None
            # An interrupt may come after the update.
            # Backwards: of params that share a state, the last to come holds what the first has changed.
            for param, state, items in reversed(before) if stepper is None or not stepper.started else ():
                if state is _ABSENT:
                    self.state.pop(param, None)
                    continue
                if items is not None:
                    state.clear()
                    state.update(items)
                self.state[param] = state
            raise

    def _make_stepper(
        self, before: list[tuple[Tensor, Any, dict[str, Any] | None]], given: "Given | None" = None
    ) -> _C.Stepper:
        """A stepper over the present params. ``before`` receives what state is replaced or changed, and of whom."""
        members: list[Member] = []
        sums = SumsOfSquares()
        clips = any(group.get("max_grad_norm") is not None for group in self.param_groups)
        number = -1  # of the param in this optimizer
        self._elsewhere = []
        capturing = _C.cuda_kernels and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        for index, group in enumerate(self.param_groups):
            check_flags(group, index)
            elsewhere = []
            if not isinstance(params := group["params"], list):
                raise TypeError(f"params of group {index} must be a list, but are {describe(params)}")
            # The list's own items: what else a subclass of list may yield lives no longer than this loop.
            for position, param in enumerate(list.__iter__(params)):
                number += 1
                name = param_name(group, index, position)
                check_placement(param, name)
                if group["differentiable"] or not runs_in_kernel(param):
                    elsewhere.append(param)
                    continue
                state = self.state.get(param)
                if not isinstance(state, (dict, NoneType)):
                    raise TypeError(f"state of {name} must be a dict, but is {describe(state)}")
                has_grad = (param.grad if given is None else given.grads[number]) is not None
                target = param if given is None else given.stand_ins.get(number, param)
                if capturing and param.is_cuda and has_grad:
                    check_ready_for_capture(target, state, group, name)
                if state and not (capturing and not has_grad):
                    if misfits(target, state, group):
                        before.append((param, state, dict(state)))
                        conform_state(target, state, group)
                elif not state and has_grad:
                    before.append((param, self.state.get(param, _ABSENT), None))
                    state = self.state[param] = new_state(target, group)
                is_left_out = capturing and not has_grad  # its state may still have to be converted
                first, places = elements_of(param, name) if group.get("stochastic_rounding") else (0, None)
                part_of_sum = sums.number_of(param) if clips else 0
                present = None if is_left_out else state or None
                members.append(Member(target, present, index, name, number, first, places, part_of_sum))
            if elsewhere:
                self._elsewhere.append((index, elsewhere))
        self._check_elsewhere(given)
        numbers = (self._mirror, self._skips, self._sums_of_squares)
        return _C.Stepper(self.param_groups, self.state, members, *numbers, place_grad, sums.complete)

    def _check_elsewhere(self, given: "Given | None") -> None:
        """Refuse a step that torch's functional AdamW would refuse after other params have moved, or cannot clip, or
        that a graph cannot hold."""
        if self._elsewhere and given:
            name = self._name_of(self._elsewhere[0][0], self._elsewhere[0][1][0])
            raise RuntimeError(f"{name} was left to torch after this step was compiled: call it again")
        if self._elsewhere and any(group.get("max_grad_norm") is not None for group in self.param_groups):
            index, (param, *_) = self._elsewhere[0]
            name = self._name_of(index, param)
            raise RuntimeError(f"max_grad_norm needs the hand-written kernel, but {name} is updated by torch")
        for index, params in self._elsewhere:
            group = self.param_groups[index]
            active = [param for param in params if param.grad is not None]
            scales = any(getattr(self, key, None) is not None for key in ("grad_scale", "found_inf"))
            if active and (problem := find_group_problem(group, active, scales=scales)):
                raise RuntimeError(f"param group {index} cannot be updated by torch: {problem}")
            for param in params:
                check_left_to_torch(group, param, functools.partial(self._name_of, index, param))
                problem = find_problem(param) or find_state_problem(param, self.state.get(param), group)
                if problem is None:
                    continue
                raise RuntimeError(f"{self._name_of(index, param)} cannot be updated: {problem}")

    def _name_of(self, index: int, param: Tensor) -> str:
        group = self.param_groups[index]
        for position, other in enumerate(group["params"]):
            if other is param:
                return param_name(group, index, position)
        return f"a param of group {index}"  # of a container that gives others each time

    @torch.no_grad()
    def _finish_load(self, incoming: dict[str, Any]) -> None:
        """Turn what torch's load_state_dict is about to install into what this class keeps."""
        check_is_state_dict(incoming)
        groups: list[dict[str, Any]] = incoming["param_groups"]
        for current, loaded in zip(self.param_groups, groups, strict=True):
            for flag in _IMPLEMENTATION_FLAGS:
                loaded[flag] = current[flag]
            if loaded.get("stochastic_rounding"):
                loaded.setdefault("seed", DEFAULTS["seed"])
            where = f" in a loaded param group with {len(loaded['params'])} params"
            check_options({key: loaded[key] for key in ("seed", "max_grad_norm") if key in loaded}, where)
            for option in STORAGE_OPTIONS:
                loaded.pop(option, None)
            loaded.update({key: current[key] for key in DEFAULTS if key in current and key not in loaded})
        state: dict[Any, Any] = incoming["state"]
        live = storage_addresses(self.state.values())
        loads = {}
        for index, group in enumerate(groups):
            for position, param in enumerate(group["params"]):
                if param in state:
                    name = param_name(group, index, position)
                    loads[param] = StateLoad(param, name, group, state[param], self.state.get(param, {}), live)
        for index, (current, loaded) in enumerate(zip(self.param_groups, groups, strict=True)):
            if "lr" in loaded and "lr" in current:
                loaded["lr"] = Refill(current["lr"], loaded["lr"], f"loaded lr of param group {index}")
            pair, present = loaded.get("betas"), current.get("betas")
            # A list, from torch.distributed.checkpoint. What is no pair is left for the next step to refuse.
            if is_pair(pair) and is_pair(present):
                where = f"a loaded beta of param group {index}"
                loaded["betas"] = tuple(Refill(old, new, where) for old, new in zip(present, pair, strict=True))
        # From here on nothing raises.
        for loaded in groups:
            for key in ("lr", "betas"):
                if key in loaded:
                    loaded[key] = filled(loaded[key])
        for owner, items in state.items():
            if owner in loads:
                state[owner] = loads[owner].apply()
            elif isinstance(items, dict):  # of no param here: as it came
                state[owner] = {k: v.tensor if isinstance(v, Carried) else v for k, v in items.items()}

    def _accelerator_health_check(self) -> None:
        """torch's: refuses to capture a step that is not capturable."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()
