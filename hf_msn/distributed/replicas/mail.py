"""One message from every other replica at each of numbered occasions, when replicas may die: over a [`Mailbox`]."""

import logging
import time
from collections.abc import Collection

import torch
import torch.distributed as dist

from ..comm.exchange import PeerError
from ..comm.mailbox import Mailbox

logger = logging.getLogger(__name__)

_CONTENT, _PING = 0, 1
_DEFAULT_SECONDS = 1800.0  # as torch has it for groups
_LOOK_SECONDS = 0.5  # how often a waiting rank looks whether it is still right to wait


class ReplicaMail:
    """Sends bytes to all other replicas in the background and hands out what they have sent, by occasion.

    A peer is lost when its connection closes, or when it is waited for and silent for `timeout_seconds`; a rank that
    waits lets the others know now and then, so that only those that stand still or compute are silent. The connection
    to a lost one is cut, so that it learns of it. It stays lost.

    Args:
        group (`ProcessGroup`, *optional*): One rank of each replica.
        timeout_seconds (`float`, *optional*): See above; by default half an hour.
        tolerant (`bool`): Whether to go on without the lost ones. Otherwise losing one is an error.

    Attributes:
        live (`set[int]`): Places of the other replicas that are not lost.
        seconds_waiting (`float`): Spent waiting so far.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_seconds: float | None, tolerant: bool):
        self.timeout_seconds = _DEFAULT_SECONDS if timeout_seconds is None else timeout_seconds
        self._mailbox = Mailbox([], group, num_numbers=0, connect_seconds=self.timeout_seconds)
        self._tolerant = tolerant
        self.live = set(range(self._mailbox.size)) - {self._mailbox.rank}
        self.seconds_waiting = 0.0
        self._arrived: dict[int, dict[int, torch.Tensor]] = {peer: {} for peer in self.live}

    @property
    def bytes_sent(self) -> int:
        """What has left so far, with a header of 40 bytes for each message."""
        return self._mailbox.bytes_sent

    def start(self) -> "ReplicaMail":
        """Connects the replicas; all must call it."""
        self._mailbox.start()
        return self

    def close(self, at_once: bool = False) -> None:
        """Returns when the others have received what was posted, and ends the threads; `at_once` after an error."""
        self._mailbox.close(min(1.0, self.timeout_seconds) if at_once else self.timeout_seconds)

    def post(self, occasion: int, payload: torch.Tensor) -> None:
        """Sends `payload`, flat uint8 on the CPU, to all other replicas. It must not change afterwards."""
        self.look()
        for peer in self.live - self._mailbox.gone:
            self._mailbox.post_bytes(peer, _CONTENT, payload, step=occasion)

    def receive(self, occasion: int, keep: bool = False) -> dict[int, torch.Tensor]:
        """The payloads of that occasion by the sender's place; waits for those that are not there yet.

        Args:
            occasion (`int`): What was given to `post` there.
            keep (`bool`, *optional*, defaults to `False`): Whether they can be received once more.

        Raises:
            PeerError: If a peer is lost and this rank is not to go on without it.
        """
        self._wait(occasion)
        arrived = {
            peer: sent[occasion] if keep else sent.pop(occasion)
            for peer, sent in sorted(self._arrived.items())
            if occasion in sent
        }
        return {peer: payload for peer, payload in arrived.items() if peer in self.live}

    def put_back(self, occasion: int, payloads: dict[int, torch.Tensor]) -> None:
        """As if these had arrived."""
        for peer, payload in payloads.items():
            self._arrived[peer][occasion] = payload

    def look(self, timeout_seconds: float = 0.0) -> None:
        """Takes what has arrived, and notices who died. With a timeout waits until there is something.

        Who has left in good order is not lost before something is missing of it: it may have been through earlier.
        """
        for message in self._mailbox.collect(timeout_seconds):
            if message.kind == _CONTENT:
                self._arrived[message.sender][message.step] = message.tensors[0]
        if died := self._mailbox.died & self.live:
            self._lose(died, "died: its connection closed, or it has given this rank up as silent")

    def _wait(self, occasion: int) -> None:
        started = pinged = seen = time.monotonic()
        look = min(_LOOK_SECONDS, self.timeout_seconds / 4)
        since = started
        self.look()
        while missing := self._missing(occasion):
            if left := missing & self._mailbox.left:
                self.look()  # what it had sent before is here by now
                if left := left & self._missing(occasion):
                    self._lose(left, "left before the others were through")
                continue
            self.look(look)
            now = time.monotonic()
            if now - seen > look + self.timeout_seconds / 2:
                since = now  # this rank itself stood still, and knows nothing about the others
            seen = now
            if now - pinged > self.timeout_seconds / 4:
                pinged = now
                for peer in self.live - self._mailbox.gone:
                    if self._mailbox.num_waiting(peer) == 0:
                        self._mailbox.post(peer, _PING)
            silent = {
                peer
                for peer in self._missing(occasion)
                if now - max(since, self._mailbox.last_heard[peer]) > self.timeout_seconds
            }
            if silent:
                self._lose(silent, f"been silent for `timeout_seconds={self.timeout_seconds}`")
        self.seconds_waiting += time.monotonic() - started

    def _missing(self, occasion: int) -> set[int]:
        return {peer for peer in self.live if occasion not in self._arrived[peer]}

    def _lose(self, peers: Collection[int], how: str) -> None:
        global_ranks = self._mailbox.global_ranks
        ranks = sorted(global_ranks[peer] for peer in peers)
        names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        own = global_ranks[self._mailbox.rank]
        if not self._tolerant:
            raise PeerError(
                f"All replicas must stay to the end, but {names} has {how}, as rank {own} sees it. See its log; if it "
                "is only slow, give more `timeout_seconds`. With `on_lost_replica='continue'` the others go on.",
                ranks,
            )
        for peer in peers:
            self.live.discard(peer)
            self._arrived[peer].clear()
            if peer not in self._mailbox.gone:
                self._mailbox.cut(peer)
            self._mailbox.take_back(peer)
        logger.warning(f"{names.capitalize()} has {how}: rank {own} goes on with {len(self.live)} other replicas.")
