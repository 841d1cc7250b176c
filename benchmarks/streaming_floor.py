"""Compiles streaming_floor.cpp for this machine and calls it: the least time that a step's memory traffic takes."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.host_library import compile_library

SEGMENT_BYTES = 64 * 1024  # per stream; the time is the same from 16 KiB to 4 MiB


class Segment(ctypes.Structure):
    _fields_ = [(stream, ctypes.c_void_p) for stream in "pgmv"] + [("bytes", ctypes.c_int64)]


def streaming_floor(params: list[Tensor]) -> Callable[[], None]:
    """A function that moves the bytes of one step: of the params, their gradients, and two moments of its own."""
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]  # kept alive by the closure
    segments: list[Segment] = []
    for param, (m, v) in zip(params, moments, strict=True):
        assert param.grad is not None
        addresses = [tensor.data_ptr() for tensor in (param, param.grad, m, v)]
        for begin in range(0, param.nbytes, SEGMENT_BYTES):
            size = min(SEGMENT_BYTES, param.nbytes - begin)
            segments.append(Segment(*(address + begin for address in addresses), size))
    table = (Segment * len(segments))(*segments)
    segments_per_turn = max(1, SEGMENT_BYTES * len(segments) // sum(param.nbytes for param in params))
    turns = -(-len(segments) // segments_per_turn)
    arguments = (
        table,
        ctypes.c_int64(len(segments)),
        ctypes.c_int64(segments_per_turn),
        ctypes.c_int(min(turns, torch.get_num_threads())),
        ctypes.c_uint64(0),
    )
    function = compile_library(Path(__file__).with_suffix(".cpp")).streaming_floor

    def step(_alive: Any = moments) -> None:
        function(*arguments)

    return step
