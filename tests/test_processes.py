"""The helper that the distributed tests stand on: results in order, no failure and no hang goes unnoticed."""

import os
import time

import pytest
import torch
from torch import distributed

from tests import processes

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")


def sum_of_ranks(offset: float, *, scale: float) -> tuple[int, torch.Tensor, int, str]:
    rank = distributed.get_rank()
    time.sleep(0.1 * (distributed.get_world_size() - rank))  # the first rank answers last
    total = torch.full((2,), scale * rank + offset)
    distributed.all_reduce(total)
    return rank, total, torch.get_num_threads(), os.environ["ADAMW_EXT_SOMETHING"]


def test_results_come_in_the_order_of_ranks_from_processes_that_form_a_group(monkeypatch):
    monkeypatch.setenv("ADAMW_EXT_SOMETHING", "passed on")
    results = processes.run(sum_of_ranks, 3, 0.5, scale=2.0)
    assert [rank for rank, *_ in results] == [0, 1, 2]
    for _, total, threads, variable in results:
        assert total.tolist() == [7.5, 7.5]
        assert threads == 1
        assert variable == "passed on"


def fail_on_rank_1() -> None:
    if distributed.get_rank() == 1:
        raise KeyError("no such thing")
    distributed.barrier()


def test_a_rank_that_raises_ends_all_at_once_with_its_rank_and_traceback():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 raised.*fail_on_rank_1.*no such thing"):
        processes.run(fail_on_rank_1, 2, seconds=50.0)
    assert time.monotonic() - start < 40.0


def end_on_rank_0() -> None:
    if distributed.get_rank() == 0:
        os._exit(3)
    distributed.barrier()


def test_a_rank_that_dies_is_noticed():
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 died: exit code 3|rank 1 of 2 raised"):
        processes.run(end_on_rank_0, 2)


def tell_pid_and_hang(path: str) -> None:
    if distributed.get_rank() == 1:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        while True:
            time.sleep(1.0)


def test_a_rank_that_hangs_is_ended_and_the_message_says_where_it_hung(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ranks \[1\] of 2 hang after 3.*tell_pid_and_hang"):
        processes.run(tell_pid_and_hang, 2, str(tmp_path / "pid"), seconds=3.0)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # until the server that forked it has collected it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it still lives")


def group_exists() -> bool:
    before = distributed.is_initialized()
    processes.start_group()
    distributed.barrier()
    return before


def test_the_group_can_be_left_to_the_work():
    assert processes.run(group_exists, 2, backend=None) == [False, False]
