"""Messages between the ranks of a group that are sent and received in the background."""

import atexit
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist

from ..collectives import rank, world_size
from .exchange import PeerError
from .mailbox_link import MARKER, Buffers, Link, Message
from .turns import Turns

__all__ = ["Mailbox", "Message"]

_CONNECT_SECONDS = 300.0
_CUT_SECONDS = 2.0  # for the threads of a connection that was cut to end

_open: "weakref.WeakSet[Mailbox]" = weakref.WeakSet()
# Mailboxes of a group so far: ranks open them in lockstep, so all have the same number.
_opened: Counter[str] = Counter()


class Mailbox:
    """Sends flat tensors to other ranks and receives theirs in background threads; the training thread never waits.

    Example, after every rank of the group has made one:

    ```python
    mailbox = Mailbox([flat]).start()
    mailbox.post_sum(peer, kind=0, tensors=[flat / 2], step=step, weight=0.5)
    for message in mailbox.collect():
        flat += message.tensors[0]
        weight += message.weight
        mailbox.recycle(message)
    mailbox.close()
    ```

    Ranks are places in the group, 0..n-1. Every pair of ranks has a connection of its own over gloo, beside all
    process groups, so that it survives what happens to them and to other pairs. Each connection is first in, first
    out, and has a thread that sends and one that receives; they wait without deadline, so a stopped process just stays
    silent. A message is handed over only when it is whole, in buffers that belong to the receiver. Only one
    thread at a time may call the methods.

    **Sums** (`post_sum`) are for mass that may arrive together: while one waits to be sent, the next to the same peer
    is added to it (tensors and weights; the latest step and numbers win), and so are those that arrived and were not
    collected. At most one waits on either side and nothing is lost, however slow a peer is. **Plain messages**
    (`post`) stay apart; bound them by `num_waiting`.

    **A peer that is gone** (`died`: its connection closed; `left`: it said goodbye) is noticed at once by all. What is
    posted to it then, or was and has not left, waits for `take_back`.

    Tensors on other devices are copied to the CPU when posted, and to the device when collected.

    Args:
        like (`Sequence[torch.Tensor]`): Flat tensors, whose sizes, dtypes and devices those of every message have.
        group (`ProcessGroup`, *optional*): The ranks; by default all. Any backend.
        wire_dtype (`torch.dtype`, *optional*): What floating-point tensors are sent in, if that is narrower.
        num_numbers (`int`, *optional*, defaults to 8): Most further numbers that a message can have.
        connect_seconds (`float`, *optional*, defaults to 300): How long `start` waits for each peer.

    Attributes:
        size (`int`): Number of ranks n.
        rank (`int`): This rank's place.
        global_ranks (`list[int]`): The members, as ranks of the default group.
        weight_posted (`list[float]`): Weight posted to each peer so far, less what was taken back.
        weight_collected (`list[float]`): Weight collected from each peer so far.
        wire_dtypes (`list[torch.dtype]`): What the tensors of a message are sent in.
        last_heard (`list[float]`): `time.monotonic()` when the last message of each peer arrived, or of `start`.
    """

    def __init__(
        self,
        like: Sequence[torch.Tensor],
        group: dist.ProcessGroup | None = None,
        *,
        wire_dtype: torch.dtype | None = None,
        num_numbers: int = 8,
        connect_seconds: float = _CONNECT_SECONDS,
    ):
        self.group, self.size, self.rank = group, world_size(group), rank(group)
        self.num_numbers, self.connect_seconds = num_numbers, connect_seconds
        self._dtypes, self._devices = [t.dtype for t in like], [t.device for t in like]
        self.wire_dtypes = [_narrower(dtype, wire_dtype) for dtype in self._dtypes]
        self._turns = Turns()
        self._buffers = Buffers([t.numel() for t in like], self.wire_dtypes)
        self._links: dict[int, Link] = {}
        self._inboxes: list[deque[Message]] = [deque() for _ in range(self.size)]
        self._marks = [0] * self.size
        self._drains = 0
        self._arrived = threading.Condition()
        self._pid = os.getpid()
        self.weight_posted, self.weight_collected = [0.0] * self.size, [0.0] * self.size
        self.last_heard = [time.monotonic()] * self.size
        self.global_ranks = [0] if self.size == 1 else dist.get_process_group_ranks(group or dist.group.WORLD)

    @property
    def bytes_sent(self) -> int:
        """What has left so far, headers included."""
        return sum(link.bytes_sent for link in self._links.values())

    @property
    def died(self) -> set[int]:
        """Peers whose connection has closed without a goodbye."""
        return {peer for peer, link in self._links.items() if link.died}

    @property
    def left(self) -> set[int]:
        """Peers that have closed their mailbox."""
        return {peer for peer, link in self._links.items() if link.left}

    @property
    def gone(self) -> set[int]:
        """Peers that died or left."""
        return self.died | self.left

    @property
    def weight_under_way(self) -> float:
        """Weight posted less weight collected here; its sum over the ranks is what is under way between them."""
        return sum(self.weight_posted) - sum(self.weight_collected)

    def start(self) -> "Mailbox":
        """Connects every pair of ranks; all ranks must call it.

        Raises:
            PeerError: If a peer did not connect within `connect_seconds`.
        """
        if self.size == 1:
            return self
        name = (self.group or dist.group.WORLD).group_name
        _opened[name] += 1
        store = dist.distributed_c10d._get_default_store()
        # Pairs in the same order everywhere, or ranks would wait for one another in a circle.
        for first, second in ((i, j) for i in range(self.size) for j in range(i + 1, self.size)):
            if self.rank not in (first, second):
                continue
            peer = second if self.rank == first else first
            own = dist.PrefixStore(f"hf_msn/mailbox/{name}/{_opened[name]}/{first}-{second}", store)
            try:
                self._links[peer] = Link(
                    peer,
                    self.rank == second,
                    own,
                    self.num_numbers,
                    self._buffers,
                    self._deliver,
                    self._notify,
                    self._turns,
                    self.connect_seconds,
                )
            except RuntimeError as error:
                self.close(0.0)
                raise PeerError(
                    f"Rank {self.global_ranks[peer]} must connect within {self.connect_seconds} s, but did not. See "
                    f"its log: it has died, or has not come as far as rank {self.global_ranks[self.rank]}. ({error})",
                    [self.global_ranks[peer]],
                ) from error
        self.last_heard = [time.monotonic()] * self.size
        _open.add(self)
        return self

    def post(
        self,
        peer: int,
        kind: int,
        tensors: Sequence[torch.Tensor] | None = None,
        *,
        step: int = 0,
        weight: float = 0.0,
        numbers: Sequence[float] = (),
    ) -> None:
        """Sends a message of its own, of a copy of `tensors`. Never waits."""
        buffers = None
        if tensors is not None:
            buffers = self._buffers.take()
            for buffer, tensor in zip(buffers, tensors):
                buffer.copy_(tensor)
        self.weight_posted[peer] += weight
        self._links[peer].put(Message(self.rank, kind, step, weight, tuple(numbers), buffers))

    def post_bytes(
        self, peer: int, kind: int, payload: torch.Tensor, *, step: int = 0, numbers: Sequence[float] = ()
    ) -> None:
        """Sends a message of its own with a flat CPU tensor of uint8, of any size, which is not copied."""
        message = Message(self.rank, kind, step, 0.0, tuple(numbers), [payload], is_bytes=True)
        self._links[peer].put(message)

    @torch.no_grad()
    def post_sum(
        self,
        peer: int,
        kind: int,
        tensors: Sequence[torch.Tensor],
        *,
        step: int = 0,
        weight: float = 0.0,
        numbers: Sequence[float] = (),
    ) -> None:
        """Sends a sum, added to the last message to this peer if that one is a sum of this kind and has not left.

        Waits for no peer. With a `wire_dtype` `tensors` are left holding what rounding took: the caller keeps it, so
        that nothing is lost. Without one they are left as they are.
        """
        message = Message(self.rank, kind, step, weight, tuple(numbers), None, True)
        self.weight_posted[peer] += weight
        link = self._links[peer]
        with link.lock:
            last = link.outbox[-1] if link.outbox else None
            if last is not None and last.is_sum and last.kind == kind:
                last.absorb(message)
                waiting = last.tensors
            else:
                waiting = None
                message.tensors = self._buffers.take()
                link.outbox.append(message)
            for i, tensor in enumerate(tensors):
                buffer = message.tensors[i] if waiting is None else waiting[i]
                if buffer.dtype == tensor.dtype:
                    buffer.copy_(tensor) if waiting is None else buffer.add_(tensor.to(buffer.device))
                    continue
                if waiting is not None:
                    tensor.add_(buffer.to(tensor.device, tensor.dtype))
                buffer.copy_(tensor)
                tensor.sub_(buffer.to(tensor.device, tensor.dtype))
            link.lock.notify_all()

    def num_waiting(self, peer: int) -> int:
        """Messages to `peer` that have not left, with those of `drain` and the one that is being sent."""
        link = self._links[peer]
        with link.lock:
            return len(link.outbox) + link.is_sending

    def collect(self, timeout_seconds: float = 0.0) -> list[Message]:
        """What has arrived since the last call: in the order sent from each peer, by rank of the peers.

        With a timeout it waits until something is there, or one more peer is gone, or the time is up.
        """
        with self._arrived:
            if timeout_seconds > 0.0:
                gone = self.gone
                self._arrived.wait_for(lambda: any(self._inboxes) or self.gone != gone, timeout_seconds)
            messages = [message for inbox in self._inboxes for message in inbox]
            for inbox in self._inboxes:
                inbox.clear()
        for message in messages:
            self.weight_collected[message.sender] += message.weight
            if (
                message.tensors is not None
                and not message.is_bytes
                and any(device.type != "cpu" for device in self._devices)
            ):
                staged, message.tensors = message.tensors, [t.to(d) for t, d in zip(message.tensors, self._devices)]
                if all(device.type != "cpu" for device in self._devices):
                    self._buffers.give(staged)
        return messages

    def recycle(self, message: Message) -> None:
        """Gives the buffers of a collected message back, to be used again. They must not be read afterwards."""
        if (
            message.tensors is not None
            and not message.is_bytes
            and all(tensor.device.type == "cpu" for tensor in message.tensors)
        ):
            self._buffers.give(message.tensors)
            message.tensors = None

    def wait_for(self, predicate: Callable[[], bool], timeout_seconds: float) -> bool:
        """Waits until `predicate()` is true, looked at whenever a message arrives or leaves or a peer is gone.

        `predicate` must not call `collect`: see the timeout of that. Returns whether it was true in time.
        """
        with self._arrived:
            return self._arrived.wait_for(predicate, timeout_seconds)

    def take_back(self, peer: int) -> list[Message]:
        """Messages to `peer` that have not left, in order: they are not sent. `tensors` are on the CPU, as sent."""
        messages = self._links[peer].take_back()
        self.weight_posted[peer] -= sum(message.weight for message in messages)
        return messages

    def drain(
        self, timeout_seconds: float, *, peers: Collection[int] | None = None, number: int | None = None
    ) -> None:
        """Returns when all that `peers` posted to this rank before their own `drain` has arrived, to be collected.

        Args:
            timeout_seconds (`float`): Deadline.
            peers (collection of `int`, *optional*): Who drains as well; by default all. Those that are gone, or go
                while it waits, are not waited for.
            number (`int`, *optional*): Which drain it is, the same on all ranks and larger than those before; by
                default one more than in the last call.

        Raises:
            PeerError: If a peer did not drain before the deadline.
        """
        self._drains = self._drains + 1 if number is None else number
        peers = set(self._links if peers is None else peers)
        for peer in peers - self.gone:
            self._links[peer].put(Message(self.rank, MARKER, self._drains))

        def missing() -> list[int]:
            return [peer for peer in sorted(peers - self.gone) if self._marks[peer] < self._drains]

        if not self.wait_for(lambda: not missing(), timeout_seconds):
            ranks = [self.global_ranks[peer] for peer in missing()]
            raise PeerError(
                f"What is under way must arrive within {timeout_seconds} s, but rank {', '.join(map(str, ranks))} has "
                f"not sent its last to rank {self.global_ranks[self.rank]}: it hangs or is slow. See its log.",
                ranks,
            )

    def cut(self, peer: int) -> None:
        """Ends the connection to one peer at once: each of the two has the other in `died`."""
        self._links[peer].cut()

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Says goodbye to all peers and ends the threads. What a peer has not received by the deadline is lost.

        A peer that still uses its mailbox answers the goodbye in the background and has this rank in `left`. With a
        deadline of 0 the connections are cut without a word, and peers have this rank in `died`. Also for exits: what
        is open when the interpreter ends is cut.
        """
        _open.discard(self)
        if os.getpid() != self._pid:  # a fork has the connections, but none of the threads
            return
        deadline = time.monotonic() + timeout_seconds
        if timeout_seconds > 0.0:
            for link in self._links.values():
                link.say_goodbye()
        for link in self._links.values():
            if timeout_seconds <= 0.0 or not link.join(deadline - time.monotonic()):
                link.cut()
        for link in self._links.values():
            if link.join(_CUT_SECONDS):
                link.release()

    def _notify(self) -> None:
        with self._arrived:
            self._arrived.notify_all()

    def _deliver(self, message: Message) -> None:
        with self._arrived:
            inbox = self._inboxes[message.sender]
            self.last_heard[message.sender] = time.monotonic()
            if message.kind == MARKER:
                self._marks[message.sender] = message.step
            elif message.is_sum and inbox and inbox[-1].is_sum and inbox[-1].kind == message.kind:
                self._add_to(inbox[-1], message)
            else:
                inbox.append(message)
            self._arrived.notify_all()

    def _add_to(self, message: Message, later: Message) -> None:
        message.absorb(later)
        # In the precision of the sender's tensors: a sum of two that were rounded would be rounded again.
        for i, (tensor, dtype) in enumerate(zip(later.tensors, self._dtypes)):
            message.tensors[i] = message.tensors[i].to(dtype).add_(tensor)
        self._buffers.give(later.tensors)


def _narrower(dtype: torch.dtype, wire_dtype: torch.dtype | None) -> torch.dtype:
    if wire_dtype is None or not dtype.is_floating_point:
        return dtype
    return wire_dtype if wire_dtype.itemsize < dtype.itemsize else dtype


@atexit.register
def _cut_all() -> None:
    for mailbox in list(_open):
        mailbox.close(0.0)
