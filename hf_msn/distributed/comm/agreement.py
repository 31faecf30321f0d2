"""The agreement protocol: ranks that step at their own pace agree on the members of a common result, and take it."""

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from .connection import Message
from .exchange import PeerError
from .membership import Membership

# Kinds of messages. Users of an agreement number their kinds from 0.
HERE, PART, DONE, AGAIN, RESULT, VALUE, LOST = range(100, 107)
_LOST, _CONNECTED, _MEMBER = 0.0, 1.0, 2.0  # how a rank sees another one

Contribution = tuple[float, torch.Tensor]  # a weight, and a flat uint8 tensor


class _NewAttempt(Exception):
    """A member was lost or passed over, or another member has begun a new attempt."""


class _Ended(Exception):
    """Another member has ended the agreement, in which this one has succeeded too."""


class Agreement:
    """Numbered agreements among the ranks of a [`Membership`], in attempts, because ranks may be lost meanwhile.

    In an attempt every rank

    1. sends HERE, with its view of the other ranks. Connections are first in, first out: with a peer's HERE all its
       earlier messages have arrived. Ranks go on once all members have sent the same view, else they try again with
       the members that all of them see.
    2. takes the result by collectives if all ranks are members, else by messages: each member sends its PART to all
       others, and each computes the same result from the same parts.
    3. sends DONE, with its success. The agreement ends if all members succeeded, else they try again.

    A rank that was passed over and comes later takes the RESULT of the others. Messages of other kinds are passed on;
    those that arrive between 1 and the end belong to the time after it, and are held back until then.

    `peers` hands its messages to `receive`. By `on_silent` a silent rank is an error ("raise"), lost, and told so by
    LOST ("lose"), or passed over ("pass over").
    """

    def __init__(self, peers: Membership, pass_on: Callable[[Message], None], on_silent: str):
        self._peers, self._pass_on, self._on_silent = peers, pass_on, on_silent
        self._lost_to = False
        self._event: tuple[float, ...] = ()  # a number for what this rank comes to, compared in `repeat`
        self._number = self._attempt = 0
        self._has_succeeded = False  # in the last attempt of `repeat`
        self._heard: dict[tuple[int, int, int], dict[int, Message]] = {}
        self._excluded: set[int] = set()  # silent to some member of this agreement
        self._results: dict[int, torch.Tensor] = {}  # of this agreement and later ones, reached without this rank
        self._last_result: tuple[int, torch.Tensor | None, int] = -1, None, 0  # with the rank that sends it
        self._holds_back, self._held = False, []
        self._collectives_work = True

    @property
    def members(self) -> list[int]:
        """Ranks that take part, this one among them."""
        peers = self._peers
        members = {peers.rank, *peers.connected} if self._on_silent == "raise" else peers.members
        return sorted(members - self._excluded)

    @property
    def arrived(self) -> dict[int, int]:
        """Peers that have come to this agreement or a later one, and the last step that they took before its end."""
        messages = [heard.values() for (kind, _, _), heard in self._heard.items() if kind == HERE]
        return {message.sender: message.step for heard in messages for message in heard}

    def receive(self, message: Message) -> None:
        """Take a message of an agreement; pass on another one, or hold it back."""
        if message.kind < HERE:
            self._held.append(message) if self._holds_back else self._pass_on(message)
            return
        number, attempt = int(message.numbers[0]), int(message.numbers[1])
        if message.kind == RESULT:
            if number >= self._number:
                self._results[number] = message.tensors[0]
        elif message.kind == LOST:
            self._lost_to = True
            raise PeerError(
                f"{self._peers.name([message.sender])} goes on without {self._peers.name([self._peers.rank])}, which "
                f"was silent for `timeout_seconds={self._peers.timeout_seconds}`. Allow more seconds."
            )
        elif message.kind == VALUE:
            if number >= self._number:
                key, _, value = bytes(message.tensors[0].tolist()).partition(b"\0")
                self._heard.setdefault((VALUE, number, attempt), {})[key.decode()] = value
        elif number >= self._number:
            self._heard.setdefault((message.kind, number, attempt), {})[message.sender] = message
        elif message.kind == HERE and number == self._last_result[0] and self._last_result[2] in self._peers.lost:
            self._send_result([message.sender])

    def reach(
        self,
        by_collectives: Callable[[], Any],
        contribute: Callable[[], Contribution],
        combine: Callable[[list[Contribution]], torch.Tensor],
        finish: Callable[[torch.Tensor | None], None],
        unanswered: Callable[[], Collection[int]] = lambda: (),
    ) -> None:
        """Bring the members together and take a common result.

        If all ranks are members they call `by_collectives`, again in a new attempt. Else the result is what `combine`
        makes of the contributions, in the order of the ranks. `finish` is called once, with the result, or `None`
        after collectives. Before it takes part, this rank waits for the peers that `unanswered` returns.
        """
        self._peers.expect((), self._peers.timeout_seconds)  # count the silence of peers from here
        while True:
            try:
                self._wait_for(unanswered)
                is_whole = self.agree()
                result = self._results.get(self._number)
                if result is None:
                    result = self._take_result(is_whole, by_collectives, contribute, combine)
                break
            except _NewAttempt:
                continue
        self.end(lambda: finish(result), result)

    def agree(self) -> bool:
        """Wait until all members have sent the same view. Return whether collectives over all ranks can be used.

        `end` has to follow. Where the result of the others is there already, return at once.
        """
        while self._number not in self._results:
            try:
                return self._compare_views()
            except _NewAttempt:
                continue
        return False

    def repeat(self, event: str, operation: Callable[[list[int]], Any]) -> Any:
        """Let the members run `operation(members)` until it succeeds on all of them. Return this rank's result.

        The operation uses collectives among the members, and raises a [`PeerError`] where they fail.

        Raises:
            PeerError: If a rank comes to another event, the operation fails though no member is lost, or the other
                ranks go on without this one.
        """
        self._event = (float(zlib.crc32(event.encode())),)
        self._peers.expect((), self._peers.timeout_seconds)
        failed: list[int] = []
        result = None
        while True:
            try:
                self.agree()
                members, error, self._has_succeeded = self.members, None, False
                try:
                    result = operation(members)
                except PeerError as caught:
                    error = caught
                if error is not None and (self._lost_to or failed == members):
                    raise error
                self._has_succeeded = error is None
                done = self._gather(DONE, float(error is None), needs_all=False)
            except _NewAttempt:
                continue
            except _Ended:  # a member that failed was lost before it could tell all others
                break
            if error is None and all(message.numbers[2] for message in done.values()):
                break
            failed = members
            self._attempt += 1
        self._has_succeeded = False
        self.end(lambda: None)
        return result

    def share(self, key: str, value: bytes) -> None:
        """Send a value to the other members, for this attempt."""
        payload = torch.tensor(list(key.encode() + b"\0" + value), dtype=torch.uint8)
        others = [member for member in self.members if member != self._peers.rank]
        self._peers.tell(others, VALUE, (self._number, self._attempt), payload)
        self._heard.setdefault((VALUE, self._number, self._attempt), {})[key] = value

    def shared(self, key: str) -> bytes:
        """Wait for the value that a member shares in this attempt."""
        values, members = self._heard.setdefault((VALUE, self._number, self._attempt), {}), self.members
        others = [member for member in members if member != self._peers.rank]
        self._wait_for(lambda: [] if key in values or self.members != members else others)
        if key not in values:
            raise PeerError("A rank was lost while the ranks that are left made a group.")
        return values[key]

    def lose(self, silent: Collection[int]) -> None:
        """Go on without silent peers, and tell them, should they come back."""
        peers = self._peers
        peers.tell(silent, LOST, (self._number, self._attempt))
        peers.lose(silent, f"is silent for `timeout_seconds={peers.timeout_seconds}`")

    def end(self, finish: Callable[[], None], result: torch.Tensor | None = None) -> None:
        """End this agreement: call `finish`, then pass on the messages that were held back."""
        finish()
        first, is_known = self.members[0], self._number in self._results
        self._last_result = self._number, result, first
        if first == self._peers.rank and not is_known:
            self._send_result(set(self._peers.connected) - set(self.members))
        self._number, self._attempt, self._excluded = self._number + 1, 0, set()
        self._heard = {key: heard for key, heard in self._heard.items() if key[1] >= self._number}
        self._results = {number: result for number, result in self._results.items() if number >= self._number}
        self._release()

    def _compare_views(self) -> bool:
        peers, me = self._peers, self._peers.rank
        self._release()
        members = self.members
        view = [_MEMBER if p in members else _LOST if p in peers.lost else _CONNECTED for p in range(peers.size)]
        heard = self._gather(HERE, float(self._collectives_work), numbers=[*view, *self._event])
        if self._number in self._results:
            return False
        views = {peer: list(message.numbers[3 : 3 + peers.size]) for peer, message in heard.items()}
        if others := [peer for peer, seen in views.items() if seen[me] == _LOST]:
            raise PeerError(
                f"All living ranks must reach one another, but {peers.name(others)} has lost {peers.name([me])} and "
                "goes on without it. Go on from the last checkpoint.",
                [peers.mailbox.global_ranks[peer] for peer in others],
            )
        event = slice(3 + peers.size, 3 + peers.size + len(self._event))
        if others := [peer for peer, message in heard.items() if message.numbers[event] != self._event]:
            raise PeerError(
                f"All ranks must come to the same exchange, but {peers.name(others)}, after {heard[others[0]].step} "
                f"optimizer steps, and {peers.name([me])}, after {peers.mailbox.step}, come to different ones. Let "
                "every rank take the same number of steps.",
                [peers.mailbox.global_ranks[peer] for peer in others],
            )
        for seen in views.values():
            for peer in peers.connected:
                if seen[peer] == _LOST:  # lost to one is lost to all, even where only one connection has failed
                    if self._on_silent == "lose":
                        peers.tell([peer], LOST, (self._number, self._attempt))
                        peers.lose([peer], "is lost to another rank")
                        continue
                    peers.mailbox.cut(peer)
                    peers.lose([peer])
            self._excluded |= {peer for peer in range(peers.size) if seen[peer] == _CONNECTED}
        if me in self._excluded:
            self._excluded.remove(me)
            self._wait_for(lambda: [] if self._number in self._results else peers.members.intersection(views))
        elif self.members == members and all(seen == view for seen in views.values()):
            self._holds_back = True
            works = self._collectives_work and all(message.numbers[2] for message in heard.values())
            return works and len(members) == peers.size
        self._attempt += 1
        raise _NewAttempt

    def _take_result(self, is_whole, by_collectives, contribute, combine) -> torch.Tensor | None:
        result, is_good = None, True
        if is_whole:
            try:
                by_collectives()
            except PeerError:
                if not self._peers.tolerant:
                    raise
                is_good = self._collectives_work = False
        else:
            weight, payload = contribute()
            parts = self._gather(PART, weight, payload=payload)
            contributions = {peer: (part.numbers[2], part.tensors[0]) for peer, part in parts.items()}
            contributions[self._peers.rank] = weight, payload
            if is_good := sorted(contributions) == self.members:
                result = combine([contribution for _, contribution in sorted(contributions.items())])
        # A rank that is lost or silent by now has given all that is needed, or some rank has failed.
        done = self._gather(DONE, float(is_good), needs_all=False)
        if not is_good or not all(message.numbers[2] for message in done.values()):
            self._attempt += 1
            raise _NewAttempt
        return result

    def _gather(
        self, kind: int, value: float, *, numbers: Sequence[float] = (), payload=None, needs_all: bool = True
    ) -> dict[int, Message]:
        """Send to the other members and return their messages; some are missing where members were lost meanwhile."""
        peers, attempt = self._peers, self._attempt
        members = [peer for peer in self.members if peer != peers.rank]
        audience = peers.connected if kind == HERE else members
        peers.tell(audience, kind, (self._number, attempt, value, *numbers), payload)
        heard = self._heard.setdefault((kind, self._number, attempt), {})

        def has_ended() -> bool:
            return self._has_succeeded and any(
                there == HERE and number > self._number and not found.keys().isdisjoint(members)
                for (there, number, _), found in self._heard.items()
            )

        def missing() -> list[int]:
            for (_, number, later), found in self._heard.items():
                if number == self._number and later > self._attempt and found.keys() & set(members):
                    self._attempt = later
            if self._attempt > attempt or self._number in self._results or has_ended():
                return []
            present = self.members if needs_all else peers.members
            return [peer for peer in members if peer in present and peer not in heard]

        self._wait_for(missing, needs_all)
        if has_ended():
            raise _Ended
        if self._attempt > attempt:
            raise _NewAttempt
        return {peer: heard[peer] for peer in members if peer in heard}

    def _wait_for(self, missing: Callable[[], Collection[int]], needs_all: bool = True) -> None:
        rules = {"lose": self.lose, "pass over": self._peers.pass_over}
        on_silent = rules.get(self._on_silent, self._fail if needs_all else self._peers.pass_over)
        self._peers.wait_for(lambda: [peer for peer in missing() if peer not in self._peers.lost], on_silent)

    def _fail(self, silent: Collection[int]) -> None:
        peers = self._peers
        self._attempt += 1
        peers.tell(peers.connected, AGAIN, (self._number, self._attempt))  # so that nobody goes on with this HERE
        raise PeerError(
            f"All living ranks must come to a `sync`, but {peers.name(silent)} is silent for `timeout_seconds="
            f"{peers.timeout_seconds}`, as {peers.name([peers.rank])} sees it: it hangs, is stopped, or takes longer "
            "than that for a step. See its log; to wait on, call `sync()` again.",
            [peers.mailbox.global_ranks[peer] for peer in silent],
        )

    def _send_result(self, late: Collection[int]) -> None:
        """Send the last result to ranks that were passed over."""
        number, result, _ = self._last_result
        if result is not None:
            self._peers.tell(late, RESULT, (number, 0), result)

    def _release(self) -> None:
        self._holds_back, held, self._held = False, self._held, []
        for message in held:
            self._pass_on(message)
