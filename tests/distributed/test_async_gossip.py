"""Asynchronous gossip between real ranks: what is conserved, who waits for whom, and ranks that lag, die or stop."""

import random
import time

import pytest
import torch
import torch.distributed as dist
from async_runs import METHODS, Accounts, flat, jump_to, make_model, step_of, targets
from launch import run_ranks
from torch import nn

from hf_msn import AsyncGossip, ExponentialTopology, RingTopology
from hf_msn.distributed.mixing.step_rates import StepRates
from hf_msn.distributed.topology import (
    BipartiteExponentialTopology,
    CompleteTopology,
    RandomOnePeerTopology,
    TwoSidesTopology,
    check_topology,
    two_sides,
)


def _gossip_without_learning(rank, options):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = Accounts(model, optimizer, timeout_seconds=20.0, **options).start()
    for _ in range(options.get("sync_start_step", 0)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        step_of(optimizer, sync)
    jump_to(model, optimizer, targets(rank))
    before = sync.consensus_distance()
    pauses = random.Random(rank)
    for _ in range(40 + 7 * rank):
        sync.step()
        time.sleep(0.004 * pauses.random())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    after = sync.consensus_distance()
    sync.sync()
    at_sync = flat(model.parameters()), sync.consensus_distance(), sync.steps
    for _ in range(5):
        step_of(optimizer, sync, 0.002)
    sync.stop()
    return before, after, *at_sync, flat(model.parameters()), sync.account, sync.bytes_sent


@pytest.mark.distributed
@pytest.mark.parametrize(
    "num_ranks, options",
    [
        (2, {"method": "ad_psgd"}),
        (3, {"method": "ad_psgd", "rate_correction": False}),
        (4, {"method": "ad_psgd", "topology": BipartiteExponentialTopology(4), "seed": 3}),
        (4, {"method": "ad_psgd", "wire_dtype": "bfloat16"}),
        (2, {"method": "push_sum"}),
        (3, {"method": "push_sum", "topology": RingTopology(3)}),
        (4, {"method": "push_sum", "rate_correction": False}),
        (3, {"method": "push_sum", "wire_dtype": "bfloat16"}),
        (3, {"method": "ad_psgd", "sync_every": 3, "sync_start_step": 2}),
        (3, {"method": "push_sum", "sync_every": 2, "sync_start_step": 2}),
    ],
)
def test_the_mean_is_conserved_and_reached(num_ranks, options):
    results = run_ranks(_gossip_without_learning, num_ranks, options)
    mean = sum(flat(targets(rank)) for rank in range(num_ranks)) / num_ranks
    for rank, (before, after, at_sync, distance, steps, at_end, _, bytes_sent) in enumerate(results):
        assert before > 1.0
        assert after < before / (20 if options.get("wire_dtype") else 50)
        assert distance < 1e-12
        assert steps == 40 + 7 * rank + options.get("sync_start_step", 0)
        torch.testing.assert_close(at_sync, mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(at_end, mean, rtol=0, atol=1e-10)
        assert bytes_sent > 0
    accounts = [result[6] for result in results]
    assert sum(weight for weight, _, _ in accounts) == pytest.approx(num_ranks, abs=1e-12)
    for sender in range(num_ranks):  # nothing is under way at a meeting
        for receiver in range(num_ranks):
            assert accounts[sender][1][receiver] == pytest.approx(accounts[receiver][2][sender], abs=1e-12)
    assert (sum(accounts[0][1]) > 0) == (options["method"] == "push_sum")


def _watch_every_step(rank, method, seconds):
    model = nn.Linear(400, 100, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = AsyncGossip(model, optimizer, method=method, rate_correction=False).start()
    optimizer.param_groups[0]["lr"] = 1.0
    mixed, num_merged, ends = 0, 0, time.monotonic() + seconds
    while time.monotonic() < ends:
        model.weight.grad = torch.full_like(model.weight, 0.1 * (rank - 1))
        optimizer.step()
        mixed += not bool((model.weight == model.weight[0, 0]).all())
        before = model.weight[0, 0].item()
        sync.step()
        mixed += not bool((model.weight == model.weight[0, 0]).all())
        num_merged += model.weight[0, 0].item() != before
    sync.stop()
    return mixed, num_merged, model.weight[0, 0].item()


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_never_half_written(method):
    results = run_ranks(_watch_every_step, 3, method, 1.5)
    for mixed, num_merged, value in results:
        assert mixed == 0
        assert num_merged > 20
        assert value == results[0][2]


def _train_beside_a_straggler(rank, method):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = AsyncGossip(model, optimizer, method=method).start()
    dist.barrier()
    ends = []
    for _ in range(20 if rank == 1 else 40):
        step_of(optimizer, sync, 0.1 if rank == 1 else 0.005)
        ends.append(time.monotonic())
    waited = sync.seconds_waiting
    sync.stop()
    return sync.steps, ends, waited, sync.seconds_waiting - waited


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_nobody_waits_for_a_straggler_before_the_end(method):
    results = run_ranks(_train_beside_a_straggler, 3, method)
    assert [steps for steps, *_ in results] == [40, 20, 40]
    halfway = results[1][1][9]
    for place in (0, 2):
        _, ends, waited, waited_at_the_end = results[place]
        assert ends[-1] < halfway
        assert waited < 0.5
        assert waited_at_the_end > 0.5


def _train_quadratics(rank, method, rate_correction, seconds):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.04)
    sync = AsyncGossip(model, optimizer, method=method, rate_correction=rate_correction, timeout_seconds=20.0).start()
    dist.barrier()
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        optimizer.zero_grad()
        (0.5 * (model.weight - (3.0 if rank == 2 else 0.0)).square()).sum().backward()
        step_of(optimizer, sync, 0.03 if rank == 2 else 0.01)
    steps = sync.steps / (time.monotonic() - started)
    scale = sync.scale
    sync.sync()
    result = model.weight.item()
    sync.stop()
    return steps, result, scale


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_rate_correction_removes_the_pull_of_fast_ranks(method):
    # f_i = (z - c_i)^2 / 2 with c = 0, 0, 3: the optimum is 1; each rank pulls as often as it steps.
    results = run_ranks(_train_quadratics, 3, method, False, 2.0)
    rates = [rate for rate, _, _ in results]
    assert rates[0] > 2 * rates[2]
    biased = rates[2] * 3.0 / sum(rates)
    assert results[0][1] == pytest.approx(biased, abs=0.12)
    assert biased < 0.65
    results = run_ranks(_train_quadratics, 3, method, True, 3.0)
    rates = [rate for rate, _, _ in results]
    for rate, result, scale in results:
        assert result == pytest.approx(1.0, abs=0.15)
        assert scale == pytest.approx(sum(rates) / 3 / rate, rel=0.2)


def _train_unlike_quadratics(rank, method):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sync = AsyncGossip(model, optimizer, method=method).start()
    dist.barrier()
    started = time.monotonic()
    while time.monotonic() < started + 2.0:
        optimizer.zero_grad()
        (0.5 * (rank + 1) * (model.weight - rank).square()).sum().backward()
        step_of(optimizer, sync, 0.004)
    distance = sync.consensus_distance()
    sync.stop()
    return model.weight.item(), distance


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_quadratics_with_different_curvature_come_to_the_common_optimum(method):
    optimum = sum((r + 1) * r for r in range(4)) / sum(r + 1 for r in range(4))
    for value, distance in run_ranks(_train_unlike_quadratics, 4, method):
        assert value == pytest.approx(optimum, abs=0.2)
        assert distance < 0.5


def test_one_rank_is_left_as_it_is_with_a_warning():
    model, other = make_model(), make_model()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    sync = AsyncGossip(model, optimizer, method="push_sum")
    with pytest.warns(UserWarning, match="one rank only"):
        sync.start()
    for m, o in ((model, optimizer), (other, plain)):
        m(torch.ones(4, 3).double()).sum().backward()
        o.step()
    sync.step()
    assert sync.consensus_distance() == 0.0
    sync.stop()
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    assert sync.steps == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "sgp"}, "`method`.*'ad_psgd' or 'push_sum'.*'sgp'"),
        ({"seed": -1}, "`seed`.*>= 0.*-1"),
        ({"sync_every": 0}, "`sync_every`.*>= 1.*0"),
        ({"timeout_seconds": None}, "`timeout_seconds`.*> 0.*None"),
        ({"timeout_seconds": 0.0}, "`timeout_seconds`.*> 0.*0.0"),
        ({"wire_dtype": "float16"}, "`wire_dtype`.*'float16'"),
        ({"base_buffers": "average"}, "`base_buffers`.*'maintain'.*'average'"),
        ({"inner_group": object()}, "`inner_group`.*equal to the bit"),
        ({"topology": RingTopology(4)}, "for the 1 ranks of the group.*RingTopology"),
        ({"topology": 4}, "for the 1 ranks of the group.*4"),
    ],
)
def test_settings_outside_their_rules_are_refused_with_value_and_rule(options, words):
    model = make_model()
    with pytest.raises(ValueError, match=words):
        AsyncGossip(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    "topology, words",
    [
        (ExponentialTopology(4), "must be symmetric"),
        (RingTopology(4, directed=True), "must be symmetric"),
        (RingTopology(5), "must be bipartite.*ranks 2 and 3"),
        (CompleteTopology(3), "must be bipartite.*ranks 1 and 2"),
        (RandomOnePeerTopology(4, directed=False), "must be bipartite"),
    ],
)
def test_a_topology_without_two_sides_that_exchange_is_refused_for_pairs(topology, words):
    with pytest.raises(ValueError, match=words):
        check_topology(topology, topology.world_size, must_pair=True)
    check_topology(topology, topology.world_size, must_pair=False)


def test_links_of_two_sides_join_ranks_of_different_sides():
    for n in range(1, 10):
        for topology in (TwoSidesTopology(n), BipartiteExponentialTopology(n)):
            sides, bad = two_sides(topology)
            assert bad is None
            assert sides == {rank: rank % 2 for rank in range(n)}
            check_topology(topology, n, must_pair=isinstance(topology, BipartiteExponentialTopology))
    sides, bad = two_sides(TwoSidesTopology(5).without([1]))
    assert (sides, bad) == ({0: 0, 2: 1, 3: 0, 4: 1}, None)
    assert two_sides(RingTopology(6))[0] == {rank: rank % 2 for rank in range(6)}


def test_rates_are_those_of_the_window_and_do_not_count_pauses():
    rates = StepRates(2, window_seconds=10.0)
    assert rates.scale(0, [0, 1]) == 1.0
    for step in range(200):
        rates.note(0, step, step * 0.1)
        rates.note(1, step, 1000.0 + (step if step < 100 else 50.0 + step / 2))
    assert rates.scale(0, [0, 1]) == pytest.approx((10 + 2) / 2 / 10)
    assert rates.scale(1, [0, 1]) == pytest.approx((10 + 2) / 2 / 2)
    assert rates.scale(1, [1]) == pytest.approx(1.0)
    rates.pause()
    for step in range(199, 210):
        rates.note(0, step, 5000.0 + step * 0.1)
    assert rates.scale(0, [0, 1]) == pytest.approx((10 + 2) / 2 / 10)
    for step in range(210, 300):
        rates.note(0, step, 5021.0 + step * 0.001)
        rates.note(1, step, step)
    assert rates.scale(1, [0, 1]) == 10.0  # no more
