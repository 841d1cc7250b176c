"""Compiles buffers_floor.cpp for this machine and calls it: the least time that reading and writing buffers takes.

Beside streaming_floor.py, whose four streams are of equal size, for modes that keep other things in other widths.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.host_library import compile_library

PIECE_BYTES = 64 * 1024  # of the largest stream
BLOCK_ELEMENTS = 64  # the time is the same with 128; streaming_floor.py takes as long over streams of equal size


class Stream(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("bytes", "block", "is_written")))


def buffers_floor(rows: Sequence[Sequence[tuple[Tensor, bool]]]) -> Callable[..., None]:
    """A function that goes through every row's buffers side by side; the flag says whether a buffer is written too.

    No value changes, because every word that is written has been combined with a mask that is 0 unless a test gives
    another. The buffers of a row belong to the same elements, however many bytes each has for one.
    """
    streams_per_piece = max(map(len, rows))
    streams: list[Stream] = []
    for row in rows:
        pieces = -(-max(buffer.nbytes for buffer, _ in row) // PIECE_BYTES)
        elements = row[0][0].numel()
        for piece in range(pieces):
            taken = [part(buffer, is_written, elements, piece, pieces) for buffer, is_written in row]
            streams += taken + [Stream()] * (streams_per_piece - len(taken))
    table = (Stream * len(streams))(*streams)
    pieces = len(streams) // streams_per_piece
    per_turn = max(1, pieces * PIECE_BYTES // max(1, sum(max(buffer.nbytes for buffer, _ in row) for row in rows)))
    arguments = (
        table,
        ctypes.c_int64(pieces),
        ctypes.c_int64(streams_per_piece),
        ctypes.c_int64(per_turn),
        ctypes.c_int(min(-(-pieces // per_turn), torch.get_num_threads())),
    )
    function = compile_library(Path(__file__).with_suffix(".cpp")).buffers_floor

    def step(mask: int = 0, _alive: Any = rows) -> None:
        function(*arguments, ctypes.c_uint64(mask))

    return step


def part(buffer: Tensor, is_written: bool, elements: int, piece: int, pieces: int) -> Stream:
    """The piece-th of equal parts of a buffer, each a whole number of cache lines but for the last."""

    def cut(at: int) -> int:
        return buffer.nbytes if at == pieces else buffer.nbytes * at // pieces // 64 * 64

    begin, end = cut(piece), cut(piece + 1)
    block = BLOCK_ELEMENTS * buffer.nbytes // elements // 64 * 64
    return Stream(buffer.data_ptr() + begin, end - begin, block, is_written)
