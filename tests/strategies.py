"""What hypothesis draws: scenarios, and ways to step them; and how much."""

import os
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.guarded import LAYOUTS
from tests.helpers import ISA_LEVELS
from tests.scenarios import FLOATS, MODES, NUMBERS, Group, Param, Scenario, Step
from tests.ways import Class, Functional, Script

# The same cases at every run, unless tests/long_properties.py has asked for its own. Cases take long to draw and to
# run, because they are trainings of many tensors.
PROFILE = {
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}
EXAMPLES = int(os.environ.get("TESTS_EXAMPLES", "60"))  # of each property; fewer on slow builds (tests/sanitizers.py)
settings.register_profile("same", derandomize=True, max_examples=EXAMPLES, **PROFILE)
if settings.get_current_profile_name() != "long":
    settings.load_profile("same")

SHAPES = [(), (0,), (1,), (3,), (63,), (64,), (65,), (5, 0, 2), (2, 3), (1, 1, 7), (2, 3, 4, 5), (3, 43), (129,)]
LONG = [(4096,), (4097,), (20_011,), (3, 5000), (70_001,)]
HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")

shapes = st.one_of(
    st.sampled_from(SHAPES),
    st.integers(0, 300).map(lambda size: (size,)),
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
)


def mostly(usual: st.SearchStrategy, other: st.SearchStrategy, *, one_in: int) -> st.SearchStrategy:
    return st.integers(1, one_in).flatmap(lambda n: other if n == one_in else usual)


@st.composite
def params(draw: st.DrawFn, mode: str, shapes: st.SearchStrategy = shapes) -> Param:
    dtype = draw(st.sampled_from(MODES[mode][1]))
    grad_dtype = None
    if HAS_GRAD_DTYPE and dtype in FLOATS[:3]:
        grad_dtype = draw(mostly(st.none(), st.sampled_from(FLOATS[:3]), one_in=4))
    return Param(
        shape=draw(shapes),
        dtype=dtype,
        layout=draw(mostly(st.just("contiguous"), st.sampled_from(LAYOUTS), one_in=2)),
        offset=draw(st.integers(0, 9)),
        steps_before=draw(mostly(st.just(0), st.sampled_from([1, 2, 7, 1000]), one_in=3)),
        grad_dtype=grad_dtype,
        grad_layout=draw(mostly(st.just("as the param"), st.sampled_from([*LAYOUTS, "expanded", "lazy"]), one_in=3)),
        grad_offset=draw(st.integers(0, 9)),
    )


@st.composite
def groups(draw: st.DrawFn, modes: Sequence[str], clips: bool) -> Group:
    mode = draw(mostly(st.just(modes[0]), st.sampled_from(modes), one_in=2))
    tiny = params(mode, st.sampled_from([(), (0,), (1,), (2,), (3,), (2, 2)]))
    long = params(mode, st.sampled_from(LONG))
    shape = draw(st.integers(0, 19))
    repeat = 1
    if shape == 18:  # a crowd
        members, repeat = draw(st.lists(tiny, min_size=1, max_size=3)), draw(st.sampled_from([30, 70, 600]))
    elif shape >= 16:  # a large one, and tiny ones behind it
        members = [draw(long), *draw(st.lists(tiny, max_size=4))]
    else:
        members = draw(st.lists(params(mode), max_size=7))
    return Group(
        params=tuple(members),
        repeat=repeat,
        mode=mode,
        lr=draw(st.one_of(st.sampled_from([1e-2, 0.0, 1e-4, 0.1, 3.0]), st.floats(1e-6, 1.0))),
        betas=(
            draw(st.one_of(st.sampled_from([0.9, 0.0, 0.3, 0.5, 0.9999]), st.floats(0.0, 0.9999))),
            draw(st.one_of(st.sampled_from([0.999, 0.0, 0.5, 0.95, 0.999999]), st.floats(0.0, 0.9999))),
        ),
        eps=draw(st.sampled_from([1e-8, 1e-12, 1e-3, 1.0, 0.0])),
        weight_decay=draw(st.one_of(st.sampled_from([0.1, 0.0, 1e-2, 2.0]), st.floats(0.0, 1.0))),
        amsgrad=draw(st.booleans()),
        maximize=draw(st.booleans()),
        seed=draw(st.sampled_from([0, 1, 2**40 + 3])) if "at random" in mode else 0,
        max_grad_norm=draw(st.sampled_from([None, 0.0, 0.5, 30.0])) if clips else None,
    )


steps = st.builds(
    Step,
    numbers=mostly(st.just("ordinary"), st.sampled_from(NUMBERS), one_in=3),
    idle=mostly(st.none(), st.tuples(st.integers(1, 5), st.integers(0, 4)), one_in=2),
    lr_factor=mostly(st.none(), st.sampled_from([1.0, 0.5, 0.0]), one_in=4),
    grad_scale=mostly(st.none(), st.sampled_from([1.0, 1024.0, 1536.7, 0.125, 65536.0]), one_in=4),
    found_inf=mostly(st.none(), st.sampled_from([0.0, 1.0, 2.0, float("nan")]), one_in=3),
)


@st.composite
def scenarios(draw: st.DrawFn, modes: Sequence[str] = tuple(MODES), can_clip: bool = True) -> Scenario:
    """With at least one param."""
    clips = can_clip and draw(st.integers(0, 4)) == 4
    several = st.lists(groups(modes, clips), min_size=1, max_size=3)
    return Scenario(
        groups=tuple(draw(several.filter(lambda drawn: any(group.params for group in drawn)))),
        steps=tuple(draw(st.lists(steps, min_size=1, max_size=5))),
        numbers=draw(mostly(st.just("ordinary"), st.sampled_from(NUMBERS), one_in=3)),
        seed=draw(st.integers(0, 2**16)),
    )


flags = st.sampled_from([None, "capturable", "fused"])
isas = st.sampled_from(ISA_LEVELS)
classes = st.builds(
    Class,
    isa=isas,
    threads=st.sampled_from([1, 2, 3]),
    units_per_chunk=mostly(st.just(0), st.sampled_from([1, 2, 7, 64]), one_in=2),
    emulated_arguments=mostly(st.just(0), st.sampled_from([4096, 32764]), one_in=3),
    flag=flags,
    has_tensor_hyper=st.booleans(),
    is_guarded=st.booleans(),
    is_dense=mostly(st.just(False), st.just(True), one_in=4),
    saved_after=st.one_of(st.none(), st.integers(0, 4)),
    saved_flag=flags,
)
functionals = st.builds(
    Functional,
    form=st.sampled_from(["functional", "default", "tensor_lr", "unmarked", "unmarked_tensor_lr"]),
    isa=isas,
)
scripts = st.builds(
    Script, after=st.integers(0, 4), isa=isas, flag=flags, takes_list=st.booleans(), is_guarded=st.booleans()
)
