"""Tensors of any strides in one storage, with bytes around and between them that nobody may write."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch

LAYOUTS = ("contiguous", "transposed", "channels last", "padded rows", "every other")

_ALIGNMENT = 64  # bytes: begins are this, plus an offset in elements
_GUARD = 24  # bytes, at least, between the ends of two tensors
_UNIT = 2  # bytes: the size of the smallest number


def strides_of(layout: str, shape: Sequence[int]) -> tuple[int, ...]:
    """In elements, for one of LAYOUTS."""
    inner_first = list(reversed(range(len(shape))))
    sizes = [max(size, 1) for size in shape]
    if layout == "transposed":
        inner_first.reverse()
    if layout == "channels last" and len(shape) > 2:
        inner_first = [1, *range(len(shape) - 1, 1, -1), 0]
    if layout == "padded rows" and len(shape) > 1:
        sizes[-1] += 3
    strides = dict(zip(inner_first, accumulate((sizes[i] for i in inner_first), int.__mul__, initial=1), strict=False))
    return tuple(strides[i] * (2 if layout == "every other" else 1) for i in range(len(shape)))


@dataclass(frozen=True)
class Place:
    """How one tensor lies in a storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0  # elements behind an address that is a multiple of 64 bytes
    has_gaps: bool = False  # after every element, wide enough for another one

    @property
    def end(self) -> int:
        """In elements behind its begin."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


class Guarded:
    """Tensors in one storage of random bytes. A tensor with gaps has the next one in its gaps where that fits.

    ``tensors`` are views of the storage, in the order of the places. What a tensor holds is random until it is written.
    """

    def __init__(self, places: Sequence[Place], generator: torch.Generator) -> None:
        begins = self._begins(places)
        ends = [begin + place.dtype.itemsize * place.end for begin, place in zip(begins, places, strict=True)]
        size = -(-(max(ends, default=0) + _GUARD) // _ALIGNMENT) * _ALIGNMENT
        self.bytes = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        typed = {place.dtype: self.bytes.view(place.dtype) for place in places}
        self.tensors = [
            typed[place.dtype].as_strided(place.shape, place.strides, begin // place.dtype.itemsize)
            for begin, place in zip(begins, places, strict=True)
        ]
        # Which tensor each unit belongs to, counted from 1; 0: none.
        self._owners = torch.zeros(size // _UNIT, dtype=torch.int32)
        for number, (begin, place) in enumerate(zip(begins, places, strict=True), 1):
            units = place.dtype.itemsize // _UNIT
            strides = (*(stride * units for stride in place.strides), 1)
            self._owners.as_strided((*place.shape, units), strides, begin // _UNIT).fill_(number)

    @staticmethod
    def _begins(places: Sequence[Place]) -> list[int]:
        """In bytes."""
        begins: list[int] = []
        end, host = _ALIGNMENT, None  # host: a tensor whose gaps are free
        for place in places:
            size = place.dtype.itemsize
            if host and place.has_gaps and host.dtype == place.dtype and place.end <= host.end:
                begins.append(begins[-1] + size)
                end += size
                host = None
                continue
            begins.append(-(-(end + _GUARD) // _ALIGNMENT) * _ALIGNMENT + place.offset * size)
            end = begins[-1] + size * place.end
            host = place if place.has_gaps and place.end else None
        return begins

    @contextmanager
    def only_written_in(self, written: Sequence[bool], what: str) -> Iterator[None]:
        """Within, the tensors for which this is True may be written, and no other byte."""
        before = self.bytes.clone()
        yield
        may_be_written = torch.tensor([False, *written])[self._owners]
        strays = ((self.bytes.view(torch.int16) != before.view(torch.int16)) & ~may_be_written).nonzero()
        if len(strays):
            at = int(strays[0])
            owner = int(self._owners[at])
            whose = f"{what} {owner - 1}, which this step must leave alone" if owner else f"no {what}"
            raise AssertionError(
                f"{len(strays) * _UNIT} bytes were written that must not be, the first at byte {at * _UNIT} of "
                f"{len(before)}: it belongs to {whose}"
            )
