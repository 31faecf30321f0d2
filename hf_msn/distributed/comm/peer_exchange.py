"""Messages between peers of one group, with the deadline, the account and the errors of [`Exchange`]."""

import datetime
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ..subgroups import subgroup
from .exchange import Exchange, _arrivals, _bytes

_FIRST_TAG = 4100  # away from 0, which others who use the group are likely to take

Messages = Mapping[int, Sequence[torch.Tensor]]  # by the peer's place in the group


class PeerExchange(Exchange):
    """An [`Exchange`] that can also send to single peers and receive from them.

    Ranks that talk to peers only are not in lockstep: one that waits for the missing rank has itself not arrived in
    the eyes of a third. Named are therefore those that are furthest behind, for whom all others wait; and after them,
    where a connection broke before the deadline, its other end, which has died too or has given up.

    gloo moves bytes over a connection in one direction at a time: after `connect`, what goes from a higher place to a
    lower one travels over a second group of the same ranks, so that two that exchange need no more time than one way.

    Arguments and errors are those of [`Exchange`].
    """

    _downward: dist.ProcessGroup | None = None
    _broken_off_by: int | None = None  # place of the peer whose connection broke

    def connect(self) -> None:
        """Makes the second group, where gloo is the backend of CPU tensors. Every rank must call it."""
        if self.size > 1 and "cpu:gloo" in dist.get_backend_config(self.group):
            seconds = self.timeout_seconds
            timeout = None if seconds is None else datetime.timedelta(seconds=seconds)
            self._downward = subgroup(self.global_ranks, backend="gloo", timeout=timeout, name="downward")

    def _group_for(self, tensor: torch.Tensor, goes_down: bool) -> dist.ProcessGroup | None:
        return self._downward if goes_down and tensor.is_cpu and self._downward is not None else self.group

    @torch.no_grad()
    def send_and_receive(self, sends: Messages, receives: Messages) -> None:
        """Sends tensors to peers and fills others with what peers send; returns when both is done.

        Every rank must call it equally often, also one that has no peer this time, or it would count as missing.
        The first tensor sent to a peer arrives in the first one that this peer fills from here, and so on.

        Args:
            sends (`Mapping[int, Sequence[Tensor]]`): What to send, by the receiver's place in the group. Contiguous.
            receives (`Mapping[int, Sequence[Tensor]]`): What to fill, by the sender's place in the group. Contiguous.

        Raises:
            PeerError: If a peer died, or did not come before the deadline.
        """
        if self.size == 1:
            return
        started, waited_for = time.monotonic(), None
        ranks = self.global_ranks
        places = [place for messages in (receives, sends) for place, tensors in messages.items() for _ in tensors]
        operations = [
            dist.P2POp(kind, tensor, ranks[place], self._group_for(tensor, goes_down), _FIRST_TAG + number)
            for kind, messages in ((dist.irecv, receives), (dist.isend, sends))
            for place, tensors in messages.items()
            for goes_down in [(place < self.rank) == (kind is dist.isend)]
            for number, tensor in enumerate(tensors)
        ]
        # Together, as NCCL needs it, or one by one: then it is known whose connection is broken.
        one_by_one = all(operation.tensor.is_cpu for operation in operations)
        batches = [[operation] for operation in operations] if one_by_one else [operations]
        if len(batches) != len(places):
            places = [None] * len(batches)
        try:
            self._note_arrival()
            works = []
            for place, batch in zip(places, batches):
                waited_for = place
                works += [(place, work) for work in dist.batch_isend_irecv(batch)]
            for place, work in works:
                waited_for = place
                self._wait(work, started)
        except RuntimeError as error:
            in_time = self.timeout_seconds is not None and time.monotonic() - started < self.timeout_seconds
            self._broken_off_by = waited_for if in_time else None
            raise self._peer_error("an exchange with peers", error) from error
        finally:
            self.seconds_waiting += time.monotonic() - started
        self.bytes_sent += sum(_bytes(tensor) for tensors in sends.values() for tensor in tensors)

    def _missing_ranks(self) -> list[int] | None:
        arrivals = self._arrivals_of_all()
        if arrivals is None:
            return None
        least = min(arrivals.values())
        behind = least < _arrivals.get(self._store_key, 0)
        missing = [rank for rank, arrived in arrivals.items() if behind and arrived == least]
        if self._broken_off_by is not None and self.global_ranks[self._broken_off_by] not in missing:
            missing.append(self.global_ranks[self._broken_off_by])
        return missing
