"""Bipartite topologies: two sides that exchange."""

import pytest

from hf_msn.distributed.topology import (
    BipartiteExponentialTopology,
    CompleteTopology,
    ExponentialTopology,
    RandomOnePeerTopology,
    RingTopology,
    TwoSidesTopology,
    check_topology,
    two_sides,
)


@pytest.mark.parametrize(
    "topology",
    [
        ExponentialTopology(4),
        RingTopology(4, directed=True),
        RingTopology(5),
        CompleteTopology(3),
        RandomOnePeerTopology(4, directed=False),
    ],
)
def test_a_topology_without_two_sides_that_exchange_is_refused_for_pairs(topology):
    with pytest.raises(ValueError, match=type(topology).__name__):
        check_topology(topology, topology.world_size, must_pair=True)
    check_topology(topology, topology.world_size, must_pair=False)


def test_links_join_ranks_of_different_sides():
    for n in range(1, 10):
        for topology in (TwoSidesTopology(n), BipartiteExponentialTopology(n)):
            sides, bad = two_sides(topology)
            assert bad is None
            assert sides == {rank: rank % 2 for rank in range(n)}
            check_topology(topology, n, must_pair=isinstance(topology, BipartiteExponentialTopology))
    sides, bad = two_sides(TwoSidesTopology(5).without([1]))
    assert (sides, bad) == ({0: 0, 2: 1, 3: 0, 4: 1}, None)
    assert two_sides(RingTopology(6))[0] == {rank: rank % 2 for rank in range(6)}
