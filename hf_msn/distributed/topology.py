"""Communication topologies: pure functions of (world_size, step). They open no process group.

A rank keeps one share of its mass and sends an equal share to each of its `out_peers`. Column j of the mixing matrix P
is the distribution of rank j's mass, so P is column-stochastic (SGP, arXiv 1811.10792):

    x_i(k + 1) = sum_j P_ij(k) x_j(k),    P_ij(k) = 1 / (number of out-peers of j + 1) for those i and for i = j

`plot` draws topologies and their consensus distance.
"""

import copy
import math
import random
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable

import torch

from ..checks import check_integer
from .topology_plot import plot as plot

_DESCRIBED_STEPS = 8
_MOST_STEPS = 256  # of a topology without a short period, to find its two sides


class Topology:
    """Base class. A subclass defines `_out_peers(rank, step)`, and `period` if it has one.

    Args:
        world_size (`int`): Number of ranks n, >= 1. With n = 1 there are no peers.

    Raises:
        ValueError: If `world_size` is not an integer >= 1.
    """

    def __init__(self, world_size: int):
        self.world_size = _check_world_size(world_size)

    @property
    def alive(self) -> list[int]:
        """Ranks that take part, in ascending order: all, except those that a [`RepairedTopology`] leaves out."""
        return list(range(self.world_size))

    @property
    def period(self) -> int | None:
        """Number of steps after which the peers repeat; `None` if they do not."""
        return None

    def out_peers(self, rank: int, step: int) -> list[int]:
        """Return the ranks that `rank` sends to at `step`, counted from 0, without itself and without repetition.

        Raises:
            ValueError: If `rank` is not an integer in 0..n-1, or `step` not an integer >= 0.
        """
        return self._out_peers(self._check_rank(rank), _check_step(step))

    def in_peers(self, rank: int, step: int) -> list[int]:
        """Return the ranks that have `rank` among their [`~Topology.out_peers`] at `step`. Raises as that does."""
        return self._in_peers(self._check_rank(rank), _check_step(step))

    def mixing_matrix(self, step: int) -> torch.Tensor:
        """Return P of shape (n, n), float64, with columns that sum to 1: the values after `step` are `P @ x`."""
        step = _check_step(step)
        matrix = torch.zeros(self.world_size, self.world_size, dtype=torch.float64)
        for sender in range(self.world_size):
            receivers = [sender, *self._out_peers(sender, step)]
            matrix[receivers, sender] = 1.0 / len(receivers)
        return matrix

    def description(self) -> str:
        """Return the repr and a digest of the first peers, by which ranks compare their topologies."""
        peers = [[self.out_peers(rank, step) for rank in self.alive] for step in range(_DESCRIBED_STEPS)]
        named = re.sub(r" at 0x[0-9a-f]+", "", repr(self))  # the address of a function differs between ranks
        return f"{named}, peers {zlib.crc32(repr(peers).encode()):08x}"

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether the rows of every step's matrix sum to 1 too, so that the plain mean is preserved.

        `False` if it is not known: in a subclass without a period that does not define it.
        """
        return self.period is not None and all(self.is_doubly_stochastic_at(step) for step in range(self.period))

    @property
    def is_symmetric(self) -> bool:
        """Whether every step's matrix is symmetric, as D-PSGD and AD-PSGD need. `False` if it is not known."""
        return self.period is not None and all(self.is_symmetric_at(step) for step in range(self.period))

    def is_doubly_stochastic_at(self, step: int) -> bool:
        """Return whether the rows of the matrix of this step sum to 1."""
        rows = self.mixing_matrix(step).sum(1)
        return torch.allclose(rows, torch.ones_like(rows), rtol=0.0, atol=1e-12)

    def is_symmetric_at(self, step: int) -> bool:
        """Return whether the matrix of this step is symmetric."""
        matrix = self.mixing_matrix(step)
        return torch.equal(matrix, matrix.T)

    def spectral_gap(self, steps: int | None = None, *, start: int = 0) -> float:
        """Return how much one step reduces the distance from consensus, averaged over a period: 1 at once, 0 never.

            gap = 1 - sigma_2(P(start + K - 1) ... P(start + 1) P(start)) ** (1 / K),    K = steps

        sigma_2 is the second largest singular value. If the matrices are doubly stochastic, it bounds the distance
        from the mean after K steps: `||x(K) - mean|| <= (1 - gap)**K ||x(0) - mean||`. A sigma_2 within rounding error
        (n times the machine epsilon) counts as 0. With n = 1 the gap is 1.

        Args:
            steps (`int`, *optional*): K >= 1; by default the period, or 4 ceil(log2 n) without one. Over many steps
                only rounding error is left: with K = 100 gaps over 0.3 cannot be told apart.
            start (`int`, *optional*, defaults to 0): First step of the product.

        Raises:
            ValueError: If `steps` is not an integer >= 1, or `start` not an integer >= 0.
        """
        start = _check_step(start)
        if steps is None:
            steps = self.period or 4 * max(1, (self.world_size - 1).bit_length())
        steps = check_integer("steps", steps, meaning="is the number of mixing matrices to multiply")
        if self.world_size == 1:
            return 1.0
        product = torch.eye(self.world_size, dtype=torch.float64)
        for step in range(start, start + steps):
            product = self.mixing_matrix(step) @ product
        second = float(torch.linalg.svdvals(product)[1])
        if second <= self.world_size * torch.finfo(torch.float64).eps:
            return 1.0
        return 1.0 - second ** (1.0 / steps)

    def without(self, ranks: Iterable[int]) -> "RepairedTopology":
        """Return the topology over the ranks that are left without `ranks`. See [`RepairedTopology`].

        Raises:
            ValueError: If one of `ranks` is outside of 0..n-1, or none would be left.
        """
        gone = {self._check_rank(rank) for rank in ranks}
        return RepairedTopology(self, [rank for rank in range(self.world_size) if rank not in gone])

    def resized(self, world_size: int) -> "Topology":
        """Return the same topology over the ranks 0..world_size-1.

        Raises:
            ValueError: If `world_size` is not an integer from 1 to this topology's.
        """
        world_size = _check_world_size(world_size)
        if world_size > self.world_size:
            raise ValueError(
                f"`world_size` of a resized topology must be at most {self.world_size}, but is {world_size}. "
                f"Make a new {type(self).__name__} for more ranks."
            )
        smaller = copy.copy(self)
        smaller.world_size = world_size
        return smaller

    def _out_peers(self, rank: int, step: int) -> list[int]:
        raise NotImplementedError(f"{type(self).__name__} must define `_out_peers(rank, step)`.")

    def _in_peers(self, rank: int, step: int) -> list[int]:
        return [other for other in range(self.world_size) if rank in self._out_peers(other, step)]

    def _check_rank(self, rank: int) -> int:
        rank = check_integer("rank", rank, 0)
        if rank >= self.world_size:
            raise ValueError(
                f"`rank` must be below the number of ranks, {self.world_size}, but is {rank}. Make the topology with "
                "the group's world size."
            )
        return rank

    def _settings(self) -> dict:
        return {}

    def __repr__(self) -> str:
        settings = {"world_size": self.world_size, **self._settings()}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


class _CirculantTopology(Topology):
    """Every rank r sends to r + hop mod n with the same hops: doubly stochastic by construction."""

    is_doubly_stochastic = True

    def _hops(self, step: int) -> Iterable[int]:
        """Return the distance to each rank that one sends to."""
        raise NotImplementedError

    def _distinct_hops(self, step: int) -> list[int]:
        if self.world_size == 1:
            return []
        reduced = dict.fromkeys(hop % self.world_size for hop in self._hops(step))
        return [hop for hop in reduced if hop != 0]

    def _out_peers(self, rank: int, step: int) -> list[int]:
        return [(rank + hop) % self.world_size for hop in self._distinct_hops(step)]

    def _in_peers(self, rank: int, step: int) -> list[int]:
        return [(rank - hop) % self.world_size for hop in self._distinct_hops(step)]


class RingTopology(_CirculantTopology):
    """Ring: both neighbours, or only the next one. Period 1; with n = 2 both neighbours are one peer.

    Args:
        world_size (`int`): Number of ranks n, >= 1.
        directed (`bool`, *optional*, defaults to `False`): Send to rank + 1 only, which is not symmetric for n > 2.
    """

    period = 1

    def __init__(self, world_size: int, directed: bool = False):
        super().__init__(world_size)
        self.directed = directed

    def _hops(self, step: int) -> Iterable[int]:
        return (1,) if self.directed else (1, -1)

    def _settings(self) -> dict:
        return {"directed": self.directed}


class CompleteTopology(_CirculantTopology):
    """Every rank sends to every other: the exact mean in one step. Period 1, symmetric."""

    period = 1
    is_symmetric = True

    def _hops(self, step: int) -> Iterable[int]:
        return range(1, self.world_size)


class ExponentialTopology(_CirculantTopology):
    """The directed exponential graph of SGP: p peers per step, at distances that grow from step to step.

    At step k rank r sends to r + j (p + 1)^i mod n for j = 1..p, with i = k mod (floor(log_{p+1}(n - 1)) + 1). If n is
    a power of p + 1, all ranks hold the exact mean after log_{p+1}(n) steps from any start; with n = 6 and p = 1 not.

    A hop that is a multiple of n or repeats a target of the same step is left out. That step has fewer than p peers,
    among which the mass is split. The hop of j = 1 always stays.

    Args:
        world_size (`int`): Number of ranks n, >= 1.
        peers_per_step (`int`, `dict` or function, *optional*, defaults to 1): p, from 1 to n - 1 (ignored with n = 1).
            `{0: 1, 1000: 2}` has p = 1 from step 0 and p = 2 from step 1000 on; a function maps the step to p, alike
            on all ranks. In a repaired topology p is at most the number of other ranks that are alive.

    Raises:
        ValueError: If `world_size` is not an integer >= 1, p is outside of 1..n-1, or a schedule does not begin at
            step 0. The p that a function returns is checked at each step.
    """

    def __init__(self, world_size: int, peers_per_step: int | dict[int, int] | Callable[[int], int] = 1):
        super().__init__(world_size)
        self._most_peers = self.world_size - 1
        if isinstance(peers_per_step, dict):
            if 0 not in peers_per_step:
                raise ValueError(
                    "`peers_per_step` as a schedule maps first steps to numbers of peers and must have step 0, but is "
                    f"{peers_per_step!r}. For example {{0: 1, 1000: 2}}."
                )
            checked = {_check_step(step): self._check_peers(peers) for step, peers in peers_per_step.items()}
            peers_per_step = dict(sorted(checked.items()))
        elif not callable(peers_per_step):
            peers_per_step = self._check_peers(peers_per_step)
        self.peers_per_step = peers_per_step

    @property
    def period(self) -> int | None:
        """floor(log_{p+1}(n - 1)) + 1, or `None` where p changes with the step."""
        if self.world_size == 1:
            return 1
        if callable(self.peers_per_step):
            return None
        schedule = self.peers_per_step if isinstance(self.peers_per_step, dict) else {0: self.peers_per_step}
        peers = {min(peers, self.world_size - 1) for peers in schedule.values()}
        return self._rounds(peers.pop()) if len(peers) == 1 else None

    def peers_at(self, step: int) -> int:
        """Return p at `step`, at most n - 1, before hops to the sender and repeated targets are left out."""
        step, peers = _check_step(step), self.peers_per_step
        if isinstance(peers, dict):
            peers = peers[max(first for first in peers if first <= step)]
        elif callable(peers):
            peers = self._check_peers(peers(step))
        return min(peers, self.world_size - 1)

    def _hops(self, step: int) -> Iterable[int]:
        peers = self.peers_at(step)
        distance = (peers + 1) ** (step % self._rounds(peers))
        return [j * distance for j in range(1, peers + 1)]

    def _rounds(self, peers: int) -> int:
        rounds, distance = 0, 1
        while distance < self.world_size:  # in integers: a floating-point logarithm misses powers
            rounds, distance = rounds + 1, distance * (peers + 1)
        return rounds

    def _check_peers(self, peers: int) -> int:
        peers = check_integer("peers_per_step", peers, remedy="SGP's paper uses 1 and 2.")
        if peers > self._most_peers > 0:
            raise ValueError(
                f"`peers_per_step` must be at most {self._most_peers}, the number of other ranks, but is {peers}. "
                "SGP's paper uses 1 and 2."
            )
        return peers

    def _settings(self) -> dict:
        return {"peers_per_step": self.peers_per_step}


class BipartiteExponentialTopology(Topology):
    """Pairs of an even and an odd rank, at distances that grow from step to step: undirected, for AD-PSGD.

    With n even, at step k the even rank r and the odd rank r + 2^(i + 1) - 1 mod n are a pair, with i = k mod
    floor(log2 n): hops 1, 3, 7, ... If n is a power of two, all ranks hold the exact mean after log2 n steps. The SGP
    repository has 1 and then 1 + 2^i: hops 1, 3, 5, 9, ..., which need log2 n + 1 steps for n = 8, 16, 32, ...

    With n odd the (k mod (n + 1) / 2)-th even rank has no peer at step k. The other even ranks, counted in order, and
    the odd ranks are paired as if they were n - 1 ranks. So two even ranks are never a pair, and exchanges in which
    even ranks ask and odd ranks answer cannot deadlock. In a [`RepairedTopology`] even and odd are the positions in
    `alive`, not the ranks.

    Args:
        world_size (`int`): Number of ranks n, >= 1.
    """

    is_doubly_stochastic = True
    is_symmetric = True

    @property
    def period(self) -> int:
        """floor(log2 n) with n even; with n odd the least multiple of floor(log2(n - 1)) and (n + 1) / 2."""
        rounds = max(1, self._rounds())
        return rounds if self.world_size % 2 == 0 else math.lcm(rounds, (self.world_size + 1) // 2)

    def _rounds(self) -> int:
        return (self.world_size // 2).bit_length()  # floor(log2 n) of an even n, in integers

    def _out_peers(self, rank: int, step: int) -> list[int]:
        half = self.world_size // 2
        if half == 0:
            return []
        shift = 2 ** (step % self._rounds()) - 1
        resting = step % (half + 1) if self.world_size % 2 else half  # an even n has no rank at index half
        if rank % 2 == 1:
            position = (rank // 2 - shift) % half
            return [2 * (position + (position >= resting))]
        if rank // 2 == resting:
            return []
        position = rank // 2 - (rank // 2 > resting)
        return [2 * ((position + shift) % half) + 1]

    def _in_peers(self, rank: int, step: int) -> list[int]:
        return self._out_peers(rank, step)


class RandomOnePeerTopology(Topology):
    """One random peer per step, independent of the steps before.

    Directed, the targets of all ranks are a permutation without fixed points, drawn uniformly: each rank sends to one
    and receives from one. Undirected, the ranks are in pairs, drawn uniformly; with n odd one random rank has no peer.
    It is a function of (seed, step, n) alone: the same on every rank and machine, and after a resume.

    Args:
        world_size (`int`): Number of ranks n, >= 1.
        seed (`int`, *optional*, defaults to 0): The same on all ranks.
        directed (`bool`, *optional*, defaults to `True`): A permutation; `False` gives pairs, which are symmetric.

    Raises:
        ValueError: If `world_size` is not an integer >= 1, or `seed` not an integer >= 0.
    """

    is_doubly_stochastic = True

    def __init__(self, world_size: int, seed: int = 0, directed: bool = True):
        super().__init__(world_size)
        self.seed = check_integer("seed", seed, 0)
        self.directed = directed

    @property
    def is_symmetric(self) -> bool:
        """Whether every step's matrix is symmetric: undirected, or with at most two ranks."""
        return not self.directed or self.world_size <= 2

    def targets(self, step: int) -> list[int]:
        """Return the rank that each of the n ranks sends to at `step`; a rank without a peer has itself."""
        ranks = list(range(self.world_size))
        # Not torch's generator, which keeps 32 bits of its seed: text is hashed whole, and alike on every machine.
        generator = random.Random(f"{self.seed} {_check_step(step)}")
        shuffled = ranks.copy()
        generator.shuffle(shuffled)
        if self.directed:
            # Rejection keeps the distribution uniform; a permutation passes with probability 1 / e.
            while self.world_size > 1 and any(rank == target for rank, target in enumerate(shuffled)):
                generator.shuffle(shuffled)
            return shuffled
        for one, other in zip(shuffled[0::2], shuffled[1::2]):
            ranks[one], ranks[other] = other, one
        return ranks

    def _out_peers(self, rank: int, step: int) -> list[int]:
        return [target for target in [self.targets(step)[rank]] if target != rank]

    def _in_peers(self, rank: int, step: int) -> list[int]:
        return [source for source in [self.targets(step).index(rank)] if source != rank]

    def _settings(self) -> dict:
        return {"seed": self.seed, "directed": self.directed}


class TwoSidesTopology(Topology):
    """Every rank at an even position is linked with every one at an odd position, for any number of ranks."""

    period = 1

    def _out_peers(self, rank: int, step: int) -> list[int]:
        return list(range(1 - rank % 2, self.world_size, 2))


class RepairedTopology(Topology):
    """The same topology over the ranks that are alive, in ascending order and under their numbers.

    It is the topology for as many ranks as are alive, not the old one with holes: it stays connected, and doubly
    stochastic where it was. A rank that is gone has no peers; in the mixing matrix, which stays (n, n), it keeps its
    own mass. Period, symmetry and spectral gap are those of the ranks that are alive.

    To take a rank back, make another from the attribute `topology`: `RepairedTopology(repaired.topology, alive)`.

    Args:
        topology ([`Topology`]): The topology of all ranks. Of a repaired one, the topology that it repairs is taken,
            and the ranks that are gone there stay gone.
        alive (iterable of `int`): The ranks that are alive, at least one.

    Raises:
        ValueError: If one of `alive` is outside of 0..n-1, or there is none.
    """

    def __init__(self, topology: Topology, alive: Iterable[int]):
        super().__init__(topology.world_size)
        ranks = {self._check_rank(rank) for rank in alive}
        if isinstance(topology, RepairedTopology):
            ranks &= set(topology.alive)
            topology = topology.topology
        if not ranks:
            raise ValueError(
                f"`alive` must have at least one of the {self.world_size} ranks, but is empty. Add this rank."
            )
        self.topology: Topology = topology
        self._alive = sorted(ranks)
        self._among_alive = topology.resized(len(ranks))
        self._position = {rank: position for position, rank in enumerate(self._alive)}

    @property
    def alive(self) -> list[int]:
        """Ranks that are alive, in ascending order."""
        return self._alive.copy()

    @property
    def period(self) -> int | None:
        return self._among_alive.period

    @property
    def is_doubly_stochastic(self) -> bool:
        return self._among_alive.is_doubly_stochastic

    @property
    def is_symmetric(self) -> bool:
        return self._among_alive.is_symmetric

    def spectral_gap(self, steps: int | None = None, *, start: int = 0) -> float:
        return self._among_alive.spectral_gap(steps, start=start)

    def _out_peers(self, rank: int, step: int) -> list[int]:
        if rank not in self._position:
            return []
        return [self._alive[peer] for peer in self._among_alive._out_peers(self._position[rank], step)]

    def _in_peers(self, rank: int, step: int) -> list[int]:
        if rank not in self._position:
            return []
        return [self._alive[peer] for peer in self._among_alive._in_peers(self._position[rank], step)]

    def resized(self, world_size: int) -> Topology:
        raise ValueError(
            f"A repaired topology cannot be resized to {world_size}. Name the ranks that are gone: `without(ranks)`."
        )

    def __repr__(self) -> str:
        return f"RepairedTopology({self.topology!r}, alive={self._alive})"


def two_sides(topology: Topology) -> tuple[dict[int, int], tuple[int, int] | None]:
    """Return the side of each rank, 0 or 1, so that links join different sides, and the first link that does not.

    The first rank of each connected part is on side 0. Looks at one period, or at the first 256 steps.
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
    """Check that a topology is for `size` ranks and, with `must_pair`, that it is symmetric and bipartite."""
    if not isinstance(topology, Topology) or topology.world_size != size:
        raise ValueError(
            f"`topology` must be a Topology for the {size} ranks of the group, but is {topology!r}. Make it with "
            f"`world_size={size}`, or leave it out."
        )
    if not must_pair:
        return
    if not topology.is_symmetric:
        raise ValueError(
            "`topology` must be symmetric for 'ad_psgd', in which peers average with one another, but "
            f"{topology!r} is not. Leave it out, or use `method='push_sum'`, which takes every topology."
        )
    link = two_sides(topology)[1]
    if link is not None:
        raise ValueError(
            "`topology` must be bipartite for 'ad_psgd', in which ranks of one side ask and the others answer, but "
            f"{topology!r} links ranks {link[0]} and {link[1]} of one side. Leave it out, or use "
            "BipartiteExponentialTopology, or a ring of an even number of ranks."
        )


def _check_world_size(world_size: int) -> int:
    return check_integer("world_size", world_size, meaning="is the number of ranks")


def _check_step(step: int) -> int:
    return check_integer("step", step, 0, meaning="counts communication steps from 0")
