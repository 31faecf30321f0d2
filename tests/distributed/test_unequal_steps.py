"""Ranks that take unequal numbers of steps: every method ends, or names the rank that is elsewhere."""

import threading
import time

import pytest
import torch
from launch import run_ranks
from local_runs import backward, make_model, parameters, sgd
from lost_ranks import run_ranks_that_are_left

from hf_msn.distributed.async_gossip import AsyncGossip
from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.gossip import Gossip
from hf_msn.distributed.local_sgd import LocalSGD
from hf_msn.distributed.overlap_gossip import OverlapGossip
from hf_msn.distributed.slowmo import SlowMo
from hf_msn.distributed.topology import RingTopology


def over(base, **options):
    return lambda model, optimizer, **more: SlowMo(model, optimizer, base=base(model, optimizer), **options, **more)


LOCKSTEP = {
    "local sgd": (LocalSGD, {"sync_every": 4}),
    "slowmo": (SlowMo, {"sync_every": 4}),
    "slowmo, sharded": (SlowMo, {"sync_every": 4, "shard_state": True}),
    "slowmo over gossip": (over(Gossip, sync_every=4), {}),
    "slowmo over overlap gossip": (over(OverlapGossip, sync_every=4), {}),
    "averaged gradients": (LocalSGD, {"sync_start_step": 100}),
    "gossip": (Gossip, {}),
    "d-psgd": (Gossip, {"push_sum": False, "sync_every": 3}),
    "gossip, directed ring": (Gossip, {"topology": lambda n: RingTopology(n, directed=True)}),
}
FREE = {
    "overlap gossip": (OverlapGossip, {}),
    "overlap gossip, bound 0": (OverlapGossip, {"staleness_bound": 0}),
    "overlap gossip, deterministic": (OverlapGossip, {"deterministic": True}),
    "overlap gossip, ring": (OverlapGossip, {"topology": RingTopology, "staleness_bound": 0}),
    "ad-psgd": (AsyncGossip, {}),
    "subgradient push": (AsyncGossip, {"method": "push_sum"}),
}


def _train(rank, name, steps, timeout_seconds, pause=0.0):
    method, options = {**LOCKSTEP, **FREE}[name]
    options = dict(options)
    if "topology" in options:
        options["topology"] = options["topology"](len(steps))
    if timeout_seconds is not None:
        options["timeout_seconds"] = timeout_seconds
    model = make_model()
    optimizer = sgd(model)
    began, ranks = time.monotonic(), None
    try:
        with method(model, optimizer, **options) as sync:
            for step in range(steps[rank]):
                backward(model, optimizer, rank, step)
                optimizer.step()
                sync.step()
                time.sleep(pause)
    except PeerError as error:
        ranks = error.ranks
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_msn")]
    return time.monotonic() - began, ranks, parameters(model), threads


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, steps, timeout_seconds",
    [
        *((name, (14, 10, 14), None) for name in LOCKSTEP),
        *((name, (10, 14), 5.0) for name in ("local sgd", "slowmo over gossip", "gossip")),
    ],
)
def test_a_method_in_lockstep_names_the_rank_that_is_elsewhere_at_once(tmp_path, name, timeout_seconds, steps):
    results = run_ranks_that_are_left(_train, len(steps), tmp_path, name, steps, timeout_seconds, timeout=30.0)
    early = steps.index(10)
    for rank, (seconds, ranks, _, threads) in results.items():
        assert seconds < 4.0
        assert ranks
        assert rank not in ranks
        assert threads == []
        if len(steps) == 2:
            assert ranks == (1 - rank,)
    assert any(early in ranks for _, ranks, _, _ in results.values())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", FREE)
def test_a_method_in_the_background_goes_on_and_ends_with_the_mean(tmp_path, name):
    results = run_ranks_that_are_left(_train, 3, tmp_path, name, (14, 3, 40), 5.0, timeout=30.0)
    for seconds, ranks, values, threads in results.values():
        assert seconds < 4.0
        assert ranks is None
        assert torch.equal(values, results[0][2])
        assert bool(values.isfinite().all())
        assert threads == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["overlap gossip, bound 0", "ad-psgd"])
def test_a_rank_waits_in_its_last_sync_for_longer_than_a_peer_may_be_silent(tmp_path, name):
    results = run_ranks_that_are_left(_train, 2, tmp_path, name, (12, 2), 1.0, 0.2, timeout=30.0)
    for seconds, ranks, values, _ in results.values():
        assert 2.0 < seconds < 6.0
        assert ranks is None
        assert torch.equal(values, results[0][2])


def _train_again(rank):
    first = _train(rank, "gossip", (10, 14), 5.0)
    return first[1], _train(rank, "gossip", (6, 6), 5.0)


@pytest.mark.distributed
def test_gossip_starts_again_after_it_has_named_the_rank_that_was_elsewhere():
    results = run_ranks(_train_again, 2)
    assert [ranks for ranks, _ in results] == [(1,), (0,)]
    for _, (_, ranks, values, _) in results:
        assert ranks is None
        assert torch.equal(values, results[0][1][2])
