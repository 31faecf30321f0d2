"""What the ranks of [`AsyncGossip`] tell one another between their meetings: pairwise averages, or pushed shares."""

import random
from collections.abc import Iterable, Sequence

import torch

from ..comm.mailbox import Message
from ..comm.watched_mailbox import ANSWER, MASS, REQUEST, WatchedMailbox
from ..topology import Topology, two_sides

_LEAST_WEIGHT_TO_PUSH = 0.5


class _Repaired:
    """The topology among those that are there, made once for each set of absent ranks."""

    def __init__(self, topology: Topology):
        self._topology, self._made = topology, {frozenset(): topology}

    def without(self, absent: frozenset[int]) -> Topology:
        if absent not in self._made:
            self._made = {frozenset(): self._topology, absent: self._topology.without(absent)}
        return self._made[absent]


class PairwiseAveraging:
    """AD-PSGD between two meetings. The weight is 1 at all times.

    An exchange counts once the active rank has applied the answer. With a peer that is lost half-way it is undone
    where that can be known: an answer that has not left is taken back, and that of a lost peer is not applied.

    Args:
        x (`Sequence[torch.Tensor]`): Flat buffers of this rank, changed in place.
        mailbox ([`WatchedMailbox`]): Of messages like `x`.
        topology ([`Topology`]): Links of two sides.
        seed (`int`): Of the random neighbours.
    """

    weight = 1.0

    def __init__(self, x: Sequence[torch.Tensor], mailbox: WatchedMailbox, topology: Topology, seed: int):
        self._x, self._mailbox, self._seed = list(x), mailbox, seed
        self._topology = _Repaired(topology)
        self._sides: tuple[frozenset[int] | None, dict[int, int]] = (None, {})
        self._asked: set[int] = set()

    @property
    def unanswered(self) -> set[int]:
        """Peers that this rank has asked and that have not answered."""
        return self._asked - self._mailbox.lost

    def send(self, number: int) -> None:
        """Asks a random neighbour, if this rank is active and no exchange is under way but with a silent one."""
        absent, rank = self._mailbox.absent, self._mailbox.rank
        topology = self._topology.without(absent)
        if self._sides[0] != absent:
            self._sides = absent, two_sides(topology)[0]
        if self._sides[1][rank] != 0 or self._asked - absent:
            return
        peers = [peer for peer in topology.out_peers(rank, number) if peer not in self._asked]
        if peers:
            peer = random.Random(f"{self._seed} {rank} {number}").choice(peers)
            self._mailbox.send(peer, REQUEST, self._x)
            self._asked.add(peer)

    def receive(self, message: Message) -> bool:
        """Takes a question or an answer; returns whether x has changed."""
        peer = message.sender
        if message.kind == ANSWER:
            self._asked.discard(peer)
        if peer in self._mailbox.lost:
            return False
        if message.kind == ANSWER:
            for x, change in zip(self._x, message.tensors):
                x.sub_(change)
            return True
        changes = [theirs.to(x.dtype).sub_(x).mul_(0.5) for x, theirs in zip(self._x, message.tensors)]
        # Both apply the same difference, to the bit, whatever x is by then: so the sum stays.
        changes = self._mailbox.rounded(changes)
        for x, change in zip(self._x, changes):
            x.add_(change)
        self._mailbox.send(peer, ANSWER, changes)
        return True

    def part_from(self, peer: int) -> bool:
        """`peer` is lost or silent. Returns whether x has changed."""
        if peer not in self._mailbox.lost:
            return False  # a silent one still gets its question or answer, and the exchange ends late
        self._asked.discard(peer)
        answers = [message for message in self._mailbox.take_back(peer) if message.kind == ANSWER]
        for message in answers:
            for x, change in zip(self._x, message.tensors):
                x.sub_(change.to(x.device))
        return bool(answers)

    def begin_anew(self) -> None:
        """All ranks hold the same, nothing is under way."""


class AsynchronousPush:
    """Subgradient-push between two meetings: shares of x and w, which the receivers add.

    A rank whose w is below 1/2 does not push until it has received: with peers that are slow to send, x and w would
    become ever smaller, and a step ever longer beside them.

    Args:
        x (`Sequence[torch.Tensor]`): Flat buffers of this rank, changed in place.
        mailbox ([`WatchedMailbox`]): Of messages like `x`.
        topology ([`Topology`]): Who sends to whom.

    Attributes:
        weight (`float`): w of this rank.
    """

    def __init__(self, x: Sequence[torch.Tensor], mailbox: WatchedMailbox, topology: Topology):
        self._x, self._mailbox = list(x), mailbox
        self._topology = _Repaired(topology)
        self.weight = 1.0
        self.unanswered: set[int] = set()

    def send(self, number: int) -> None:
        """Pushes a share to each of the peers of this number."""
        peers = self._topology.without(self._mailbox.absent).out_peers(self._mailbox.rank, number)
        if not peers or self.weight < _LEAST_WEIGHT_TO_PUSH:
            return
        share = 1.0 / (len(peers) + 1)
        self.weight *= share
        for x in self._x:
            x.mul_(share)
        for peer in peers:
            rests = [x.clone() if narrow else x for x, narrow in zip(self._x, self._mailbox.narrows)]
            self._mailbox.send_sum(peer, MASS, rests, self.weight)
            for x, rest in zip(self._x, rests):
                if rest is not x:  # what the wire's precision took of the share stays here
                    x.add_(rest)

    def receive(self, message: Message) -> bool:
        """Adds mass; returns whether x has changed."""
        self._add([message])
        return True

    def part_from(self, peer: int) -> bool:
        """`peer` is lost or silent: what waits for it is taken back. Returns whether x has changed."""
        messages = [message for message in self._mailbox.take_back(peer) if message.kind == MASS]
        self._add(messages)
        if not self._mailbox.living and self.weight != 1.0:
            self._rescale()  # alone, only z counts
            return True
        return bool(messages)

    def begin_anew(self) -> None:
        """All ranks hold the same, nothing is under way."""
        self.weight = 1.0

    def _add(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.weight += message.weight
            for x, part in zip(self._x, message.tensors):
                x.add_(part.to(x.device))

    def _rescale(self) -> None:
        for x in self._x:
            x.div_(self.weight)
        self.weight = 1.0
