"""Subgroups are made once, and end with their users."""

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks

from hf_msn.distributed.comm.peer_exchange import PeerExchange
from hf_msn.distributed.subgroups import subgroup


def gloo_threads() -> int:
    names = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


def _is_made_once(rank):
    group = subgroup((0, 1))
    again, other = subgroup((0, 1)), subgroup((0, 1), name="other")
    summed = torch.ones(2)
    dist.all_reduce(summed, group=other)
    return again is group, other is group, summed.tolist()


@pytest.mark.distributed
def test_a_group_is_made_once_for_each_name():
    assert run_ranks(_is_made_once, 2) == [(True, False, [2.0, 2.0])] * 2


def _leave(rank):
    """Count the threads of groups before and after the groups are destroyed, as at the end of a script."""
    exchange = PeerExchange(timeout_seconds=20.0)
    exchange.connect()
    received = torch.zeros(3)
    exchange.send_and_receive({1 - rank: [torch.full((3,), float(rank))]}, {1 - rank: [received]})
    during = gloo_threads()
    del exchange
    dist.destroy_process_group()
    gc.collect()
    after = gloo_threads()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the launcher
    return received.tolist(), during, after


@pytest.mark.distributed
def test_no_thread_outlives_its_group():
    # A thread that does can abort the process while the interpreter ends.
    for rank, (received, during, after) in enumerate(run_ranks(_leave, 2)):
        assert received == [1.0 - rank] * 3
        assert during > 0
        assert after == 0
