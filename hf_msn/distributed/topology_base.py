"""What every topology has: peers, mixing matrix, spectral gap, and the repair when a peer is gone."""

import copy
import re
import zlib
from collections.abc import Iterable
from numbers import Integral

import torch

_DESCRIBED_STEPS = 8


class Topology:
    """Who sends to whom at each step. A subclass needs to say `_out_peers(rank, step)`, and `period` where it has one.

    Args:
        world_size (`int`): number of ranks n, >= 1. With n = 1 nobody has a peer, whatever else is asked for.

    Raises:
        ValueError: if `world_size` is not an integer >= 1.
    """

    def __init__(self, world_size: int):
        self.world_size = checked_integer("world_size", world_size, "is the number of ranks", minimum=1)

    @property
    def alive(self) -> list[int]:
        """The ranks that take part, in ascending order: all, but for those that a [`RepairedTopology`] is without."""
        return list(range(self.world_size))

    @property
    def period(self) -> int | None:
        """Number of steps after which the peers repeat from step 0 on; `None` where they do not."""
        return None

    def out_peers(self, rank: int, step: int) -> list[int]:
        """The ranks that `rank` sends to at `step`: without itself and without repetition.

        Args:
            rank (`int`): who sends, in 0..n-1.
            step (`int`): communication step, counted from 0.

        Raises:
            ValueError: if `rank` is outside 0..n-1 or `step` is negative, or either is not an integer.
        """
        return self._out_peers(self._rank(rank), checked_step(step))

    def in_peers(self, rank: int, step: int) -> list[int]:
        """The ranks that send to `rank` at `step`: exactly those that have it among their [`~Topology.out_peers`].

        Args:
            rank (`int`): who receives, in 0..n-1.
            step (`int`): communication step, counted from 0.

        Raises:
            ValueError: if `rank` is outside 0..n-1 or `step` is negative, or either is not an integer.
        """
        return self._in_peers(self._rank(rank), checked_step(step))

    def mixing_matrix(self, step: int) -> torch.Tensor:
        """P of shape (n, n), float64, with columns that sum to 1: the values after `step` are `P @ x`.

        Raises:
            ValueError: if `step` is negative or not an integer.
        """
        step = checked_step(step)
        matrix = torch.zeros(self.world_size, self.world_size, dtype=torch.float64)
        for sender in range(self.world_size):
            receivers = [sender, *self._out_peers(sender, step)]
            matrix[receivers, sender] = 1.0 / len(receivers)
        return matrix

    def description(self) -> str:
        """What topologies must have in common to be the same to the ranks: repr, and a digest of the first peers."""
        peers = [[self.out_peers(rank, step) for rank in self.alive] for step in range(_DESCRIBED_STEPS)]
        # Where a function lies in memory differs between the ranks.
        named = re.sub(r" at 0x[0-9a-f]+", "", repr(self))
        return f"{named}, peers {zlib.crc32(repr(peers).encode()):08x}"

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether the rows of every step's matrix sum to 1 too: the plain mean stays, and so do push-sum weights of 1.

        `False` where it is not known: in a subclass that has no period and does not say.
        """
        return self.period is not None and all(self.is_doubly_stochastic_at(step) for step in range(self.period))

    @property
    def is_symmetric(self) -> bool:
        """Whether every step's matrix is symmetric, so that peers exchange: what D-PSGD and AD-PSGD need.

        `False` where it is not known: in a topology that has no period and does not say.
        """
        return self.period is not None and all(self.is_symmetric_at(step) for step in range(self.period))

    def is_doubly_stochastic_at(self, step: int) -> bool:
        """Whether the rows of the matrix of this one step sum to 1, looked up in the matrix itself."""
        rows = self.mixing_matrix(step).sum(1)
        return torch.allclose(rows, torch.ones_like(rows), rtol=0.0, atol=1e-12)

    def is_symmetric_at(self, step: int) -> bool:
        """Whether the matrix of this one step is symmetric, looked up in the matrix itself."""
        matrix = self.mixing_matrix(step)
        return torch.equal(matrix, matrix.T)

    def spectral_gap(self, steps: int | None = None, *, start: int = 0) -> float:
        """How much closer to consensus one step brings, on average over a period: 1 in one go, 0 never.

            gap = 1 - sigma_2(P(start + K - 1) ... P(start + 1) P(start)) ** (1 / K),    K = steps

        with sigma_2 the second largest singular value. Where the matrices are doubly stochastic, sigma_2 bounds what K
        steps leave of the distance from the mean, for every start: `||x(K) - mean|| <= (1 - gap)**K ||x(0) - mean||`.
        Elsewhere it is only a description. A sigma_2 within rounding error (n times the machine epsilon) counts as 0.
        With n = 1 the gap is 1.

        Args:
            steps (`int`, *optional*): K >= 1; by default the period, or 4 ceil(log2 n) where there is none. Of many
                steps only the rounding error is left: with K = 100 no gap over 0.3 can be told.
            start (`int`, *optional*, defaults to 0): first step of the product, to look at a later part of a schedule.

        Raises:
            ValueError: if `steps` is not an integer >= 1, or `start` is negative.
        """
        start = checked_step(start)
        if steps is None:
            steps = self.period or 4 * max(1, (self.world_size - 1).bit_length())
        steps = checked_integer("steps", steps, "is the number of mixing matrices to multiply", minimum=1)
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
        """The same topology over the ranks that are left when `ranks` are gone. See [`RepairedTopology`].

        Removing a rank that is gone already changes nothing, since several peers may report the same death.

        Raises:
            ValueError: if one of `ranks` is outside 0..n-1, or none would be left.
        """
        gone = {self._rank(rank) for rank in ranks}
        return RepairedTopology(self, [rank for rank in range(self.world_size) if rank not in gone])

    def resized(self, world_size: int) -> "Topology":
        """The same topology over the ranks 0..world_size-1, with `world_size` at most this one's.

        Raises:
            ValueError: if `world_size` is not an integer from 1 to this topology's.
        """
        world_size = checked_integer("world_size", world_size, "is the number of ranks", minimum=1)
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

    def _rank(self, rank: int) -> int:
        if not is_integer(rank) or not 0 <= rank < self.world_size:
            raise ValueError(
                f"A rank must be an integer from 0 to {self.world_size - 1}, but is {rank!r}. "
                f"The topology is for {self.world_size} ranks: make it with the group's world size."
            )
        return int(rank)

    def _settings(self) -> dict:
        return {}

    def __repr__(self) -> str:
        settings = {"world_size": self.world_size, **self._settings()}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


class RepairedTopology(Topology):
    """The same topology over the ranks that are still there, in ascending order and under their old numbers.

    It is the topology for as many ranks as are alive, not the old one with holes: it stays connected, and doubly
    stochastic where it was. A rank that is gone has no peers and is nobody's; in the mixing matrix, which stays
    (n, n), it keeps its own mass. The spectral gap is that of the living.

    To take a rank back, make another from the attribute `topology`: `RepairedTopology(repaired.topology, alive)`.

    Args:
        topology ([`Topology`]): the topology of all ranks. Of a repaired one, the topology that it repairs is taken,
            and who is gone there stays gone.
        alive (iterable of `int`): the ranks that are still there, at least one.

    Raises:
        ValueError: if one of `alive` is outside 0..n-1, or there is none.
    """

    def __init__(self, topology: Topology, alive: Iterable[int]):
        super().__init__(topology.world_size)
        alive = {self._rank(rank) for rank in alive}
        if isinstance(topology, RepairedTopology):
            alive &= set(topology.alive)
            topology = topology.topology
        if not alive:
            raise ValueError(
                f"`alive` must name at least one of the {self.world_size} ranks, but none is left. "
                "The rank that asks is alive: name it."
            )
        self.topology = topology
        self._alive = sorted(alive)
        self._among_living = topology.resized(len(alive))
        self._position = {rank: position for position, rank in enumerate(self._alive)}

    @property
    def alive(self) -> list[int]:
        """The ranks that are still there, in ascending order."""
        return self._alive.copy()

    @property
    def period(self) -> int | None:
        """The period of the topology among the living."""
        return self._among_living.period

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether the topology among the living is; a rank that is gone changes nothing."""
        return self._among_living.is_doubly_stochastic

    @property
    def is_symmetric(self) -> bool:
        """Whether the topology among the living is; a rank that is gone changes nothing."""
        return self._among_living.is_symmetric

    def spectral_gap(self, steps: int | None = None, *, start: int = 0) -> float:
        """[`Topology.spectral_gap`] of the topology among the living."""
        return self._among_living.spectral_gap(steps, start=start)

    def _out_peers(self, rank: int, step: int) -> list[int]:
        if rank not in self._position:
            return []
        return [self._alive[peer] for peer in self._among_living._out_peers(self._position[rank], step)]

    def _in_peers(self, rank: int, step: int) -> list[int]:
        if rank not in self._position:
            return []
        return [self._alive[peer] for peer in self._among_living._in_peers(self._position[rank], step)]

    def resized(self, world_size: int) -> Topology:
        """Refused: who of the living would be left is not known from a number.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"A repaired topology cannot be resized to {world_size}. Name the ranks that are gone: `without(ranks)`."
        )

    def __repr__(self) -> str:
        return f"RepairedTopology({self.topology!r}, alive={self._alive})"


def is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def checked_integer(name: str, value: int, meaning: str, minimum: int) -> int:
    if not is_integer(value) or value < minimum:
        raise ValueError(
            f"`{name}` {meaning} and must be an integer >= {minimum}, but is {value!r}. Give {minimum} or more."
        )
    return int(value)


def checked_step(step: int) -> int:
    return checked_integer("step", step, "counts communication steps from 0", minimum=0)
