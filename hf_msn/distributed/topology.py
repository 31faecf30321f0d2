"""Who talks to whom: pure functions of (world_size, step), which open no process group.

A rank keeps one share of its mass and sends an equal share to each of its `out_peers`. So column j of the mixing
matrix P is what becomes of rank j's mass, and P is column-stochastic (SGP, arXiv 1811.10792):

    x_i(k + 1) = sum_j P_ij(k) x_j(k),    P_ij(k) = 1 / (number of out-peers of j + 1) for those i and for i = j

`plot` draws topologies and how fast they come to consensus.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from .topology_base import RepairedTopology, Topology, checked_integer, checked_step, is_integer
from .topology_plot import plot

__all__ = [
    "BipartiteExponentialTopology",
    "CompleteTopology",
    "ExponentialTopology",
    "RandomOnePeerTopology",
    "RepairedTopology",
    "RingTopology",
    "Topology",
    "plot",
]


class _CirculantTopology(Topology, ABC):
    """Every rank r sends to r + hop mod n, the hops being the same for all: doubly stochastic by construction."""

    is_doubly_stochastic = True

    @abstractmethod
    def _hops(self, step: int) -> Iterable[int]:
        """How far it is to each rank that one sends to."""

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
    """Both neighbours of a ring, or only the next one. Period 1; with n = 2 both neighbours are one peer.

    Args:
        world_size (`int`): number of ranks n, >= 1.
        directed (`bool`, *optional*, defaults to `False`): send to rank + 1 only, which is not symmetric for n > 2.

    Raises:
        ValueError: if `world_size` is not an integer >= 1.
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
    """Everybody sends to everybody else: the exact mean in one step. Period 1, symmetric."""

    period = 1
    is_symmetric = True

    def _hops(self, step: int) -> Iterable[int]:
        return range(1, self.world_size)


class ExponentialTopology(_CirculantTopology):
    """The directed exponential graph of SGP: p peers a step, whose distances grow from step to step.

    At step k rank r sends to r + j (p + 1)^i mod n for j = 1..p, with i = k mod (floor(log_{p+1}(n - 1)) + 1). With n
    a power of p + 1 all ranks hold the exact mean after log_{p+1}(n) steps from any start; with n = 6 and p = 1 not.

    A hop that is a multiple of n, which would send to the sender, is left out, and so is one that repeats a target of
    the same step: that step has fewer than p peers, and the mass is split among those. The hop of j = 1 always stays.

    Args:
        world_size (`int`): number of ranks n, >= 1.
        peers_per_step (`int`, `dict` or function, *optional*, defaults to 1): p, from 1 to n - 1 (with n = 1 it means
            nothing). `{0: 1, 1000: 2}` has p = 1 from step 0 and p = 2 from step 1000 on; a function maps the step to
            p, and must do so alike on all ranks. When ranks are gone, p is at most the number of the others alive.

    Raises:
        ValueError: if `world_size` is not an integer >= 1, if p is outside 1..n-1, or if a schedule does not start at
            step 0. The p that a function returns is checked at each step.
    """

    def __init__(self, world_size: int, peers_per_step: int | dict[int, int] | Callable[[int], int] = 1):
        super().__init__(world_size)
        self._most_peers = self.world_size - 1
        if isinstance(peers_per_step, dict):
            peers_per_step = self._schedule(peers_per_step)
        elif not callable(peers_per_step):
            peers_per_step = self._checked(peers_per_step)
        self.peers_per_step = peers_per_step

    @property
    def period(self) -> int | None:
        """floor(log_{p+1}(n - 1)) + 1, or `None` where p changes with the step."""
        if self.world_size == 1:
            return 1
        if callable(self.peers_per_step):
            return None
        by_start = self.peers_per_step if isinstance(self.peers_per_step, dict) else {0: self.peers_per_step}
        peers = {min(peers, self.world_size - 1) for peers in by_start.values()}
        return self._rounds(peers.pop()) if len(peers) == 1 else None

    def peers_at(self, step: int) -> int:
        """p at `step`, at most n - 1: as asked for, before hops to the sender and repeated targets are left out.

        Raises:
            ValueError: if `step` is negative, or a function as schedule returns no integer from 1 to n - 1.
        """
        step, peers = checked_step(step), self.peers_per_step
        if isinstance(peers, dict):
            peers = peers[max(start for start in peers if start <= step)]
        elif callable(peers):
            peers = self._checked(peers(step), f" at step {step}")
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

    def _schedule(self, schedule: dict[int, int]) -> dict[int, int]:
        if any(not is_integer(step) or step < 0 for step in schedule) or 0 not in schedule:
            raise ValueError(
                "`peers_per_step` as a schedule maps the step from which it holds to the number of peers and must "
                f"have step 0 and no negative one, but is {schedule!r}. For example {{0: 1, 1000: 2}}."
            )
        return {int(step): self._checked(schedule[step], f" from step {step} on") for step in sorted(schedule)}

    def _checked(self, peers: int, when: str = "") -> int:
        if not is_integer(peers) or peers < 1 or (peers > self._most_peers and self._most_peers > 0):
            others = f"to {self._most_peers}, the number of other ranks" if self._most_peers > 0 else "on"
            raise ValueError(
                f"`peers_per_step` must be an integer from 1 {others}, but is {peers!r}{when}. "
                "1 sends least; SGP's paper has 1 and 2."
            )
        return int(peers)

    def _settings(self) -> dict:
        return {"peers_per_step": self.peers_per_step}


class _MatchingTopology(Topology):
    """Pairs that exchange with one another: symmetric and doubly stochastic by construction."""

    is_doubly_stochastic = True
    is_symmetric = True

    def _in_peers(self, rank: int, step: int) -> list[int]:
        return self._out_peers(rank, step)


class BipartiteExponentialTopology(_MatchingTopology):
    """Each even rank exchanges with one odd rank, at distances that grow from step to step: undirected, for AD-PSGD.

    With n even, at step k the even rank r and the odd rank r + 2^(i + 1) - 1 mod n are a pair, with i = k mod
    floor(log2 n): hops 1, 3, 7, ... With n a power of two all ranks hold the exact mean after log2 n steps.

    With n odd there is one even rank too many: the (k mod (n + 1) / 2)-th even rank rests at step k, without a peer.
    The even ranks that are left, counted in order, and the odd ranks are paired as if they were n - 1 ranks. So an
    even rank never meets an even one, and exchanges ordered by that (even asks, odd answers) cannot deadlock. In a
    [`RepairedTopology`] even and odd are the positions in `alive`, not the ranks' numbers.

    Args:
        world_size (`int`): number of ranks n, >= 1.

    Raises:
        ValueError: if `world_size` is not an integer >= 1.
    """

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
        # An even n has no rank at this index: nobody rests.
        resting = step % (half + 1) if self.world_size % 2 else half
        if rank % 2 == 1:
            position = (rank // 2 - shift) % half
            return [2 * (position + (position >= resting))]
        if rank // 2 == resting:
            return []
        position = rank // 2 - (rank // 2 > resting)
        return [2 * ((position + shift) % half) + 1]


class RandomOnePeerTopology(Topology):
    """One random peer a step, new at each step and independent of the steps before.

    Directed, the targets of all ranks are a permutation without fixed points, drawn uniformly: each rank sends to one
    and hears from one. Undirected, the ranks are in pairs, drawn uniformly; with n odd one random rank rests.
    It is a function of (seed, step, n) alone: the same on every rank and machine, and after a resume.

    Args:
        world_size (`int`): number of ranks n, >= 1.
        seed (`int`, *optional*, defaults to 0): all ranks must have the same.
        directed (`bool`, *optional*, defaults to `True`): a permutation; `False` gives pairs, which are symmetric.

    Raises:
        ValueError: if `world_size` is not an integer >= 1, or `seed` is not an integer >= 0.
    """

    is_doubly_stochastic = True

    def __init__(self, world_size: int, seed: int = 0, directed: bool = True):
        super().__init__(world_size)
        self.seed = checked_integer("seed", seed, "starts the draws of the peers", minimum=0)
        self.directed = directed

    @property
    def is_symmetric(self) -> bool:
        """Whether every step's matrix is symmetric: undirected, and with at most two ranks."""
        return not self.directed or self.world_size <= 2

    def targets(self, step: int) -> list[int]:
        """Whom each of the n ranks sends to at `step`; a rank that rests has itself."""
        ranks = list(range(self.world_size))
        # Not torch's generator, which keeps 32 bits of its seed: text is hashed whole, and alike on every machine.
        generator = random.Random(f"{self.seed} {checked_step(step)}")
        shuffled = ranks.copy()
        generator.shuffle(shuffled)
        if self.directed:
            # To reject and draw anew leaves what remains uniform; a permutation passes with probability 1 / e.
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
