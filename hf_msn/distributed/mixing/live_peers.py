"""Who is there, who sends to whom and whom to wait for, when ranks may die or stop: below [`OverlapGossip`]."""

import logging
import time
from collections.abc import Callable, Collection

from ..comm.exchange import PeerError
from ..comm.mailbox import Mailbox, Message
from ..topology import Topology

logger = logging.getLogger(__name__)

# Kinds of messages. All but MASS are small or rare. The step is the last one at which the sender had sent mass.
MASS, VIEW, PING, ARRIVED, PROPOSAL, CONSENT, DECISION, CONTRIBUTION, RESULT = range(9)

_LOOK_SECONDS = 0.5  # how often a waiting rank looks whether it is still right to wait
_KEPT_VIEWS = 16


class SendingPlan:
    """Whom each rank sends to at each step, as far as it has said: over the ranks that *it* takes for alive.

    Push-sum permits that ranks differ in this, since a sender splits only its own mass. A receiver goes by what the
    sender has said, so that nobody waits for mass that was sent elsewhere.
    """

    def __init__(self, topology: Topology):
        self._topology = topology
        self.everybody = frozenset(topology.alive)
        self._repaired = {self.everybody: topology}
        self._views = [[(0, self.everybody)] for _ in range(topology.world_size)]

    def announce(self, rank: int, step: int, view: frozenset[int]) -> None:
        """From `step` on `rank` sends to ranks in `view` only."""
        self._views[rank] = [*self._views[rank], (step, view)][-_KEPT_VIEWS:]

    def out_peers(self, rank: int, step: int) -> list[int]:
        known = [view for start, view in self._views[rank] if start <= step]
        view = known[-1] if known else self._views[rank][0][1]
        if view not in self._repaired:
            self._repaired[view] = self._topology.without(self.everybody - view)
        return self._repaired[view].out_peers(rank, step)

    def is_whole(self) -> bool:
        """Whether all ranks take all for alive."""
        return all(views[-1][1] == self.everybody for views in self._views)


class LivePeers:
    """The peers of one rank over a [`Mailbox`]: who is in view, how far each has come, and waiting for them.

    A peer whose connection closed is *lost*. One that is waited for and silent for `timeout_seconds` is *passed over*
    until it is heard again. Both are out of `view`, are not sent to and not waited for. A rank that waits lets all
    others know every now and then, so that only those that stand still or compute are silent.

    Args:
        mailbox ([`Mailbox`]): Started.
        topology ([`Topology`]): For all ranks.
        timeout_seconds (`float`): See above.
        take (`Callable`): Called with each message of kinds other than VIEW and PING, in the order sent.
        take_back (`Callable`): Called with each message of kind MASS that a lost peer had not received.
        disturb (`Callable`): Called when some rank does not take all ranks for alive any more.
        tolerant (`bool`): `False` raises an error where a peer would be lost or passed over.

    Attributes:
        view (`set[int]`): The ranks taken for alive, this one among them.
        sent (`int`): Number of this rank's sending steps so far: the next one's step.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        topology: Topology,
        timeout_seconds: float,
        take: Callable[[Message], None],
        take_back: Callable[[Message], None],
        disturb: Callable[[], None],
        tolerant: bool,
    ):
        self.mailbox, self.rank, self.size = mailbox, mailbox.rank, mailbox.size
        self.plan = SendingPlan(topology)
        self.timeout_seconds, self._tolerant = timeout_seconds, tolerant
        self._take, self._take_back, self._disturb = take, take_back, disturb
        self.view = set(range(self.size))
        self.lost: set[int] = set()
        self.passed: set[int] = set()
        self.sent = 0
        self.seconds_waiting = 0.0
        self.begin_at(0)

    def begin_at(self, step: int) -> None:
        """This rank goes on at `step`, with nothing sent before it under way."""
        self.sent = step
        self._arrived = [step - 1] * self.size  # the last step whose mass has arrived
        self._settled = [step - 1] * self.size  # the last step that needs no look any more
        self._lag = [0] * self.size  # how many steps a peer that was passed over is behind

    def settle(self) -> None:
        """All ranks in view are at the same step, and what was sent before it has arrived."""
        self._arrived = [max(arrived, self.sent - 1) for arrived in self._arrived]
        self._settled, self._lag = [self.sent - 1] * self.size, [0] * self.size

    def name(self, peers: Collection[int]) -> str:
        ranks = ", ".join(str(self.mailbox.global_ranks[peer]) for peer in sorted(peers))
        return f"rank {ranks}" if len(peers) == 1 else f"ranks {ranks}"

    def reachable(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank and peer not in self.lost]

    def tell(self, kind: int, numbers: Collection[float], peers: Collection[int] | None = None) -> None:
        for peer in self.reachable() if peers is None else peers:
            self.mailbox.post(peer, kind, step=self.sent - 1, numbers=tuple(numbers))

    # What arrives

    def look(self, timeout_seconds: float = 0.0) -> None:
        """Takes what has arrived, and notes who is gone. With a timeout waits until there is something."""
        if self.size == 1:
            return
        for message in self.mailbox.collect(timeout_seconds):
            self._handle(message)
        for peer in self.mailbox.gone - self.lost:
            self._lose(peer)
        for peer in self.lost:
            for message in self.mailbox.take_back(peer) if self.mailbox.num_waiting(peer) else ():
                if message.kind == MASS:
                    self._take_back(message)

    def _handle(self, message: Message) -> None:
        peer, step = message.sender, message.step
        if peer in self.passed:
            self._take_in(peer, step)
        if message.kind == MASS:
            self._arrived[peer] = max(self._arrived[peer], step)
            self._lag[peer] = min(self._lag[peer], max(0, self.sent - 1 - step))
        if message.kind == VIEW:
            view = frozenset(rank for rank in range(self.size) if message.numbers[rank])
            self.plan.announce(peer, step + 1, view)
            if view != self.plan.everybody:
                self._disturb()
            if self.rank not in view:
                self._ping(peer)  # this rank is alive
        elif message.kind != PING:
            self._take(message)

    def _lose(self, peer: int) -> None:
        how = "died (its connection closed)" if peer in self.mailbox.died else "left"
        if not self._tolerant:
            raise PeerError(
                f"The ranks of an inner group must stay equal, but {self.name([peer])} has {how} and only its peers "
                f"can know. Go on from the last checkpoint, or train without `inner_group`.",
                [self.mailbox.global_ranks[peer]],
            )
        self.lost.add(peer)
        self.passed.discard(peer)
        back = self.mailbox.take_back(peer)
        weight = sum(message.weight for message in back if message.kind == MASS)
        self._change_view(self.view - {peer})
        logger.warning(
            f"{self.name([peer]).capitalize()} has {how}: {self.name([self.rank])} goes on with "
            f"{self.name(self.view)} and takes back weight {weight:.3g} that had not been received."
        )
        for message in back:
            if message.kind == MASS:
                self._take_back(message)

    def _pass_over(self, peer: int) -> None:
        if not self._tolerant:
            raise PeerError(
                f"The ranks of an inner group must stay equal, but {self.name([peer])} has been silent for "
                f"`timeout_seconds={self.timeout_seconds}`. See its log; if it is only slow, give more seconds.",
                [self.mailbox.global_ranks[peer]],
            )
        self.passed.add(peer)
        self._change_view(self.view - {peer})
        logger.warning(
            f"{self.name([peer]).capitalize()} has been silent for {self.timeout_seconds} s: {self.name([self.rank])} "
            f"passes it over and goes on with {self.name(self.view)} until it is heard again."
        )

    def _take_in(self, peer: int, step: int) -> None:
        self.passed.discard(peer)
        # It goes on from where it stood: wait for the steps that it takes, not for those that it missed.
        self._lag[peer] = max(0, self.sent - 1 - step)
        self._settled[peer] = step
        self._change_view(self.view | {peer})
        logger.warning(
            f"{self.name([peer]).capitalize()} is heard again, {self._lag[peer]} steps behind: "
            f"{self.name([self.rank])} takes it back."
        )

    def _change_view(self, view: set[int]) -> None:
        self.view = set(view)
        self.plan.announce(self.rank, self.sent, frozenset(view))
        numbers = [float(rank in view) for rank in range(self.size)]
        self.tell(VIEW, numbers)
        if len(view) < self.size:
            self._disturb()

    def _ping(self, peer: int) -> None:
        if self.mailbox.num_waiting(peer) == 0:
            self.tell(PING, (), [peer])

    # Waiting

    def wait_for_mass(self, step: int) -> None:
        """Waits until all that was sent to this rank at a step <= `step` has arrived."""
        self.wait_for(lambda: self._missing(step))
        for peer in range(self.size):
            self._settled[peer] = max(self._settled[peer], step - self._lag[peer])

    def _missing(self, step: int) -> list[int]:
        missing = []
        for peer in self.view - {self.rank}:
            first = max(self._settled[peer], self._arrived[peer]) + 1
            steps = range(first, step - self._lag[peer] + 1)
            if any(self.rank in self.plan.out_peers(peer, s) for s in steps):
                missing.append(peer)
        return missing

    def wait_for(self, missing: Callable[[], Collection[int]]) -> None:
        """Takes what arrives until `missing()` is empty; those in it that are silent are passed over."""
        self.look()
        if not missing():
            return
        started = seen = pinged = time.monotonic()
        since: dict[int, float] = {}
        while waited_for := missing():
            since = {peer: since.get(peer, seen) for peer in waited_for}
            look = min(_LOOK_SECONDS, self.timeout_seconds / 4)
            self.look(look)
            now = time.monotonic()
            if now - seen > look + self.timeout_seconds / 2:
                since = {}  # this rank itself stood still, and knows nothing about the others
            seen = now
            if now - pinged > self.timeout_seconds / 4:
                pinged = now
                for peer in self.reachable():
                    self._ping(peer)
            for peer in missing():
                heard = max(since.get(peer, now), self.mailbox.last_heard[peer])
                if peer in self.view and now - heard > self.timeout_seconds:
                    self._pass_over(peer)
        self.seconds_waiting += time.monotonic() - started
