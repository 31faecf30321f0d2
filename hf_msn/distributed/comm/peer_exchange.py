"""Messages between peers of one group, with the deadline, the account and the errors of [`Exchange`]."""

import datetime
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ..subgroups import subgroup
from .exchange import Exchange, num_bytes

_FIRST_TAG = 4100  # far from 0, which other users of the group are likely to take

Messages = Mapping[int, Sequence[torch.Tensor]]  # by the peer's place in the group


class PeerExchange(Exchange):
    """An [`Exchange`] that also sends to single peers and receives from them.

    Ranks that talk to peers only are not in lockstep: a rank that waits for the missing one has not arrived either, as
    a third rank sees it. Errors therefore name the ranks that are furthest behind, and after them the other end of a
    connection that broke before the deadline: it has died as well, or has given up.

    gloo moves bytes over a connection in one direction at a time. After `connect`, messages from a higher place to a
    lower one travel over a second group of the same ranks, so that an exchange takes no longer than one direction.

    Arguments and errors are those of [`Exchange`].
    """

    _downward: dist.ProcessGroup | None = None
    _broken_off_by: int | None = None  # place of the peer whose connection broke

    def connect(self) -> None:
        """Make the second group, where gloo is the backend of CPU tensors. Every rank must call it."""
        if self.size > 1 and "cpu:gloo" in dist.get_backend_config(self.group):
            seconds = self.timeout_seconds
            timeout = None if seconds is None else datetime.timedelta(seconds=seconds)
            self._downward = subgroup(self.global_ranks, backend="gloo", timeout=timeout, name="downward")

    @torch.no_grad()
    def send_and_receive(self, sends: Messages, receives: Messages) -> None:
        """Send tensors to peers and fill tensors with those that peers send. Return when both are done.

        Every rank must call it equally often, also without a peer, or it would count as missing. The first tensor sent
        to a peer arrives in the first tensor that the peer fills from this rank, and so on. Tensors are contiguous.
        """
        if self.size == 1:
            return
        began, waited_for = time.monotonic(), None
        operations: list[tuple[int, dist.P2POp]] = []
        for kind, messages in ((dist.irecv, receives), (dist.isend, sends)):
            for place, tensors in messages.items():
                goes_down = (place < self.rank) == (kind is dist.isend)
                for number, tensor in enumerate(tensors):
                    group = self._downward if goes_down and tensor.is_cpu and self._downward else self.group
                    peer = self.global_ranks[place]
                    operations.append((place, dist.P2POp(kind, tensor, peer, group, _FIRST_TAG + number)))
        # All at once, as NCCL needs it, or one by one on the CPU, to know whose connection broke.
        batches = [(place, [operation]) for place, operation in operations]
        if operations and not all(operation.tensor.is_cpu for _, operation in operations):
            batches = [(None, [operation for _, operation in operations])]
        try:
            self._note_arrival()
            works = []
            for place, batch in batches:
                waited_for = place
                works += [(place, work) for work in dist.batch_isend_irecv(batch)]
            for place, work in works:
                waited_for = place
                self._wait(work, began)
        except RuntimeError as error:
            in_time = self.timeout_seconds is not None and time.monotonic() - began < self.timeout_seconds
            self._broken_off_by = waited_for if in_time else None
            raise self._peer_error("exchange with peers", error) from error
        finally:
            self.seconds_waiting += time.monotonic() - began
        self.bytes_sent += sum(num_bytes(tensor) for tensors in sends.values() for tensor in tensors)

    def _missing_ranks(self) -> list[int] | None:
        counts = self._counts_of_all()
        if counts is None:
            return None
        least = min(counts.values())
        missing = [rank for rank, count in counts.items() if count == least < self._count]
        if self._broken_off_by is not None and self.global_ranks[self._broken_off_by] not in missing:
            missing.append(self.global_ranks[self._broken_off_by])
        return missing
