"""Faults to seed: each a text in a source file and what takes its place. tests/mutation.py builds with them.

All of them compile, or run as Python; a fault that breaks every step proves nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent

TESTS = (
    "tests/test_update.py",
    "tests/test_bits.py",
    "tests/test_dtypes.py",
    "tests/test_emulation.py",
    "tests/test_gradient_dtypes.py",
)
MACHINE_CODE = ("tests/test_kernels_vectorised.py",)  # only of kernels that are compiled as users' are
CLIPPING = ("tests/test_max_grad_norm.py",)
MASTERS = ("tests/test_split_masters.py", "tests/test_master_weights.py")
STOCHASTIC = ("tests/test_stochastic_rounding.py",)
SCRIPTED = ("tests/test_script_class.py",)
SHARDED = ("tests/test_sharded.py",)
OPERATORS = ("tests/test_functional.py", "tests/test_jit_functional.py")
LOADING = ("tests/test_state_dict.py", "tests/test_moment_dtype.py")
CONVERSION = ("tests/test_checkpoint.py",)
COMPILED = ("tests/test_compile.py",)
REFUSALS = ("tests/test_bad_input.py",)
CLASS = ("tests/test_optimizer.py", "tests/test_regressions.py", "tests/test_skipped_steps.py")
LIMITS = ("tests/test_limits.py",)
SHARDED_STATE = ("tests/test_sharded_state.py", "tests/test_sharded_bad_input.py")


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...] = TESTS  # one of them must notice it

    @property
    def is_optimized(self) -> bool:
        """Whether it is compiled as for users; the others in a fifth of the time, with the same bits."""
        return self.tests == MACHINE_CODE

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")


def check_texts(faults: Iterable[Any]) -> None:
    """End the program unless each fault's text occurs once in its file."""
    for fault in faults:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1:
            raise SystemExit(f"{fault.name!r}: the text to replace occurs {count} times in {fault.file}:\n{fault.old}")


def rows_of_today(path: Path, rows: list[Row], faults: Iterable[Any], key: str) -> list[Row]:
    """These, and those of other faults that a run of the same day wrote, in the order of the faults. key: of a row, the
    fault's name."""
    earlier = json.loads(path.read_text())["faults"] if path.exists() else []
    by_name = {row[key]: row for row in [*earlier, *rows]}
    return [by_name[fault.name] for fault in faults if fault.name in by_name]


FAULTS = [
    # The arithmetic.
    Fault("weight decay is forgotten", "csrc/core/update.h", "e.param - (decay + descent)", "e.param - descent"),
    Fault(
        "weight decay is not scaled by lr", "csrc/core/hyper.h", "hyper.lr * hyper.weight_decay,", "hyper.weight_decay,"
    ),
    Fault(
        "eps is added before the bias correction",
        "csrc/core/update.h",
        "std::sqrt(second_moment) * s.denominator_scale + s.eps",
        "(std::sqrt(second_moment) + s.eps) * s.denominator_scale",
    ),
    Fault(
        "amsgrad's maximum is kept but not used",
        "csrc/core/update.h",
        "second_moment = e.max_exp_avg_sq = maximum(",
        "e.max_exp_avg_sq = maximum(",
    ),
    Fault(
        "amsgrad's maximum is the latest second moment",
        "csrc/core/update.h",
        "maximum(e.exp_avg_sq, e.max_exp_avg_sq + T(0))",
        "maximum(e.exp_avg_sq, e.exp_avg_sq)",
    ),
    Fault(
        "threads of a step compute in environments of their own",
        "csrc/cpu/launch.cpp",
        "    std::fesetenv(&callers);\n",
        "",
        LIMITS,
    ),
    Fault(
        "step counts that differ share their scalars",
        "csrc/torch/stepper.cpp",
        "    if (keys_[key].steps_done == done) return key;\n",
        "    if (looks > 100 || keys_[key].steps_done == done) return key;\n",
        LIMITS,
    ),
    Fault("amsgrad's maximum loses a NaN", "csrc/core/update.h", "return a == a ? larger : a;", "return larger;"),
    Fault("an infinite param becomes NaN", "csrc/core/update.h", "finite_or_zero(e.param)", "e.param"),
    Fault(
        "the bias correction lags a step",
        "csrc/torch/stepper.cpp",
        "static_cast<std::int64_t>(done) + 1, unscale_",
        "static_cast<std::int64_t>(done) + (done > 0 ? 0 : 1), unscale_",
    ),
    # Storage.
    Fault("bfloat16 ties are rounded up", "csrc/core/dtypes.h", "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    Fault("float16 overflows too early", "csrc/core/dtypes.h", "overflow = 143u << 23", "overflow = 142u << 23"),
    Fault(
        "float16 subnormals are not normalised",
        "csrc/core/dtypes.h",
        "magnitude < (1u << 23) ? bit_cast<std::uint32_t>(subnormal) : normal",
        "normal",
    ),
    # The loop.
    Fault(
        "the kernel does nothing",
        "csrc/cpu/kernels_body.inc",
        "for (std::int64_t i = 0; i < count; ++i) {",
        "for (std::int64_t i = count; i < count; ++i) {",
    ),
    Fault(
        "a single element after the pairs is skipped",
        "csrc/cpu/kernels_body.inc",
        "if (rest < end) update_packets",
        "if (rest > end) update_packets",
    ),
    Fault(
        "an element at a cut is updated twice",
        "csrc/core/table.h",
        "segment(entry, begin, end < numel ? end : numel);",
        "segment(entry, begin, end < numel ? end + 1 : numel);",
    ),
    Fault(
        "the last chunk is dropped unless it is full",
        "csrc/cpu/launch.cpp",
        "(table.unit_count + units_per_chunk - 1) / units_per_chunk",
        "(table.unit_count + (table.unit_count < units_per_chunk ? units_per_chunk - 1 : 0)) / units_per_chunk",
    ),
    Fault(
        "gradients are not written back unscaled",
        "csrc/cpu/launch.cpp",
        "if (options.unscale != 1.0)",
        "if (options.unscale == 1.0)",
    ),
    Fault(
        "AVX-512 fuses multiplications and additions",
        "csrc/cpu/kernels_avx512.cpp",
        "#pragma GCC target(",
        '#pragma GCC optimize("fp-contract=fast")\n#pragma GCC target(',
        MACHINE_CODE,
    ),
    Fault(
        "the baseline needs AVX2",
        "csrc/cpu/kernels_baseline.cpp",
        "namespace adamw_ext::cpu::baseline {\n",
        '#pragma GCC target("avx2")\nnamespace adamw_ext::cpu::baseline {\n',
        MACHINE_CODE,
    ),
    # The step.
    Fault(
        "the last of several tensors is dropped",
        "csrc/torch/stepper.cpp",
        "numel = slot.numel;",
        "numel = i == 0 || i + 1 < slots_.size() ? slot.numel : 0;",
    ),
    Fault("maximize is ignored", "csrc/torch/stepper.cpp", "unscale_, options.maximize)", "unscale_, false)"),
    Fault(
        "found_inf is ignored",
        "csrc/torch/stepper.cpp",
        'read_scalar(inputs.found_inf, "found_inf") != 0.0',
        'read_scalar(inputs.found_inf, "found_inf") < 0.0',
    ),
    Fault(
        "found_inf skips only where it is 1",
        "csrc/torch/stepper.cpp",
        'read_scalar(inputs.found_inf, "found_inf") != 0.0',
        'read_scalar(inputs.found_inf, "found_inf") == 1.0',
    ),
    Fault(
        "every group takes the first one's hyperparameters",
        "csrc/torch/stepper.cpp",
        "compute_scalars(hypers_[slot.group],",
        "compute_scalars(hypers_[0],",
    ),
    Fault(
        "params of a group share the first one's step",
        "csrc/torch/stepper.cpp",
        "if (keys_[key].steps_done == done) return key;",
        "return key;",
    ),
    Fault(
        "a gradient with other strides is read in memory order",
        "csrc/torch/stepper.cpp",
        "tensor.device() == slot.bucket->device && slot.layout.matches(tensor) &&",
        "tensor.device() == slot.bucket->device &&",
    ),
    Fault("the step count does not advance", "csrc/torch/stepper.cpp", "*slot.steps_done += 1.0f;", ";"),
    # The capturable branch.
    Fault(
        "a capturable step's bias correction lags a step",
        "csrc/core/advance.h",
        "compute_scalars(source.read(), done + 1,",
        "compute_scalars(source.read(), done + (done > 0 ? 0 : 1),",
    ),
    Fault(
        "a capturable step ignores maximize",
        "csrc/core/advance.h",
        "scaling.unscale(), source.maximize",
        "scaling.unscale(), false",
    ),
    Fault(
        "a capturable step ignores found_inf",
        "csrc/torch/executor.cpp",
        "if (steps.scaling.skips()) {",
        "if (false) {",
    ),
    # The CUDA path, as it is emulated.
    Fault(
        "both ends of a run are skipped",
        "csrc/cuda/body.h",
        "i < before + (end - rest); i += threads",
        "i < 0; i += threads",
    ),
    Fault("a pointer is taken for aligned", "csrc/cuda/body.h", "% vector_bytes == 0;", "% vector_bytes != 17;"),
    Fault(
        "an entry that fills a launch is dropped",
        "csrc/cuda/pack.h",
        "if (const Error error = flush()) return error;\n      if (units > most_units)",
        "return flush();\n      if (units > most_units)",
    ),
    Fault(
        "the scalar kernel counts a skipped step",
        "csrc/cuda/arguments.h",
        "if (arguments.scaling.skips()) {",
        "if (false) {",
    ),
    Fault(
        "the update kernel ignores found_inf",
        "csrc/cuda/arguments.h",
        "if (Scaling{nullptr, header.found_inf}.skips()) return;",
        "",
    ),
    Fault(
        "a gradient of another dtype is read as the param's",
        "csrc/cpu/launch.cpp",
        "own != nullptr && entry.grad_dtype == size.param",
        "own != nullptr",
    ),
    Fault(
        "the second piece of a widened gradient repeats the first",
        "csrc/cpu/launch.cpp",
        "rest.grad = from(entry.grad, size_of(entry.grad_dtype));",
        "rest.grad = entry.grad;",
    ),
    Fault(
        "scalars of a second upload overwrite the first",
        "csrc/cuda/pack.h",
        "arguments.destination = destination + begin;",
        "arguments.destination = destination;",
    ),
    # Clipping.
    Fault(
        "the norm drops the last piece",
        "csrc/cpu/launch.cpp",
        "return add_up(sums, table.piece_count);",
        "return add_up(sums, table.piece_count > 1 ? table.piece_count - 1 : table.piece_count);",
        CLIPPING,
    ),
    Fault(
        "the norm kernel drops the last piece",
        "csrc/cuda/pack.h",
        "TotalArguments{sums, table.piece_count,",
        "TotalArguments{sums, table.piece_count > 1 ? table.piece_count - 1 : table.piece_count,",
        CLIPPING,
    ),
    Fault(
        "the norm adds the accumulators in another order",
        "csrc/core/norm.h",
        "accumulators[i] += accumulators[i + half];",
        "accumulators[i] += accumulators[2 * half - 1 - i];",
        CLIPPING,
    ),
    Fault(
        "a skipped step is measured",
        "csrc/torch/executor.cpp",
        "} else if (!steps.scaling.skips()) {",
        "} else {",
        CLIPPING,
    ),
    Fault(
        "the total kernel ignores found_inf",
        "csrc/cuda/arguments.h",
        "if (arguments.scaling.skips()) return false;",
        "",
        CLIPPING,
    ),
    Fault(
        "the clip coefficient is not limited to 1",
        "csrc/core/norm.h",
        "return coefficient >= 1.0 ? 1.0 : coefficient;",
        "return coefficient;",
        CLIPPING,
    ),
    Fault(
        "the norm is that of scaled gradients",
        "csrc/core/norm.h",
        "return sum * unscale * unscale;",
        "return sum;",
        CLIPPING,
    ),
    Fault(
        "gradients are written back clipped",
        "csrc/cpu/launch.cpp",
        "kernels.unscale[grad](entry, options.unscale, begin, end);",
        "kernels.unscale[grad](entry, table.scalars[entry.scalars].in_double.grad_factor, begin, end);",
        CLIPPING,
    ),
    Fault(
        "the update kernel writes gradients back clipped",
        "csrc/cuda/body.h",
        "g[lane] *= s.unscale;",
        "g[lane] *= s.grad_factor;",
        CLIPPING,
    ),
    Fault(
        "two buckets are clipped by their own sums",
        "csrc/torch/stepper.cpp",
        "bucket.sum_of_squares.copy_(total);",
        "bucket.sum_of_squares.copy_(bucket.own_sum_of_squares);",
        CLIPPING,
    ),
    # Masters and stochastic rounding.
    Fault(
        "a negative remainder does not borrow",
        "csrc/core/rounding.h",
        "((high - (remainder >> 15)) << 16) | remainder",
        "(high << 16) | remainder",
        MASTERS,
    ),
    Fault(
        "a param that someone has written to is ignored",
        "csrc/core/rounding.h",
        "codec<Half>::encode(stored) == param ? ~0u : 0u",
        "~0u",
        MASTERS,
    ),
    Fault(
        "random bits do not depend on the step",
        "csrc/core/philox.inc",
        "  words[2] = Lanes{} + key.step;",
        "  words[2] = Lanes{};",
        STOCHASTIC,
    ),
    Fault(
        "every piece has the random bits of the first",
        "csrc/cpu/launch.cpp",
        "fill_run(kernels, entry.element_number + begin, count, key)",
        "fill_run(kernels, entry.element_number, count, key)",
        STOCHASTIC,
    ),
    # DTensors.
    Fault(
        "a part has the random bits of the whole's first elements",
        "csrc/python/members.cpp",
        "element_number(fields[4].cast<std::uint64_t>(), fields[5].cast<std::uint64_t>())",
        "element_number(fields[4].cast<std::uint64_t>(), 0)",
        SHARDED,
    ),
    Fault(
        "random bits of a part that is cut across go on as if it were not",
        "csrc/cpu/launch.cpp",
        "entry.element_number + entry.places->of(begin + done)",
        "entry.element_number + begin + done",
        SHARDED,
    ),
    Fault(
        "each process clips by the norm of its part",
        "csrc/torch/stepper.cpp",
        "sum == 0 ? part : complete(sum, part)",
        "part",
        SHARDED,
    ),
    Fault(
        "gradients that are summands are not added up",
        "csrc/python/grads.cpp",
        "if (spec == nullptr || !same_placement(param.spec.ptr(), spec)) {",
        "if (spec == nullptr) {",
        SHARDED,
    ),
    Fault(
        "a part that was replaced goes unnoticed",
        "csrc/python/watch.cpp",
        "part_identity(whole.dtensor) == whole.part && spec_of(whole.dtensor) == whole.spec",
        "spec_of(whole.dtensor) == whole.spec",
        SHARDED,
    ),
    # The script class and the operators.
    Fault(
        "the script class counts params anew in every group",
        "csrc/torch/adamw.cpp",
        "element_number(i, 0)",
        "element_number(0, 0)",
        SCRIPTED,
    ),
    Fault("the script class skips clipping", "csrc/torch/adamw.cpp", "&skips, &norms,", "&skips, nullptr,", SCRIPTED),
    Fault("a loaded step count is lost", "csrc/torch/param_state.cpp", ".fill_(done)", ".fill_(0)", SCRIPTED),
    Fault(
        "a loaded master is that of the rounded param",
        "csrc/torch/param_state.cpp",
        "state.master = laid_out_as(param, dtype, value);",
        "state.master = new_state(param, options, name).master;",
        SCRIPTED,
    ),
    Fault(
        "TorchScript is shown what the operator writes",
        "csrc/torch/operators.cpp",
        'constexpr const char* unmarked[] = {"adamw_.unmarked", "adamw_.unmarked_tensor_lr"};',
        'constexpr const char* unmarked[] = {"unmarked_.unmarked", "unmarked_.unmarked_tensor_lr"};',
        OPERATORS,
    ),
    Fault(
        "the operator may be recorded",
        "csrc/torch/operators.cpp",
        "at::GradMode::is_enabled() && i < arguments.size()",
        "false && i < arguments.size()",
        OPERATORS,
    ),
    # The Python layer: the class.
    Fault(
        "state that a refused first step made is kept",
        "adamw_ext/optimizer.py",
        "                    self.state.pop(param, None)\n",
        "                    pass\n",
        REFUSALS,
    ),
    Fault(
        "all params have the random bits of the first",
        "adamw_ext/optimizer.py",
        "                number += 1\n",
        "                number = 0\n",
        STOCHASTIC,
    ),
    Fault(
        "grad_norm is squared",
        "adamw_ext/optimizer.py",
        "math.sqrt(sum_of_squares.item())",
        "sum_of_squares.item()",
        CLIPPING,
    ),
    Fault(
        "a scaler's found_inf does not reach the kernel",
        "adamw_ext/optimizer.py",
        'found_inf = getattr(self, "found_inf", None)',
        "found_inf = None",
        CLASS,
    ),
    Fault(
        "groups added later lack the constructor's options",
        "adamw_ext/optimizer.py",
        "            for key, value in self._options.items():\n                param_group.setdefault(key, value)\n",
        "            if not self.param_groups:\n                param_group.update(self._options)\n",
        (*CLIPPING, *MASTERS, *STOCHASTIC, *LOADING),
    ),
    Fault(
        "init_state keeps stale masters",
        "adamw_ext/optimizer.py",
        "group)\n                        drop_other_masters(param, state, group)\n\n",
        "group)\n\n",
        MASTERS,
    ),
    Fault(
        "a step keeps stale masters",
        "adamw_ext/optimizer.py",
        "                        drop_other_masters(param, state, group)\n        except",
        "                        pass\n        except",
        MASTERS,
    ),
    Fault(
        "params left to torch miss the clipping that was asked for, silently",
        "adamw_ext/optimizer.py",
        'if self._elsewhere and any(group.get("max_grad_norm") is not None for group in self.param_groups):',
        "if False:",
        CLIPPING,
    ),
    Fault(
        "loading takes over the implementation flags",
        "adamw_ext/optimizer.py",
        "                loaded[flag] = current[flag]",
        "                loaded.setdefault(flag, current[flag])",
        LOADING,
    ),
    Fault(
        "a loaded number takes the place of a tensor lr",
        "adamw_ext/options.py",
        "return self._current.fill_(self._loaded)",
        "return self._current.clone().fill_(self._loaded)",
        LOADING,
    ),
    # State.
    Fault(
        "new step counts begin at 1",
        "adamw_ext/state.py",
        "    step = torch.zeros((), dtype=torch.float32, device=step_device(param, group))",
        "    step = torch.ones((), dtype=torch.float32, device=step_device(param, group))",
        CLASS,
    ),
    Fault(
        "loaded moments are rounded to the param's dtype",
        "adamw_ext/state.py",
        "    return loaded.dtype if keeps else param.dtype",
        "    return param.dtype",
        LOADING,
    ),
    Fault(
        "live state is loaded over itself",
        "adamw_ext/state_load.py",
        "                self._loaded[key] = value.clone()",
        "                pass",
        LOADING,
    ),
    Fault(
        "a master of the other kind is made anew from the param",
        "adamw_ext/state_load.py",
        "self._loaded[key] if key in self._loaded else converted_master(self._param, self._loaded, key)",
        "self._loaded[key] if key in self._loaded else new_master(self._param, key)",
        (*MASTERS, *CONVERSION),
    ),
    Fault(
        "moments in another memory order are taken as they are",
        "adamw_ext/state.py",
        "if is_moment(moment, param) and within_storage(moment) and not laid_out_as(moment, param):",
        "if False:",
        (*LOADING, *REFUSALS),
    ),
    Fault(
        "a loaded step count is off by one",
        "adamw_ext/state.py",
        "    return torch.tensor(float(value), dtype=torch.float32, device=device)",
        "    return torch.tensor(max(float(value) - 1.0, 0.0), dtype=torch.float32, device=device)",
        LOADING,
    ),
    # Sharded params.
    Fault(
        "the norm leaves out the second dimension of the mesh",
        "adamw_ext/sharded.py",
        "        for dimension in cuts:\n",
        "        for dimension in cuts[:1]:\n",
        SHARDED,
    ),
    Fault(
        "every part begins at the whole's first element",
        "adamw_ext/sharded.py",
        "    return first, (run, rows, stride, block_stride) if len(levels) > 1 else None",
        "    return 0, (run, rows, stride, block_stride) if len(levels) > 1 else None",
        SHARDED,
    ),
    Fault(
        "params that are summands are taken for whole",
        "adamw_ext/sharded.py",
        "    if any(placement.is_partial() for placement in param.placements):",
        "    if False:",
        SHARDED_STATE + SHARDED,
    ),
    Fault(
        "a loaded part from other processes is taken",
        "adamw_ext/sharded.py",
        "(value.shape, value.placements, value.device_mesh) != (param.shape, param.placements, param.device_mesh):",
        "value.shape != param.shape:",
        SHARDED_STATE,
    ),
    # Conversions, the functional form, compiled steps, torch's path.
    Fault(
        "an imported master is shown rounded half to even",
        "adamw_ext/checkpoint.py",
        "own.copy_(_C.split_master(master)[0] if param.dtype == torch.bfloat16 else master)",
        "own.copy_(master)",
        CONVERSION,
    ),
    Fault(
        "a param that someone has written to is exported as its old master",
        "adamw_ext/checkpoint.py",
        "    return torch.where(is_shown, stored, shown.float())",
        "    return stored",
        CONVERSION,
    ),
    Fault(
        "the functional form swaps the betas",
        "adamw_ext/functional.py",
        "        beta1=float(beta1),\n        beta2=float(beta2),",
        "        beta1=float(beta2),\n        beta2=float(beta1),",
        OPERATORS,
    ),
    Fault(
        "the functional script class loses its state",
        "adamw_ext/jit.py",
        "            self.state[param] = state\n",
        "            self.state[param] = self._state_of(param)\n",
        OPERATORS,
    ),
    Fault(
        "a compiled step over copies writes into the params",
        "adamw_ext/compiled.py",
        "= {} if in_place else dict(zip(numbers, params, strict=True))",
        "= {}",
        COMPILED,
    ),
    Fault(
        "a compiled step mixes up which params have gradients",
        "adamw_ext/compiled.py",
        "            numbers.append(number)\n",
        "            numbers.append(len(numbers))\n",
        COMPILED,
    ),
    Fault(
        "params that torch updates ignore the group's weight decay",
        "adamw_ext/torch_path.py",
        'weight_decay=group["weight_decay"],',
        "weight_decay=0.0,",
        CLASS,
    ),
]
