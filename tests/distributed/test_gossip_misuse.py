"""Settings and topologies that gossip refuses, and the error when a peer is lost."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from gossip_reference import make_model, make_optimizer, take_step
from launch import run_ranks
from lost_ranks import run_ranks_that_are_left
from topologies import Star

from hf_msn.distributed.comm.exchange import PeerError
from hf_msn.distributed.gossip import Gossip
from hf_msn.distributed.topology import ExponentialTopology, RandomOnePeerTopology, RingTopology, Topology


class Unsure(Topology):
    """No period; regular at the first steps only."""

    def _out_peers(self, rank, step):
        return [1 - rank] if step < 3 or rank == 0 else []


def test_quasi_global_momentum_needs_plain_sgd():
    model = make_model()
    for optimizer, words in (
        (make_optimizer(model, 0.9), "momentum=0.9"),
        (torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), "maximize=True"),
        (torch.optim.Adam(model.parameters()), "Adam"),
    ):
        with pytest.raises(ValueError, match=words):
            Gossip(model, optimizer, quasi_global_momentum=0.9)


def _refusals_on_ranks(rank):
    def error_of(function):
        try:
            function()
        except ValueError as error:
            return str(error)
        return None

    def make(**options):
        model = make_model()
        return Gossip(model, make_optimizer(model, 0.0), **options)

    late = make(push_sum=False, topology=Unsure(2)).start()
    return [
        error_of(lambda: make(push_sum=False, topology=Star(2))),
        error_of(lambda: make(topology=RandomOnePeerTopology(2, seed=rank)).start()),
        error_of(lambda: make(topology=Star(2) if rank else ExponentialTopology(2)).start()),
        error_of(lambda: make(topology=ExponentialTopology(2, lambda step: 1)).start()),
        [error_of(late.step) for _ in range(4)],
    ]


@pytest.mark.distributed
def test_topologies_that_do_not_fit_the_method_or_differ_between_ranks_are_refused():
    for irregular, seeds, kinds, function, late in run_ranks(_refusals_on_ranks, 2):
        assert "Star(world_size=2) sum to [1.5, 0.5] at step 0" in irregular
        assert "seed=0" in seeds
        assert "seed=1" in seeds
        assert "ExponentialTopology(world_size=2, peers_per_step=1)" in kinds
        assert function is None
        assert late[:3] == [None] * 3
        assert "at step 3" in late[3]


def _train_beside_a_lost_peer(rank, how, timeout_seconds):
    model = make_model()
    optimizer = make_optimizer(model, 0.0)
    topology = RingTopology(dist.get_world_size(), directed=True)
    began = time.monotonic()
    gossip = Gossip(model, optimizer, topology=topology, timeout_seconds=timeout_seconds)
    with pytest.raises(PeerError) as caught, gossip as sync:
        for step in range(60):
            if step == 5:
                began = time.monotonic()
                if rank == 2:
                    time.sleep(60.0 if how == "hangs" else 0.0)
                    os._exit(0)
            take_step(model, optimizer, (0.1, 0.1), rank, step)
            sync.step()
    return caught.value.ranks, time.monotonic() - began


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_peer_is_named_within_the_deadline_also_by_ranks_that_do_not_hear_from_it(tmp_path, how):
    for rank, (ranks, seconds) in run_ranks_that_are_left(
        _train_beside_a_lost_peer, 4, tmp_path, how, 2.0, lost=[2]
    ).items():
        assert 2 in ranks
        assert rank not in ranks
        assert seconds < 2.0 + 3.5  # the store is asked for 2 s at most
        if how == "hangs":
            assert ranks[0] == 2  # before the ranks whose connection broke because they gave up on rank 2
