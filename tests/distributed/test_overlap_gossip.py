"""OverlapGossip against its recursion with delays in loops, its mass under random ones, and its settings."""

import copy
import io
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from topologies import Star

from hf_msn.distributed import CompleteTopology, ExponentialTopology, OverlapGossip, RingTopology, SlowMo

NUM_STEPS = 9
RATE, MOMENTUM = 0.05, 0.9

TOPOLOGIES = {
    "exponential": ExponentialTopology,
    "ring": RingTopology,
    "directed ring": lambda n: RingTopology(n, directed=True),
    "complete": CompleteTopology,
    "star": Star,
}


def data(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5, 3, generator=generator).double(), torch.randn(5, 2, generator=generator).double()


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2).double()


def take_step(model, optimizer, rank, step):
    x, y = data(rank, step)
    optimizer.zero_grad()
    ((model(x) - y) ** 2).mean().backward()
    optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def total(number):
    tensor = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item()


# With exact delays


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


def reference(topology, bound, sync_after=4):
    n = topology.world_size
    x = [flat(make_model()) for _ in range(n)]
    z = [v.clone() for v in x]
    w, m = [1.0] * n, [torch.zeros_like(x[0]) for _ in range(n)]
    under_way, seen, weights = [], [[] for _ in range(n)], [[] for _ in range(n)]

    def merge(sent_until):
        for message in sorted((entry for entry in under_way if entry[0] <= sent_until), key=lambda e: e[:2]):
            _, _, receiver, share, weight = message
            x[receiver] = x[receiver] + share
            w[receiver] += weight
        under_way[:] = [message for message in under_way if message[0] > sent_until]

    def consensus():
        merge(NUM_STEPS)
        mean = sum(x) / sum(w)
        for i in range(n):
            x[i], z[i], w[i] = mean.clone(), mean.clone(), 1.0

    for step in range(NUM_STEPS):
        for i in range(n):
            inputs, targets = data(i, step)
            weight, bias = z[i][:6].view(2, 3), z[i][6:]
            residual = inputs @ weight.T + bias - targets
            gradient = [2 * residual.T @ inputs / residual.numel(), 2 * residual.sum(0) / residual.numel()]
            m[i] = MOMENTUM * m[i] + torch.cat([g.flatten() for g in gradient])
            x[i] = x[i] - RATE * m[i]
        for i in range(n):
            peers = topology.out_peers(i, step)
            x[i], w[i] = x[i] / (len(peers) + 1), w[i] / (len(peers) + 1)
            under_way += [(step, i, peer, x[i].clone(), w[i]) for peer in peers]
        merge(step - bound)
        for i in range(n):
            z[i] = x[i] / w[i]
        if step == sync_after:
            consensus()
        for i in range(n):
            seen[i].append(z[i].clone())
            weights[i].append(w[i])
    consensus()
    return [([*seen[i], z[i]], weights[i]) for i in range(n)]


def _train_all(rank):
    n = dist.get_world_size()
    return {(name, bound): train(rank, make(n), bound) for name, make in TOPOLOGIES.items() for bound in (0, 1, 2)}


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_mass_is_merged_exactly_as_many_steps_after_it_was_sent_as_the_bound(num_ranks):
    results = run_ranks(_train_all, num_ranks)
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


def _without_bound_zero_being_deterministic(rank):
    return train(rank, Star(dist.get_world_size()), 0, deterministic=False), train(
        rank, Star(dist.get_world_size()), 0, deterministic=True
    )


@pytest.mark.distributed
def test_bound_zero_is_synchronous_push_sum_to_the_bit():
    for (seen, weights), (other, other_weights) in run_ranks(_without_bound_zero_being_deterministic, 3):
        assert all(torch.equal(a, b) for a, b in zip(seen, other))
        assert weights == other_weights
