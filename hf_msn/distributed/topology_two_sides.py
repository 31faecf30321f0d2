"""Topologies in which the ranks of one side exchange with those of the other, as AD-PSGD needs them."""

from collections import deque

from .topology_base import Topology

_MOST_STEPS = 256  # of a topology that are looked at to find its two sides


class TwoSidesTopology(Topology):
    """Every rank at an even position is linked with every one at an odd position, for any number of ranks."""

    period = 1

    def _out_peers(self, rank: int, step: int) -> list[int]:
        return list(range(1 - rank % 2, self.world_size, 2))


def two_sides(topology: Topology) -> tuple[dict[int, int], tuple[int, int] | None]:
    """The side, 0 or 1, of each rank so that links join different ones, and the first link that does not.

    The first rank of what hangs together is on side 0. Looks at a period, or at the first 256 steps.
    """
    links: dict[int, set[int]] = {rank: set() for rank in topology.alive}
    for step in range(min(topology.period or _MOST_STEPS, _MOST_STEPS)):
        for rank in links:
            for peer in topology.out_peers(rank, step):
                links[rank].add(peer)
                links[peer].add(rank)
    sides: dict[int, int] = {}
    for first in links:
        if first in sides:
            continue
        sides[first], queue = 0, deque([first])
        while queue:
            rank = queue.popleft()
            for peer in sorted(links[rank] - sides.keys()):
                sides[peer] = 1 - sides[rank]
                queue.append(peer)
    bad = [(rank, peer) for rank in links for peer in sorted(links[rank]) if sides[rank] == sides[peer]]
    return sides, bad[0] if bad else None


def check_topology(topology: Topology, size: int, *, must_pair: bool) -> None:
    """Refuses a topology for another number of ranks or, with `must_pair`, without two sides that exchange.

    Raises:
        ValueError: With what is wrong.
    """
    if not isinstance(topology, Topology) or topology.world_size != size:
        raise ValueError(
            f"`topology` must be a Topology for the {size} ranks of the group, but is {topology!r}. Make it with "
            f"`world_size={size}`, or leave it out."
        )
    if not must_pair:
        return
    if not topology.is_symmetric:
        raise ValueError(
            f"`topology` must be symmetric for 'ad_psgd', where peers average with one another, but {topology!r} is "
            "not, or does not say. Leave it out, or use `method='push_sum'`, which takes every topology."
        )
    link = two_sides(topology)[1]
    if link is not None:
        raise ValueError(
            "`topology` must be bipartite for 'ad_psgd', where ranks of one side ask and those of the other answer, "
            f"but {topology!r} links ranks {link[0]} and {link[1]} of one side. Leave it out, or use "
            "BipartiteExponentialTopology, or a ring of an even number of ranks."
        )
