"""Asynchronous gossip between real ranks: what is conserved, and who waits for whom."""

import random
import time

import pytest
import torch
import torch.distributed as dist
from async_runs import METHODS, Accounts, flat, jump_to, make_model, step_of, targets
from launch import run_ranks
from torch import nn

from hf_msn import AsyncGossip, RingTopology
from hf_msn.distributed.async_gossip import StepRates
from hf_msn.distributed.topology import BipartiteExponentialTopology

OPTIONS = {
    3: [
        {"method": "ad_psgd", "rate_correction": False},
        {"method": "push_sum"},
        {"method": "ad_psgd", "sync_every": 3, "sync_start_step": 2},
        {"method": "push_sum", "topology": RingTopology(3)},
        {"method": "push_sum", "wire_dtype": "bfloat16"},
        {"method": "push_sum", "sync_every": 2, "sync_start_step": 2},
    ],
    4: [
        {"method": "ad_psgd"},
        {"method": "ad_psgd", "topology": BipartiteExponentialTopology(4), "seed": 3},
        {"method": "ad_psgd", "wire_dtype": "bfloat16"},
        {"method": "push_sum", "rate_correction": False},
    ],
}


def _gossip_without_learning(rank, num_ranks):
    return [_gossip_with(rank, options) for options in OPTIONS[num_ranks]]


def _gossip_with(rank, options):
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
    for _ in range(80 + 7 * rank):
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
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", OPTIONS)
def test_the_mean_is_conserved_and_reached(num_ranks):
    mean = sum(flat(targets(rank)) for rank in range(num_ranks)) / num_ranks
    for options, *results in zip(OPTIONS[num_ranks], *run_ranks(_gossip_without_learning, num_ranks, num_ranks)):
        for rank, (before, after, at_sync, distance, steps, at_end, _, bytes_sent) in enumerate(results):
            assert before > 1.0
            assert after < before / (20 if options.get("wire_dtype") else 50), options
            assert distance < 1e-12
            assert steps == 80 + 7 * rank + options.get("sync_start_step", 0)
            torch.testing.assert_close(at_sync, mean, rtol=0, atol=1e-10)
            torch.testing.assert_close(at_end, mean, rtol=0, atol=1e-10)
            assert bytes_sent > 0
        accounts = [result[6] for result in results]
        assert sum(weight for weight, _, _ in accounts) == pytest.approx(num_ranks, abs=1e-12)
        for sender in range(num_ranks):  # no mass is in flight at a sync
            for receiver in range(num_ranks):
                assert accounts[sender][1][receiver] == pytest.approx(accounts[receiver][2][sender], abs=1e-12)
        assert (sum(accounts[0][1]) > 0) == (options["method"] == "push_sum")


def _step_often(rank):
    """Per method: half-written models, merges, and the end; then the steps beside a straggler."""
    results = []
    for method in METHODS:
        model = nn.Linear(400, 100, bias=False).double()
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sync = AsyncGossip(model, optimizer, method=method, rate_correction=False).start()
        optimizer.param_groups[0]["lr"] = 1.0
        store, keys = dist.distributed_c10d._get_default_store(), [f"{method} {other}" for other in range(3)]
        mixed, num_merged, ends = 0, 0, time.monotonic() + 20.0
        while not store.check(keys) and time.monotonic() < ends:  # until all have merged often
            model.weight.grad = torch.full_like(model.weight, 0.1 * (rank - 1))
            optimizer.step()
            mixed += not bool((model.weight == model.weight[0, 0]).all())
            before = model.weight[0, 0].item()
            sync.step()
            mixed += not bool((model.weight == model.weight[0, 0]).all())
            num_merged += model.weight[0, 0].item() != before
            if num_merged == 20:
                store.set(keys[rank], "")
        sync.stop()
        results.append((mixed, num_merged, model.weight[0, 0].item(), _train_beside_a_straggler(rank, method)))
    return results


def _train_beside_a_straggler(rank, method):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = AsyncGossip(model, optimizer, method=method).start()
    dist.barrier()
    ends = []
    for _ in range(14 if rank == 1 else 40):
        step_of(optimizer, sync, 0.1 if rank == 1 else 0.005)
        ends.append(time.monotonic())
    waited = sync.seconds_waiting
    sync.stop()
    return sync.steps, ends, waited, sync.seconds_waiting - waited


@pytest.mark.distributed
@pytest.mark.slow
def test_a_model_is_never_half_written_and_nobody_waits_for_a_straggler_before_the_end():
    for results in zip(*run_ranks(_step_often, 3)):
        for mixed, num_merged, value, _ in results:
            assert mixed == 0
            assert num_merged >= 20
            assert value == results[0][2]
        stragglers = [straggler for *_, straggler in results]
        assert [steps for steps, *_ in stragglers] == [40, 14, 40]
        halfway = stragglers[1][1][6]
        for place in (0, 2):
            _, ends, waited, waited_at_the_end = stragglers[place]
            assert ends[-1] < halfway
            assert waited < 0.5
            assert waited_at_the_end > 0.3


def _train_quadratics(rank):
    results = []
    for method, rate_correction in (("ad_psgd", False), ("ad_psgd", True), ("push_sum", True)):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options = {"method": method, "rate_correction": rate_correction, "timeout_seconds": 20.0}
        with AsyncGossip(model, optimizer, **options) as sync:
            dist.barrier()
            began = time.monotonic()
            while time.monotonic() < began + 1.6:
                optimizer.zero_grad()
                (0.5 * (model.weight - (3.0 if rank == 2 else 0.0)).square()).sum().backward()
                step_of(optimizer, sync, 0.02 if rank == 2 else 0.006)
            rate, scale = sync.steps / (time.monotonic() - began), sync.scale
        results.append((rate, model.weight.item(), scale))
    return results


@pytest.mark.distributed
@pytest.mark.slow
def test_rate_correction_removes_the_pull_of_fast_ranks():
    # f_i = (z - c_i)^2 / 2 with c = 0, 0, 3: the optimum is 1; each rank pulls as often as it steps.
    biased, *corrected = zip(*run_ranks(_train_quadratics, 3))
    rates = [rate for rate, _, _ in biased]
    expected = rates[2] * 3.0 / sum(rates)
    assert expected < 0.65
    assert biased[0][1] == pytest.approx(expected, abs=0.12)
    for results in corrected:
        mean_rate = sum(rate for rate, _, _ in results) / 3
        for rate, result, scale in results:
            assert result == pytest.approx(1.0, abs=0.15)
            assert scale == pytest.approx(mean_rate / rate, rel=0.2)


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
