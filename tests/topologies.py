"""Topologies of all kinds for the tests, and products of their mixing matrices."""

import pytest
import torch

from hf_msn.distributed.topology import (
    BipartiteExponentialTopology,
    CompleteTopology,
    ExponentialTopology,
    RandomOnePeerTopology,
    RingTopology,
    Topology,
)

SIZES = range(1, 13)
STEPS = [*range(13), 97, 1000, 10**6 + 7]
MAKERS = {
    "ring": RingTopology,
    "directed ring": lambda n: RingTopology(n, directed=True),
    "complete": CompleteTopology,
    "exponential": ExponentialTopology,
    "exponential, 2 peers": lambda n: ExponentialTopology(n, min(2, max(1, n - 1))),
    "exponential, most peers": lambda n: ExponentialTopology(n, max(1, n - 1)),
    "exponential, schedule": lambda n: ExponentialTopology(n, {0: 1, 5: min(2, max(1, n - 1)), 100: 1}),
    "exponential, function": lambda n: ExponentialTopology(n, lambda step: 1 + (step % 3 == 0 and n > 2)),
    "bipartite": BipartiteExponentialTopology,
    "random": lambda n: RandomOnePeerTopology(n, seed=3),
    "random pairs": lambda n: RandomOnePeerTopology(n, seed=3, directed=False),
}
SYMMETRIC = ["ring", "complete", "bipartite", "random pairs"]
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


class Star(Topology):
    """Custom topology: all send to rank 0 at even steps, rank 0 to all at odd ones. Directed and irregular."""

    period = 2

    def _out_peers(self, rank, step):
        if step % 2:
            return list(range(1, self.world_size)) if rank == 0 else []
        return [] if rank == 0 else [0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(topology, steps, start=0):
    result = torch.eye(topology.world_size, dtype=torch.float64)
    for step in range(start, start + steps):
        result = topology.mixing_matrix(step) @ result
    return result


def is_exact_mean(topology, steps, start=0):
    x = normal(topology.world_size, 5)
    return torch.allclose(product(topology, steps, start) @ x, x.mean(0).expand_as(x), rtol=0, atol=1e-14)
