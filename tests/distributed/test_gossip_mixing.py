"""Mixing without learning: mass, rounds, bytes and consensus."""

import math

import pytest
import torch
from gossip_reference import Lopsided, distance
from launch import run_ranks
from topologies import Star
from torch import nn

from hf_msn.distributed.comm.exchange import Exchange
from hf_msn.distributed.gossip import Gossip, sampled_distance
from hf_msn.distributed.topology import CompleteTopology, ExponentialTopology, RingTopology


def start_unequal(rank, n, *, size=5, dtype=torch.float64, seed=0, **options):
    """A started Gossip whose ranks hold different numbers; model, sync, and the numbers of all ranks."""
    model = nn.Module()
    model.x = nn.Parameter(torch.zeros(size, dtype=dtype))
    sync = Gossip(model, torch.optim.SGD(model.parameters(), lr=0.0), **options).start()
    values = torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        model.x.copy_(values[rank])
    return model, sync, values


def numerator(model, sync):
    numerators = sync.state_dict()["numerators"]
    return model.x.detach().clone() if numerators is None else numerators[0]


def _mix_alone(rank, n):
    results = {}
    for name, make in (("star", Star), ("lopsided", Lopsided), ("exponential", ExponentialTopology)):
        model, sync, values = start_unequal(rank, n, topology=make(n))
        x, w, z = [], [], []
        for step in range(40):
            if step % 5 != rank:  # a gradient scaler skips the step on some ranks
                sync.optimizer.step()
            sync.step()
            x.append(numerator(model, sync))
            w.append(sync.push_sum_weight)
            z.append(model.x.detach().clone())
        has_numerators = sync.state_dict()["numerators"] is not None
        sync.sync()
        results[name] = (
            torch.stack(x),
            torch.tensor(w, dtype=torch.float64),
            torch.stack(z),
            has_numerators,
            model.x.detach().clone(),
        )
    return results, values


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("n", [5])
def test_mass_is_conserved_and_the_quotient_is_the_mean_under_every_topology(n):
    results, values = zip(*run_ranks(_mix_alone, n, n))
    mean = values[0].mean(0)
    for name in ("star", "lopsided", "exponential"):
        x, w, z = (torch.stack([r[name][i] for r in results]) for i in range(3))
        torch.testing.assert_close(x.sum(0), values[0].sum(0).expand(40, -1), rtol=0, atol=1e-12)
        torch.testing.assert_close(w.sum(0), torch.full((40,), float(n), dtype=w.dtype), rtol=0, atol=1e-12)
        torch.testing.assert_close(z, x / w[..., None], rtol=1e-14, atol=0)
        torch.testing.assert_close(z[:, -1], mean.expand(n, -1), rtol=0, atol=1e-5)
        irregular = name != "exponential"
        assert [r[name][3] for r in results] == [irregular] * n
        assert bool((w == 1.0).all()) != irregular
        assert (x[:, -1] - mean).abs().max() > 0.1 or not irregular  # without the weights it is not the mean
        for rank in range(n):
            assert torch.equal(results[rank][name][4], results[0][name][4])
            torch.testing.assert_close(results[rank][name][4], mean, rtol=0, atol=1e-14)


def _wire(rank, n):
    results = []
    for options in ({}, {"wire_dtype": "bfloat16"}, {"wire_dtype": "bfloat16", "topology": Star(n)}):
        model, sync, values = start_unequal(rank, n, size=1000, dtype=torch.float32, **options)
        before = sync.bytes_sent
        z = []
        for _ in range(12):
            sync.step()
            z.append(numerator(model, sync).double())
        results.append((torch.stack(z), sync.bytes_sent - before))
    half = start_unequal(rank, n, size=100, dtype=torch.bfloat16, topology=CompleteTopology(n))
    half[1].step()
    return values.double(), results, half[0].x.detach(), half[2]


@pytest.mark.distributed
def test_a_bfloat16_wire_halves_the_bytes_and_keeps_the_mean():
    outcomes = run_ranks(_wire, 3, 3)
    mean = outcomes[0][0].mean(0)
    for case in range(3):
        x = torch.stack([outcome[1][case][0] for outcome in outcomes])
        # Only the sums' own rounding in float32 is left, far below the 2**-8 of the wire.
        torch.testing.assert_close(x.mean(0), mean.expand(12, -1), rtol=0, atol=2e-6)
    apart = [distance([o[1][case][0][-1] for o in outcomes]) / math.sqrt(1000) for case in range(2)]
    assert apart[0] < 1e-3
    assert apart[1] < 5e-3
    assert [outcome[1][0][1] for outcome in outcomes] == [12 * 4000] * 3
    assert [outcome[1][1][1] for outcome in outcomes] == [12 * 2000] * 3
    # Six times to one, six times from one to two; with w.
    assert [outcome[1][2][1] for outcome in outcomes] == [6 * 2 * 2008, 6 * 2008, 6 * 2008]
    # Parameters in bfloat16: the messages' rounding cancels in the mean, only that of the result is left.
    half, values = torch.stack([outcome[2] for outcome in outcomes]).double(), outcomes[0][3].double()
    assert ((half.mean(0) - values.mean(0)).abs() <= 2**-8 * half.abs().amax(0) + 1e-6).all()


def _extra_rounds(rank, n):
    model, sync, values = start_unequal(rank, n, topology=RingTopology(n), consensus_target=0.05, max_extra_rounds=50)
    sync.step()
    small = sync.sampled_distance, sync.consensus_distance(), sync.extra_rounds, sync.rounds
    size = 50_001
    model, sync, values = start_unequal(rank, n, size=size, dtype=torch.float32, consensus_target=1e3)
    estimates = []
    for _ in range(3):
        before = sync.bytes_sent
        sync.step()
        cost = sync.bytes_sent - before - size * 4
        estimates.append(sync.sampled_distance / sync.consensus_distance())
        with torch.no_grad():
            model.x.copy_(values[rank])
    options = {"consensus_target": 1e-9, "max_extra_rounds": 2, "consensus_until_step": 3}
    model, sync, _ = start_unequal(rank, n, topology=RingTopology(n), **options)
    for _ in range(5):
        with torch.no_grad():
            model.x.fill_(rank)
        sync.step()
    return small, estimates, cost, (sync.rounds, sync.extra_rounds)


@pytest.mark.distributed
@pytest.mark.slow
def test_extra_rounds_bring_the_ranks_under_the_target_by_an_estimate_that_all_share():
    outcomes = run_ranks(_extra_rounds, 4, 4)
    z, needed = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1
    while distance(list(z)) > 0.05:
        z, needed = RingTopology(4).mixing_matrix(0) @ z, needed + 1
    assert needed > 1
    for (estimate, distance_now, extra, rounds), estimates, cost, limited in outcomes:
        assert estimate == pytest.approx(distance_now, rel=1e-9)  # exact, the model is small
        assert estimate <= 0.05
        assert (extra, rounds) == (needed, needed + 1)
        assert estimates == pytest.approx([1.0] * 3, abs=0.06)
        assert len(set(estimates)) == 3  # other coordinates at every step
        assert 0 < cost <= 8 * (4096 + 4)
        assert limited == (5 + 3 * 2, 3 * 2)
    assert all(outcome == outcomes[0] for outcome in outcomes)


class OneOfTwo(Exchange):
    """Record the exchanged sample; the other rank has zeros."""

    def mean_(self, tensors):
        self.sample = tensors[0].clone()
        tensors[0].div_(2)


def test_the_samples_of_successive_steps_take_every_coordinate_of_every_tensor_once():
    sizes = [*[1] * 5000, 2, 3, 5000, 4, 2000, 2, 3]
    numbers = torch.arange(1.0, sum(sizes) + 1)
    exchange, taken, squared = OneOfTwo(), [], 0.0
    for step in range(10, 13):  # ceil(12014 / 4096) = 3 of them
        distance = sampled_distance(numbers.split(sizes), exchange, step)
        taken.append(exchange.sample)
        squared += distance**2 * len(exchange.sample) / len(numbers)
    assert torch.equal(torch.cat(taken).sort().values, numbers)
    assert max(map(len, taken)) <= 4096
    assert squared == pytest.approx((numbers.double() / 2).square().sum().item(), rel=1e-6)
