"""The launcher that all tests of several ranks stand on."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks

pytestmark = pytest.mark.distributed


def _sum_of_ranks(rank, offset):
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return total, os.environ["RANK"], os.getpid()


def _fail_on_rank_1(rank):
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()


def _hang_on_rank_0(rank):
    if rank == 0:
        time.sleep(1000)


def test_ranks_communicate_and_return_their_results_in_order():
    results = run_ranks(_sum_of_ranks, 3, 10)
    assert [total.item() for total, _, _ in results] == [33.0, 33.0, 33.0]
    assert [rank for _, rank, _ in results] == ["0", "1", "2"]
    assert len({pid for _, _, pid in results} | {os.getpid()}) == 4


def test_the_failing_rank_is_named_with_its_traceback():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed in `_fail_on_rank_1`.*KeyError: 'the cause'"):
        run_ranks(_fail_on_rank_1, 2)


@pytest.mark.slow
def test_ranks_that_hang_are_killed_at_the_deadline_and_shown():
    with pytest.raises(AssertionError, match=r"(?s)did not end within 2.0 s.*in _hang_on_rank_0"):
        run_ranks(_hang_on_rank_0, 2, timeout=2.0)
