"""OverlapGossip against its recursion with delays in loops, its mass under random delays, and its resume."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from gossip_reference import flat, make_model
from launch import run_ranks
from local_runs import groups_of
from overlap_runs import MOMENTUM, NUM_STEPS, RATE, reference, take_step, weight_under_way
from states import resumed_in_two_ways, same, saved_and_loaded
from topologies import Star

from hf_msn.distributed.overlap_gossip import OverlapGossip
from hf_msn.distributed.slowmo import SlowMo
from hf_msn.distributed.topology import CompleteTopology, ExponentialTopology, RingTopology

TOPOLOGIES = {
    "exponential": ExponentialTopology,
    "ring": RingTopology,
    "directed ring": lambda n: RingTopology(n, directed=True),
    "complete": CompleteTopology,
    "star": Star,
}


def total(number):
    tensor = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item()


def train(rank, topology, bound, sync_after=4, deterministic=True):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    seen, weights = [], []
    sync = OverlapGossip(
        model, optimizer, topology=topology, staleness_bound=bound, deterministic=deterministic, timeout_seconds=20
    )
    with sync:
        for step in range(NUM_STEPS):
            take_step(model, optimizer, rank, step)
            sync.step()
            if step == sync_after:
                sync.sync()
            seen.append(flat(model))
            weights.append(sync.push_sum_weight)
    return [*seen, flat(model)], weights


def _train_all(rank):
    n = dist.get_world_size()
    results = {(name, bound): train(rank, make(n), bound) for name, make in TOPOLOGIES.items() for bound in (0, 1, 2)}
    return results, train(rank, Star(n), 0, deterministic=False)


@pytest.mark.distributed
@pytest.mark.slow
def test_mass_is_merged_as_many_steps_after_it_was_sent_as_the_bound():
    num_ranks = 4
    results, bound_zero = zip(*run_ranks(_train_all, num_ranks))
    some_weight = set()
    for name, make in TOPOLOGIES.items():
        for bound in (0, 1, 2):
            for rank, (seen, weights) in enumerate(reference(make(num_ranks), bound)):
                got, got_weights = results[rank][name, bound]
                where = f"{name}, bound {bound}, rank {rank}"
                torch.testing.assert_close(got, seen, rtol=1e-10, atol=1e-12, msg=lambda m, w=where: f"{w}: {m}")
                assert got_weights == pytest.approx(weights, abs=1e-14), where
                assert torch.equal(got[-1], results[0][name, bound][0][-1])
                some_weight.update(weights)
    assert len(some_weight) > 3
    for (seen, weights), rank in zip(bound_zero, results):  # synchronous push-sum, without `deterministic` too
        assert all(torch.equal(a, b) for a, b in zip(seen, rank["star", 0][0]))
        assert weights == rank["star", 0][1]


def _mix(rank):
    free = [("exponential", None), ("star", None), ("exponential", "bfloat16")]
    timed = [("exponential", "bfloat16", True), ("exponential", "float32", True)]
    return [_mix_only(rank, *case) for case in free + timed]


def _mix_only(rank, name, wire_dtype, deterministic=False):
    n = dist.get_world_size()
    model = torch.nn.Linear(30, 2, bias=False).to(torch.float64 if wire_dtype is None else torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"staleness_bound": 2, "wire_dtype": wire_dtype, "deterministic": deterministic}
    sync = OverlapGossip(model, optimizer, topology=TOPOLOGIES[name](n), **options)
    generator = torch.Generator().manual_seed(rank)
    sync.start()
    with torch.no_grad():  # each rank a value of its own, as if its first step had gone there
        model.weight.copy_(torch.randn(model.weight.shape, generator=generator, dtype=torch.float64))
    start = model.weight.detach().double().clone()
    dist.all_reduce(start)
    mean, masses, biased = start / n, [], []
    for step in range(60):
        time.sleep(0.004 * torch.rand(1, generator=generator).item() * (step % 3 == rank % 3))
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        sync.step()
        if step % 10 == 5:
            dist.barrier()  # nobody merges between the two numbers of another
            masses.append(total(sync.push_sum_weight + weight_under_way(sync)))
            dist.barrier()
        if step > 50:
            biased.append((model.weight.double() * sync.push_sum_weight - mean).abs().max().item())
    apart = (model.weight - mean).abs().max().item()
    sync.sync()
    after = (model.weight - mean).abs().max().item()
    under_way, weight = total(weight_under_way(sync)), sync.push_sum_weight
    sync.stop()
    return masses, apart, after, under_way, weight, max(biased), sync.bytes_sent


@pytest.mark.distributed
@pytest.mark.slow
def test_delays_and_a_narrow_wire_lose_no_mass():
    exponential, star, half, repeatable, whole = zip(*run_ranks(_mix, 3))
    for results, limit in ((exponential, 1e-10), (star, 1e-2)):
        for masses, apart, after, under_way, weight, _, _ in results:
            assert masses == pytest.approx([3.0] * len(masses), abs=1e-12)
            assert apart < limit
            assert after < 1e-12
            assert (under_way, weight) == (pytest.approx(0.0, abs=1e-12), 1.0)
        assert max(biased for *_, biased, _ in results) > 1e-3  # x itself, without the weights
    for masses, apart, after, *_ in (*half, *repeatable):
        assert masses == pytest.approx([3.0] * len(masses), abs=1e-12)
        assert apart > 1e-6
        assert after < 2e-6
    # How far apart rounding leaves the ranks depends on the delays, unless each message is merged at its step.
    assert max(apart for _, apart, *_ in repeatable) < 1e-2
    payload = 60 * 60 * 2  # steps, numbers, bytes saved per number
    for [*_, more], [*_, fewer] in zip(whole, repeatable):
        assert more - fewer == pytest.approx(payload, rel=0.3)  # no sums are added up, to travel once


def _wait_for_a_slow_rank(rank, bounds):
    results = []
    for bound in bounds:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sync = OverlapGossip(model, optimizer, topology=RingTopology(2), staleness_bound=bound, timeout_seconds=20)
        times = []
        with sync:
            dist.barrier()
            began = time.monotonic()
            for step in range(6):
                if rank == 1 and step == 2:
                    time.sleep(1.0)
                take_step(model, optimizer, rank, step)
                sync.step()
                times.append(time.monotonic() - began)
            results.append((times, sync.seconds_waiting))
    return results


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_waits_for_a_slow_one_when_it_is_the_bound_ahead_and_not_before():
    bounds = (0, 2)
    results = run_ranks(_wait_for_a_slow_rank, 2, bounds)
    for bound, (times, waited), (_, waited_by_slow) in zip(bounds, *results):
        # The slow rank's step 2 is late; it may be missing until step 2 + bound is to end.
        assert [seconds > 0.9 for seconds in times] == [step >= 2 + bound for step in range(6)]
        assert waited > 0.3
        assert waited_by_slow < 0.5


def _inner_groups(rank):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    with OverlapGossip(model, optimizer, **groups_of(rank), deterministic=True, timeout_seconds=20) as sync:
        seen = []
        for step in range(5):
            take_step(model, optimizer, rank, step)
            sync.step()
            seen.append(flat(model))
    return [*seen, flat(model)]


@pytest.mark.distributed
def test_ranks_of_an_inner_group_stay_equal_to_the_bit():
    a, b, c, d = run_ranks(_inner_groups, 4)
    for step in range(6):
        assert torch.equal(a[step], b[step])
        assert torch.equal(c[step], d[step])
        assert torch.equal(a[step], c[step]) == (step == 5)


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
    def step_of(model, optimizer, step):
        take_step(model, optimizer, rank, step)

    ends, saved = resumed_in_two_ways(lambda seed: make_run(rank, kind, seed), step_of, NUM_STEPS)
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
