"""OverlapGossip resumes where it stopped, under SlowMo too."""

import copy

import pytest
import torch
import torch.distributed as dist
from gossip_reference import flat, make_model
from launch import run_ranks
from overlap_runs import MOMENTUM, NUM_STEPS, RATE, reference, take_step, weight_under_way
from states import resumed_in_two_ways, same, saved_and_loaded
from topologies import Star

from hf_msn.distributed.overlap_gossip import OverlapGossip
from hf_msn.distributed.slowmo import SlowMo
from hf_msn.distributed.topology import ExponentialTopology


def make_run(rank, kind, seed=0):
    model = make_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    n = dist.get_world_size()
    gossip = OverlapGossip(
        model, optimizer, topology=Star(n) if kind == "star" else None, deterministic=True, timeout_seconds=20
    )
    if kind == "alone":
        return model, optimizer, gossip
    average = kind != "noaverage"
    return model, optimizer, SlowMo(model, optimizer, base=gossip, sync_every=3, slow_momentum=0.6, average=average)


def _resume(rank, kind):
    def run(model, optimizer, sync, steps):
        for step in steps:
            take_step(model, optimizer, rank, step)
            sync.step()

    ends, saved = resumed_in_two_ways(lambda seed: make_run(rank, kind, seed), run, NUM_STEPS)
    gossip = saved["sync"] if kind == "alone" else saved["sync"]["base"]
    return ends, len(gossip["unmerged"])


def _resume_all(rank):
    return [_resume(rank, kind) for kind in ("alone", "slowmo", "star", "noaverage")]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_deterministic_run_resumes_bit_for_bit_with_mass_in_flight():
    num_ranks = 4
    results = run_ranks(_resume_all, num_ranks)
    outcomes = [outcome for result in results for outcome in result]
    assert all(same(straight, end) for (straight, *ends), _ in outcomes for end in ends)
    assert sum(unmerged for _, unmerged in outcomes) >= num_ranks


def _save_without_determinism(rank):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    sync = OverlapGossip(model, optimizer).start()
    for step in range(3):
        take_step(model, optimizer, rank, step)
        sync.step()
    with pytest.raises(RuntimeError, match="sync"):
        sync.state_dict()
    sync.sync()
    saved, at_sync = saved_and_loaded(sync.state_dict()), copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    sync.stop()
    other = make_model(seed=5 + rank)
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE, momentum=MOMENTUM)
    sync = OverlapGossip(other, optimizer)
    other.load_state_dict(at_sync)
    optimizer.load_state_dict(moments)
    sync.load_state_dict(saved)
    with sync:
        assert same(other.state_dict(), at_sync)
        assert same(saved_and_loaded(sync.state_dict()), saved)
        take_step(other, optimizer, rank, 3)
        sync.step()
        assert sync.rounds == 4
    return True


@pytest.mark.distributed
def test_without_determinism_a_state_is_that_of_a_sync():
    assert all(run_ranks(_save_without_determinism, 2))


def _slow_momentum_over_overlap(rank):
    model, optimizer, sync = make_run(rank, "slowmo")
    seen = []
    with sync:
        for step in range(6):
            take_step(model, optimizer, rank, step)
            sync.step()
            seen.append(flat(model))
    return seen, weight_under_way(sync.base), sync.bytes_sent > sync.base.bytes_sent > 0


@pytest.mark.distributed
def test_an_outer_step_of_slowmo_starts_from_the_exact_mean_of_overlap_gossip():
    results = run_ranks(_slow_momentum_over_overlap, 3)
    topology = ExponentialTopology(3)
    end_of_period = [seen[2] for seen, _ in reference(topology, 1, sync_after=2)]
    x0 = flat(make_model())
    expected = x0 - (x0 - end_of_period[0])  # v = 0 before: the mean itself
    for seen, under_way, counts_bytes in results:
        torch.testing.assert_close(seen[2], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(seen[2], results[0][0][2])
        assert torch.equal(seen[5], results[0][0][5])
        assert not torch.equal(seen[4], results[0][0][4]) or seen is results[0][0]
        assert under_way == pytest.approx(0.0, abs=1e-12)
        assert counts_bytes
