"""Collectives that go on with the ranks that are left, and the store of messages that their groups are made by."""

import datetime
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from .agreement import Agreement
from .connection import close_pair
from .exchange import Exchange, PeerError
from .mailbox import Mailbox
from .membership import Membership

_CLOSE_SECONDS = 5.0
_POLL_SECONDS = 0.25  # a rank in a collective checks this often whether the others are there

Result = TypeVar("Result")


class SurvivorExchange(Exchange):
    """An [`Exchange`] that goes on without the ranks that die, leave or fall silent for `timeout_seconds`.

    From `connect` to `close` the collectives run over gloo groups of its own. When a rank is lost, the others make a
    new one by the messages of a [`Mailbox`]: neither torch's store nor a group of torch has to outlive the rank.
    A lost rank stays lost. Arguments and errors are those of [`Exchange`]; `timeout_seconds` is needed.

    Attributes:
        absent_ranks (`list[int]`): Lost ranks, as ranks of the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_seconds: float):
        super().__init__(group, timeout_seconds)
        self._all_ranks, self._members = super().global_ranks, list(range(self.size))
        self.absent_ranks: list[int] = []
        self._mailbox: Mailbox | None = None

    @property
    def global_ranks(self) -> list[int]:
        return [self._all_ranks[member] for member in self._members]

    def check_devices(self, tensors: Sequence[torch.Tensor]) -> None:
        super().check_devices(tensors)
        if self.size == 1:
            return
        config = dist.get_backend_config(self.group)
        for device in sorted({t.device.type for t in tensors if f"{t.device.type}:gloo" not in config}):
            raise ValueError(
                "`on_lost_rank='continue'` needs gloo, whose collectives end when a rank is lost, but the group sends "
                f"tensors on '{device}' by another backend ({config}). Pass `group=dist.new_group(backend='gloo')`."
            )

    def connect(self) -> None:
        """Connect the ranks by messages and make a group. Every rank must call it."""
        if self.size == 1:
            return
        numbers, seconds = 4 + self.size, self.timeout_seconds
        self._mailbox = Mailbox([], self.group, num_numbers=numbers, connect_seconds=seconds)
        self._peers = Membership(self._mailbox, self.timeout_seconds, lambda message: self._agreement.receive(message))
        self._agreement = Agreement(self._peers, lambda _: None, on_silent="lose")
        self._group_of_all = self.group  # `close` puts it back, also where a peer does not come
        self._mailbox.start()
        self.group = None
        self.repeat("entering", lambda: None)
        if self.absent_ranks:
            raise PeerError(
                f"All ranks of the group must be there when entering, but {self.absent_ranks} died or were silent "
                f"for `timeout_seconds={self.timeout_seconds}`. See their logs, and start again.",
                self.absent_ranks,
            )

    def close(self) -> None:
        """Leave the others, which need nothing more from this rank."""
        if self._mailbox is not None:
            self._mailbox.close(min(_CLOSE_SECONDS, self.timeout_seconds))
            self._mailbox, self.group = None, self._group_of_all

    def note_step(self, step: int) -> None:
        """Note the last optimizer step, and let the others know that this rank is there."""
        if self._mailbox is not None:
            self._peers.end_step(step)

    def repeat(self, event: str, operation: Callable[[], Result]) -> Result:
        """Run an operation over the ranks that are left, again and again until it has succeeded on all of them.

        Raises:
            PeerError: If a rank comes to another event, or the others have gone on without this rank.
        """
        if self._mailbox is None:
            return operation()
        waited = self._peers.seconds_waiting

        def attempt(members: list[int]) -> Result:
            if members != self._members or (self.group is None and len(members) > 1):
                self._regroup(members)
            return operation()

        try:
            return self._agreement.repeat(event, attempt)
        finally:
            self.seconds_waiting += self._peers.seconds_waiting - waited

    def meet(self, event: str, steps: int | None, device: torch.device) -> None:
        """Compare nothing where `repeat` has compared the events."""
        if self._mailbox is None:
            super().meet(event, steps, device)

    def _regroup(self, members: list[int]) -> None:
        self._members, self.size, self.rank = members, len(members), members.index(self._peers.rank)
        self.absent_ranks = [rank for place, rank in enumerate(self._all_ranks) if place not in members]
        self.group = None
        if self.size == 1:
            return
        timeout = datetime.timedelta(seconds=self.timeout_seconds)
        self._store = _MessageStore(self._agreement)  # referred to, because the group calls its methods
        try:
            self.group = dist.ProcessGroupGloo(self._store, self.rank, self.size, timeout)
        except RuntimeError as error:
            raise self._peer_error("making of a group", error) from error

    def _note_arrival(self, name: str) -> None:
        if self._mailbox is None:
            super()._note_arrival(name)

    def _wait(self, work, began: float) -> None:
        if self._mailbox is None:
            super()._wait(work, began)
            return
        done, peers = threading.Event(), self._peers
        work.get_future().add_done_callback(lambda _: done.set())
        others = [member for member in self._members if member != peers.rank]
        poll = min(_POLL_SECONDS, self.timeout_seconds / 4)
        while not done.wait(poll):
            peers.update()
            if silent := peers.expect(others, poll + self.timeout_seconds / 2):
                self._agreement.lose(silent)
            if peers.lost.intersection(others):
                raise RuntimeError("a rank was lost meanwhile")
            peers.ping()
        work.wait()

    def _peer_error(self, name: str, error: RuntimeError) -> PeerError:
        if self._mailbox is None:
            return super()._peer_error(name, error)
        ranks, group, self.group = self.global_ranks, self.group, None
        if group is not None:  # what still waits in it would wait for this rank
            for place in range(self.size):
                if place != self.rank:
                    close_pair(group, place)
        lost = [self._all_ranks[peer] for peer in sorted(self._peers.lost)]
        return PeerError(f"The {name} over the ranks {ranks} failed on rank {dist.get_rank()}: {error}", lost)


class _MessageStore(dist.Store):
    """A store whose keys are shared by the messages of an attempt of an agreement."""

    def __init__(self, agreement: Agreement):
        super().__init__()
        self._agreement = agreement

    def set(self, key: str, value: bytes) -> None:
        self._agreement.share(key, value)

    def get(self, key: str) -> bytes:
        return self._agreement.shared(key)

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        for key in keys:
            self.get(key)
