"""The failure detector: which peers take part, which are silent and which are lost."""

import logging
import time
from collections.abc import Callable, Collection, Sequence

from .connection import Message
from .exchange import PeerError
from .mailbox import Mailbox

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5  # a waiting rank checks this often whether it still has to wait
_MAX_PING_SECONDS = 0.5  # between two pings


class Membership:
    """Membership of the ranks of a [`Mailbox`], as this rank sees it.

    A peer is *lost*, for good, once its connection has closed. It is *silent* once nothing has arrived from it for
    `timeout_seconds` in which this rank expected something; it is taken back when it is heard again. Members are all
    other ranks. Ranks ping each other while they wait, so only ranks that stand still or compute fall silent.

    `receive` is called with each message, in the order sent by each peer, and `changed` with each peer that becomes
    lost or silent, or is taken back. If not `tolerant`, a peer that becomes lost or silent is an error.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        timeout_seconds: float,
        receive: Callable[[Message], None],
        changed: Callable[[int], None] = lambda peer: None,
        tolerant: bool = True,
    ):
        self.mailbox, self.rank, self.size = mailbox, mailbox.rank, mailbox.size
        self.timeout_seconds, self.tolerant = timeout_seconds, tolerant
        self._receive, self._changed = receive, changed
        self.lost: set[int] = set()
        self._silent_since: dict[int, float] = {}
        self.seconds_waiting = 0.0  # spent in `wait_for`
        self._expected_since: dict[int, float] = {}
        self._checked = self._pinged = time.monotonic()

    @property
    def connected(self) -> list[int]:
        """Peers that are not lost."""
        return [peer for peer in range(self.size) if peer != self.rank and peer not in self.lost]

    @property
    def silent(self) -> set[int]:
        """Silent peers."""
        return set(self._silent_since)

    @property
    def members(self) -> frozenset[int]:
        """Ranks that are neither lost nor silent, this one among them."""
        return frozenset(range(self.size)) - self.lost - self.silent

    def name(self, peers: Collection[int]) -> str:
        """Return peers as ranks of the default group: "Rank 3" or "Ranks 3, 5"."""
        ranks = ", ".join(str(self.mailbox.global_ranks[peer]) for peer in sorted(peers))
        return f"Rank {ranks}" if len(peers) == 1 else f"Ranks {ranks}"

    # Sending

    def end_step(self, step: int) -> None:
        """Note that this rank has taken its step `step`."""
        self.mailbox.step, self.mailbox.step_ended = step, time.monotonic()
        self.ping()

    def tell(self, peers: Collection[int], kind: int, numbers: Sequence[float], payload=None) -> None:
        """Post numbers, and a flat uint8 tensor if there is one, to several peers."""
        for peer in peers:
            self.mailbox.post(peer, kind, payload=payload, numbers=numbers)

    def ping(self) -> None:
        """Let the peers know from time to time that this rank is there, and how far it is."""
        now = time.monotonic()
        if now - self._pinged >= min(_MAX_PING_SECONDS, self.timeout_seconds / 5):
            self._pinged = now
            for peer in self.connected:
                self.mailbox.ping(peer)

    # Receiving

    def update(self, poll_seconds: float = 0.0, missing: Callable[[], Collection[int]] | None = None) -> None:
        """Receive the messages that have arrived, and note lost and returned peers. Wait up to `poll_seconds`.

        With `missing`, a peer that has left is lost only if it is still missing: others need nothing more from it.
        """
        died, left = self.mailbox.died, self.mailbox.left  # before collecting: the last messages of a peer count
        messages = self.mailbox.collect(poll_seconds)
        for peer, since in list(self._silent_since.items()):
            if self.mailbox.last_heard[peer] > since:
                self._take_back(peer)
        for message in messages:
            self._receive(message)
        self.lose(died | (left if missing is None else left.intersection(missing())))

    def wait_for(
        self, missing: Callable[[], Collection[int]], on_silent: Callable[[Collection[int]], None] | None = None
    ) -> None:
        """Receive messages until `missing()`, the peers that are waited for, is empty.

        `on_silent` is called with those of them that are silent; by default they are passed over. `missing` has to
        leave out lost peers.
        """
        self.update(missing=missing)
        began, poll = time.monotonic(), min(_POLL_SECONDS, self.timeout_seconds / 4)
        try:
            while waited_for := missing():
                if silent := self.expect(waited_for, poll + self.timeout_seconds / 2):
                    (on_silent or self.pass_over)(silent)
                self.update(poll, missing)
                self.ping()
        finally:
            self.seconds_waiting += time.monotonic() - began

    def expect(self, peers: Collection[int], max_gap_seconds: float) -> list[int]:
        """Expect messages from peers. Return those that have been silent for `timeout_seconds` since the first call.

        After a gap of more than `max_gap_seconds` between two calls this rank itself has stood still: it starts anew.
        """
        now = time.monotonic()
        if now - self._checked > max_gap_seconds:
            self._expected_since = {}
        self._checked = now
        self._expected_since = {peer: self._expected_since.get(peer, now) for peer in peers}
        heard = self.mailbox.last_heard
        return [p for p, since in self._expected_since.items() if now - max(since, heard[p]) > self.timeout_seconds]

    def reset(self) -> None:
        """Take back all silent peers: they were heard by other means, such as collectives."""
        self._silent_since, self._expected_since = {}, {}

    def pass_over(self, peers: Collection[int]) -> None:
        """Note peers as silent."""
        for peer in sorted(self.members.intersection(peers)):
            self._require_tolerance(peer, f"is silent for `timeout_seconds={self.timeout_seconds}`")
            self._silent_since[peer] = time.monotonic()
            logger.warning(
                f"{self.name([peer])} is silent for {self.timeout_seconds} s: {self.name([self.rank])} passes it over "
                "until it is heard again."
            )
            self._changed(peer)

    def lose(self, peers: Collection[int], reason: str | None = None) -> None:
        """Note peers as lost."""
        for peer in sorted(set(peers) - self.lost):
            how = reason or ("has died (its connection closed)" if peer in self.mailbox.died else "has left")
            self._require_tolerance(peer, how)
            self.lost.add(peer)
            self._silent_since.pop(peer, None)
            logger.warning(f"{self.name([peer])} {how}: {self.name([self.rank])} goes on with the others.")
            self._changed(peer)

    def _take_back(self, peer: int) -> None:
        del self._silent_since[peer]
        logger.warning(f"{self.name([peer])} is heard again: {self.name([self.rank])} takes it back.")
        self._changed(peer)

    def _require_tolerance(self, peer: int, how: str) -> None:
        if not self.tolerant:
            raise PeerError(
                f"The ranks of an inner group must stay equal, but {self.name([peer])} {how}, and only its peers "
                "know. See its log. Go on from the last checkpoint, or train without `inner_group`.",
                [self.mailbox.global_ranks[peer]],
            )
