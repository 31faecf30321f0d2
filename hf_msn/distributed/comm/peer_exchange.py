"""Messages between peers of one group, with the deadline, the account and the errors of [`Exchange`]."""

import atexit
import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from ..subgroups import subgroup
from .exchange import Exchange, PeerError, num_bytes

_FIRST_TAG = 4100  # far from 0, which other users of the group are likely to take
_NUM_TAGS = 8  # per object
_MIXES, _LEAVES, _FAILED = range(3)  # notes

# Messages of exchanges that failed. Others may wait for them, and torch sends a message only while it is referred to.
_unsent: list = []
atexit.register(_unsent.clear)  # what refers to a group must not outlive the interpreter

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
    _first_tag = _FIRST_TAG
    _broken_off_by: int | None = None  # place of the peer whose connection broke

    def connect(self) -> None:
        """Make the second group, where gloo is the backend of CPU tensors. Every rank must call it."""
        if self.size > 1 and "cpu:gloo" in dist.get_backend_config(self.group):
            seconds = self.timeout_seconds
            timeout = None if seconds is None else datetime.timedelta(seconds=seconds)
            self._downward = subgroup(self.global_ranks, backend="gloo", timeout=timeout, name="downward")
            # Lockstep gives all ranks the same number. What was left of an exchange that failed has other tags.
            store, group = dist.distributed_c10d._get_default_store(), (self.group or dist.group.WORLD).group_name
            self._first_tag = _FIRST_TAG + _NUM_TAGS * store.add(f"hf_msn/peers/{group}/opened/{self.rank}", 1)

    @torch.no_grad()
    def send_and_receive(self, sends: Messages, receives: Messages) -> None:
        """Send tensors to peers and fill tensors with those that peers send. Return when both are done.

        Every rank must call it equally often, also without a peer, or it would count as missing. The first tensor sent
        to a peer arrives in the first tensor that the peer fills from this rank, and so on. Tensors are contiguous.
        """
        if self.size == 1:
            return
        self._run_operations("exchange with peers", _MIXES, sends, receives)
        self.bytes_sent += sum(num_bytes(tensor) for tensors in sends.values() for tensor in tensors)

    def announce_collective(self, to: Sequence[int], sources: Sequence[int]) -> None:
        """Tell the peers of the next exchange that this rank goes to a collective, and check that they do, too."""
        if self.size > 1:
            self._run_operations("collective", _LEAVES, dict.fromkeys(to, ()), dict.fromkeys(sources, ()))

    def announce_failure(self, error: PeerError) -> None:
        """Tell the others, of which each may wait for this rank in some exchange, that it does not come, and why."""
        others = [place for place in range(self.size) if place != self.rank]
        with contextlib.suppress(RuntimeError):  # they may be gone
            _unsent.append(self._launch_notes(_FAILED, others, (), *error.ranks[:1]))

    def _run_operations(self, name: str, note: int, sends: Messages, receives: Messages) -> None:
        began, waited_for = time.monotonic(), None
        operations = [
            (place, self._operation(dist.irecv if messages is receives else dist.isend, tensor, place, number))
            for messages in (receives, sends)
            for place, tensors in messages.items()
            for number, tensor in enumerate(tensors)
        ]
        # All at once, as NCCL needs it, or one by one on the CPU, to know whose connection broke.
        batches = [(place, [operation]) for place, operation in operations]
        if operations and not all(operation.tensor.is_cpu for _, operation in operations):
            batches = [(None, [operation for _, operation in operations])]
        try:
            self._note_arrival(name)
            peers = list(dict.fromkeys([*receives, *sends]))  # a message is sent once the peer is ready to receive it
            works, notes = self._launch_notes(note, peers, peers)
            for place, batch in batches:
                waited_for = place
                works += [(place, work) for work in dist.batch_isend_irecv(batch)]
            for number, (place, work) in enumerate(works):
                waited_for = place
                self._wait(work, began)
                if number < len(notes) and notes[place][0].item() != note:
                    _unsent.append(works)
                    raise self._note_error(place, *notes[place].tolist())
        except PeerError:
            raise
        except RuntimeError as error:
            in_time = self.timeout_seconds is not None and time.monotonic() - began < self.timeout_seconds
            self._broken_off_by = waited_for if in_time else None
            raise self._peer_error(name, error) from error
        finally:
            self.seconds_waiting += time.monotonic() - began

    def _operation(self, kind: Callable, tensor: torch.Tensor, place: int, number: int) -> dist.P2POp:
        goes_down = (place < self.rank) == (kind is dist.isend)
        group = self._downward if goes_down and tensor.is_cpu and self._downward else self.group
        return dist.P2POp(kind, tensor, self.global_ranks[place], group, self._first_tag + number)

    def _launch_notes(
        self, note: int, to: Iterable[int], sources: Iterable[int], missing_rank: int = -1
    ) -> tuple[list, dict]:
        """Send a note to peers and receive theirs, over gloo. Return operations, those that receive first, and notes.

        A peer may have taken fewer steps, and wait in a collective instead of sending its message.
        """
        if self._downward is None:
            return [], {}
        notes = {place: torch.empty(2, dtype=torch.int64) for place in sources}
        received = [(place, self._operation(dist.irecv, tensor, place, -1)) for place, tensor in notes.items()]
        own = torch.tensor([note, missing_rank])
        sent = [(place, self._operation(dist.isend, own, place, -1)) for place in to]
        works = [(place, dist.batch_isend_irecv([operation])[0]) for place, operation in received + sent]
        return works, notes

    def _note_error(self, place: int, note: int, missing_rank: int) -> PeerError:
        rank, own = self.global_ranks[place], dist.get_rank()
        if note == _FAILED:
            cause = [missing_rank] if missing_rank not in (-1, own) else []
            reason = f", because rank {missing_rank} is missing" if cause else ""
            return PeerError(
                f"Rank {own} waits for rank {rank}, which has failed{reason}. See its log.", [*cause, rank]
            )
        does = "comes to a collective" if note == _LEAVES else "mixes"
        return PeerError(
            f"All ranks must come to the same exchange, but rank {rank} {does} where rank {own} does not. Let every "
            "rank take the same number of steps.",
            [rank],
        )

    def _missing_ranks(self) -> list[int] | None:
        arrivals = self._arrivals()
        if arrivals is None:
            return None
        least = min(count for count, _ in arrivals.values())
        missing = [rank for rank, (count, _) in arrivals.items() if count == least < self._count]
        missing = missing or super()._missing_ranks()
        if self._broken_off_by is not None and self.global_ranks[self._broken_off_by] not in missing:
            missing.append(self.global_ranks[self._broken_off_by])
        return missing
