"""How a float32 master is kept as a bfloat16 and 16 bits more: `_C.split_master` and `_C.join_master`.

Floats are compared as integers: between two neighbouring bfloat16 numbers the bits of float32 numbers, taken as
integers, are as far apart as the numbers themselves, and half a unit in the last place is 0x8000.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adamw_ext import _C

pytestmark = pytest.mark.usefixtures("one_thread")

LOW_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)  # exact, just above, around the tie, just below
PATTERNS = 2**32
PATTERNS_AT_A_TIME = 2**18  # so that what a check makes stays in the cache


def as_int32(pattern: int) -> int:
    return pattern - PATTERNS if pattern >= PATTERNS // 2 else pattern


def all_patterns() -> Iterator[Tensor]:
    """Every int32 once."""
    for first in range(-PATTERNS // 2, PATTERNS // 2, PATTERNS_AT_A_TIME):
        yield torch.arange(first, first + PATTERNS_AT_A_TIME, dtype=torch.int32)


def sampled_patterns() -> Iterator[Tensor]:
    """Every high half with the low halves that matter, and a million others."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    yield from (high | low for low in LOW_HALVES)
    yield torch.randint(-PATTERNS // 2, PATTERNS // 2, (2**20,), generator=torch.Generator().manual_seed(0)).int()


def halves(patterns: Tensor) -> tuple[Tensor, Tensor]:
    """The high halves as bfloat16, the low ones as int16."""
    return (patterns >> 16).short().view(torch.bfloat16), patterns.short()


def widened(param: Tensor) -> Tensor:
    """The bits of a bfloat16 as those of the same number in float32."""
    return param.view(torch.int16).int().bitwise_left_shift_(16)


def assert_encoded_without_loss(patterns: Tensor) -> None:
    values = patterns.view(torch.float32)
    param, remainder = _C.split_master(values)
    joined = _C.join_master(param, remainder)
    distance = widened(param).sub_(patterns)  # of the magnitudes; beyond 2**30 where the sign differs
    is_off = distance.add_(0x7FFF).bitwise_right_shift_(16)  # 0 from -0x7fff to 0x8000: a tie, away from zero
    is_off |= joined.view(torch.int32) ^ patterns
    if not is_off.any():
        return
    is_nan = values.isnan()
    assert bool(((is_off == 0) | is_nan).all())
    is_negative = patterns < 0
    canonical = torch.where(is_negative, as_int32(0xFFC00000), 0x7FC00000)
    assert bool(((widened(param) == canonical) & (remainder == 0) | ~is_nan).all())
    assert torch.equal(joined.isnan(), is_nan)


def assert_a_written_param_is_kept(pairs: Tensor) -> None:
    """Any bfloat16 beside any remainder."""
    param, remainder = halves(pairs)
    joined = _C.join_master(param, remainder)
    again, rest = _C.split_master(joined)
    shows_other = again.view(torch.int16) ^ param.view(torch.int16)
    keeps_other = rest ^ remainder
    if not (shows_other | keeps_other).any():
        return
    is_nan = param.isnan()
    assert torch.equal(joined.isnan(), is_nan)
    assert bool(((shows_other == 0) | is_nan).all())
    # No float has these high halves with these low ones: below zero's magnitude, above infinity.
    is_impossible = (param == 0) & (remainder < 0) | param.isinf() & (remainder > 0)
    assert bool(((keeps_other == 0) | is_nan | is_impossible).all())
    assert bool(((joined.view(torch.int32) == widened(param)) | ~is_impossible).all())


def test_joining_gives_every_sampled_float_back_and_the_param_is_nearest_ties_away_from_zero() -> None:
    for patterns in sampled_patterns():
        assert_encoded_without_loss(patterns)


@pytest.mark.slow
def test_joining_gives_every_float_back_and_the_param_is_nearest_ties_away_from_zero() -> None:
    for patterns in all_patterns():
        assert_encoded_without_loss(patterns)


def test_a_sampled_param_written_beside_a_sampled_remainder_is_what_the_joined_float_rounds_to() -> None:
    for pairs in sampled_patterns():
        assert_a_written_param_is_kept(pairs)


@pytest.mark.slow
def test_any_param_written_beside_any_remainder_is_what_the_joined_float_rounds_to() -> None:
    for pairs in all_patterns():
        assert_a_written_param_is_kept(pairs)


def test_the_param_is_within_half_a_unit_in_the_last_place_reckoned_in_float64() -> None:
    """The same without integers: no neighbour is nearer, and torch rounds to the same where there is no tie."""
    for patterns in sampled_patterns():
        values = patterns.view(torch.float32)
        values = values[values.isfinite()]
        param, _ = _C.split_master(values)
        bits = param.view(torch.int16)
        neighbours = [(bits + step).view(torch.bfloat16) for step in (-1, 1)]
        # A magnitude that the greatest float would have with one more exponent: what infinity is rounded from.
        as_number = [p.double().nan_to_num(nan=torch.inf).clamp(-(2.0**128), 2.0**128) for p in (param, *neighbours)]
        error, below, above = (number.sub(values.double()).abs() for number in as_number)
        is_zero = (bits & 0x7FFF) == 0  # whose bits less one are no neighbour's
        assert bool(((error <= below) | is_zero).all())
        assert bool((error <= above).all())
        is_tie = (error == below) & ~is_zero | (error == above)
        assert bool((values.to(torch.bfloat16).view(torch.int16) == bits)[~is_tie].all())
        assert bool((as_number[0].abs() > values.double().abs())[is_tie].all())


def test_infinities_stay_infinities_and_have_no_remainder() -> None:
    infinities = torch.tensor([torch.inf, -torch.inf])
    param, remainder = _C.split_master(infinities)
    assert param.tolist() == [torch.inf, -torch.inf]
    assert remainder.tolist() == [0, 0]
    assert torch.equal(_C.join_master(param, remainder), infinities)


def test_every_nan_becomes_the_quiet_one_of_its_sign_and_none_becomes_zero() -> None:
    """An increment would carry 0x7fffffff to the bfloat16 -0.0, as in other implementations."""
    for pattern in (0x7FFFFFFF, 0x7FFF8000, 0x7FC00000, 0x7F800001, 0x7F808000, 0x7FBFFFFF):
        for sign in (0, 0x80000000):
            nan = torch.tensor([as_int32(pattern | sign)], dtype=torch.int32).view(torch.float32)
            param, remainder = _C.split_master(nan)
            assert param.view(torch.int16).item() & 0xFFFF == 0x7FC0 | sign >> 16
            assert remainder.item() == 0
            assert _C.join_master(param, remainder).isnan().item()


def test_a_nan_in_the_param_stays_a_nan_whatever_the_remainder() -> None:
    for high, low in itertools.product((0x7F81, 0x7FC0, 0x7FFF, 0xFF81, 0xFFFF), (0, 1, 0x7FFF, 0x8000, 0xFFFF)):
        pair = torch.tensor([as_int32(high << 16 | low)], dtype=torch.int32)
        assert _C.join_master(*halves(pair)).isnan().item()


# (float32, bfloat16, remainder): the low half as int16, and the high half plus one where that is negative.
PUBLISHED = [
    (0x00000000, 0x0000, 0),
    (0x80000000, 0x8000, 0),
    (0x3F800000, 0x3F80, 0),  # 1
    (0x3F800001, 0x3F80, 1),
    (0x3F807FFF, 0x3F80, 32767),
    (0x3F808000, 0x3F81, -32768),  # a tie, which half to even would round to 0x3F80
    (0x3F818000, 0x3F82, -32768),  # and one that it would round up, too
    (0x3F808001, 0x3F81, -32767),
    (0x3F80FFFF, 0x3F81, -1),
    (0xBF808000, 0xBF81, -32768),
    (0x40490FDB, 0x4049, 0x0FDB),  # pi
    (0x402DF854, 0x402E, 0xF854 - 0x10000),  # e
    (0x3FFFFFFF, 0x4000, -1),  # carries into the exponent
    (0x00000001, 0x0000, 1),  # subnormal
    (0x00008000, 0x0001, -32768),
    (0x8000FFFF, 0x8001, -1),
    (0x7F7FFFFF, 0x7F80, -1),  # the greatest float shows as infinity and is not lost
    (0xFF7F8000, 0xFF80, -32768),
    (0x7F800000, 0x7F80, 0),
]


@pytest.mark.parametrize(("pattern", "param", "remainder"), PUBLISHED, ids=lambda value: f"{value:#x}")
def test_the_layout_is_the_published_one(pattern: int, param: int, remainder: int) -> None:
    """That of apex and TransformerEngine, whose checkpoints hold these numbers."""
    value = torch.tensor([as_int32(pattern)], dtype=torch.int32).view(torch.float32)
    high, low = _C.split_master(value)
    assert high.view(torch.int16).item() & 0xFFFF == param
    assert low.item() == remainder
    assert _C.join_master(high, low).view(torch.int32).item() == as_int32(pattern)


def test_tensors_of_any_shape_and_strides_are_split_and_joined() -> None:
    memory = torch.randn(8, 9, 10, generator=torch.Generator().manual_seed(0))
    for value in (memory, memory[1:, ::2, 3], memory.permute(2, 0, 1), memory[0, 0, 0], memory[:0], memory[:1].mT):
        param, remainder = _C.split_master(value)
        assert (param.shape, param.dtype) == (value.shape, torch.bfloat16)
        assert (remainder.shape, remainder.dtype) == (value.shape, torch.int16)
        assert torch.equal(_C.join_master(param, remainder), value)
        strided = [torch.stack([half, half], dim=-1)[..., 1] for half in (param, remainder)]
        assert torch.equal(_C.join_master(*strided), value)


def test_tensors_that_are_no_master_or_no_halves_are_refused() -> None:
    param, remainder = _C.split_master(torch.ones(3))
    for wrong in (torch.ones(3, dtype=torch.float64), param, torch.ones(3).to_sparse()):
        with pytest.raises(RuntimeError, match=r"master must be a strided tensor of dtype torch\.float32, but has"):
            _C.split_master(wrong)
    with pytest.raises(RuntimeError, match=r"param must be a strided tensor of dtype torch\.bfloat16, but has"):
        _C.join_master(param.half(), remainder)
    with pytest.raises(RuntimeError, match=r"remainder must be a strided tensor of dtype torch\.int16, but has"):
        _C.join_master(param, remainder.int())
    with pytest.raises(RuntimeError, match=r"remainder must have sizes \[3\], but has \[2\]"):
        _C.join_master(param, remainder[:2])
    with pytest.raises(TypeError, match="master must be a tensor, but is None"):
        _C.split_master(None)
