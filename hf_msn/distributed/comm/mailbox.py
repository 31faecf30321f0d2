"""Messages between the ranks of a group that are sent and received in the background."""

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..collectives import rank, world_size
from .connection import PING, Buffers, Connection, Message, Turns
from .exchange import PeerError

__all__ = ["Mailbox", "Message"]

_CONNECT_SECONDS = 300.0
_TURN_SECONDS = 15.0
_CUT_SECONDS = 2.0  # for the threads of a connection that was cut to end


class Mailbox:
    """Send flat tensors to other ranks and receive theirs in background threads; the training thread never waits.

    Ranks are places in the group. Every pair of ranks has a connection of its own over gloo, independent of all
    process groups and other pairs. It is first in, first out, and its threads wait without deadline, so a stopped
    process is just silent. Large messages leave one at a time and arrive one at a time, see [`Turns`]. Messages are
    delivered whole, in buffers that belong to the receiver; tensors on other devices pass through the CPU. Only one
    thread at a time may call the methods.

    Sums (`post_sum`) carry mass that may arrive together: a sum that waits to be sent is added to the next one for the
    same peer, and so are sums that arrived and were not collected. At most one waits on either side and nothing is
    lost, however slow a peer is. Plain messages (`post`) stay apart; bound them by `num_waiting`. All ranks notice at
    once when a peer is gone; messages to it that have not left wait for `take_back`.

    Every message carries `step` and `step_ended`, the last step of this rank and when it ended on its own clock.

    Args:
        like (`Sequence[torch.Tensor]`): Flat tensors with the sizes, dtypes and devices of every message's tensors.
        group (`ProcessGroup`, *optional*): The ranks, over any backend; by default all.
        wire_dtype (`torch.dtype`, *optional*): Precision in which floating-point tensors are sent, if it is narrower.
        num_numbers (`int`, *optional*, defaults to 8): Largest number of further numbers in a message.
        connect_seconds (`float`, *optional*, defaults to 300): How long `start` waits for each peer.
        turn_seconds (`float`, *optional*, defaults to 15): How long a message may have this rank's link to itself.
    """

    def __init__(
        self,
        like: Sequence[torch.Tensor],
        group: dist.ProcessGroup | None = None,
        *,
        wire_dtype: torch.dtype | None = None,
        num_numbers: int = 8,
        connect_seconds: float = _CONNECT_SECONDS,
        turn_seconds: float = _TURN_SECONDS,
    ):
        self.group, self.size, self.rank = group, world_size(group), rank(group)
        self.num_numbers, self.connect_seconds = num_numbers, connect_seconds
        self._dtypes, self._devices = [t.dtype for t in like], [t.device for t in like]
        self.wire_dtypes = [_narrower(dtype, wire_dtype) for dtype in self._dtypes]
        self.buffers = Buffers([t.numel() for t in like], self.wire_dtypes)
        self.sending, self.receiving = Turns(turn_seconds), Turns(turn_seconds)
        self._connections: dict[int, Connection] = {}
        self._inboxes: list[deque[Message]] = [deque() for _ in range(self.size)]
        self._arrived = threading.Condition()
        self._pid = os.getpid()
        self.step, self.step_ended = 0, 0.0
        # Per peer: weight posted and not taken back, weight collected; when its last message arrived, pings included,
        # and that message's step and its end.
        self.weight_posted, self.weight_collected = [0.0] * self.size, [0.0] * self.size
        self.last_heard = [time.monotonic()] * self.size
        self.latest: list[tuple[int, float]] = [(-1, 0.0)] * self.size
        self.global_ranks = [0] if self.size == 1 else dist.get_process_group_ranks(group or dist.group.WORLD)

    @property
    def bytes_sent(self) -> int:
        """Bytes that have left so far, headers included."""
        return sum(connection.bytes_sent for connection in self._connections.values())

    @property
    def died(self) -> set[int]:
        """Peers whose connection has closed without a goodbye."""
        return {peer for peer, connection in self._connections.items() if connection.died}

    @property
    def left(self) -> set[int]:
        """Peers that have closed their mailbox."""
        return {peer for peer, connection in self._connections.items() if connection.left}

    @property
    def gone(self) -> set[int]:
        """Peers that died or left."""
        return self.died | self.left

    @property
    def narrows(self) -> list[bool]:
        """Whether the precision of messages is below that of the tensors, for each of them."""
        return [wire != dtype for wire, dtype in zip(self.wire_dtypes, self._dtypes)]

    def rounded(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors as they arrive: rounded to the precision of messages, in their own dtypes."""
        return [tensor.to(wire).to(tensor.dtype) for tensor, wire in zip(tensors, self.wire_dtypes)]

    def start(self) -> "Mailbox":
        """Connect every pair of ranks; all ranks must call it."""
        if self.size == 1:
            return self
        store = dist.distributed_c10d._get_default_store()
        name = f"hf_msn/mailbox/{(self.group or dist.group.WORLD).group_name}"
        opened = store.add(f"{name}/opened/{self.rank}", 1)  # lockstep gives all ranks the same number
        # Pairs in the same order everywhere, or ranks would wait for one another in a circle.
        for first, second in ((i, j) for i in range(self.size) for j in range(i + 1, self.size)):
            if self.rank not in (first, second):
                continue
            peer = second if self.rank == first else first
            try:
                own = dist.PrefixStore(f"{name}/{opened}/{first}-{second}", store)
                self._connections[peer] = Connection(self, peer, own)
            except RuntimeError as error:
                self.close(0.0)
                raise PeerError(
                    f"Rank {self.global_ranks[peer]} must connect within {self.connect_seconds} s, but did not. See "
                    f"its log: it has died, or has not come as far as rank {self.global_ranks[self.rank]}. ({error})",
                    [self.global_ranks[peer]],
                ) from error
        self.last_heard = [time.monotonic()] * self.size
        atexit.register(self.close, 0.0)
        return self

    def post(
        self,
        peer: int,
        kind: int,
        tensors: Sequence[torch.Tensor] | None = None,
        *,
        payload: torch.Tensor | None = None,
        weight: float = 0.0,
        numbers: Sequence[float] = (),
    ) -> None:
        """Send a plain message with a copy of `tensors`, or a uint8 `payload` of any size, uncopied. Never waits."""
        buffers = None if payload is None else [payload]
        if tensors is not None:
            buffers = self.buffers.take()
            for buffer, tensor in zip(buffers, tensors):
                buffer.copy_(tensor)
        self.weight_posted[peer] += weight
        message = Message(self.rank, kind, self.step, self.step_ended, weight, tuple(numbers), buffers)
        message.is_bytes = payload is not None
        self._connections[peer].put(message)

    @torch.no_grad()
    def post_sum(self, peer: int, kind: int, tensors: Sequence[torch.Tensor], *, weight: float = 0.0) -> None:
        """Send a sum, or add it to the last message to this peer if that is a waiting sum of the same kind.

        With a `wire_dtype`, `tensors` are left holding the rounding error. The caller keeps it, so nothing is lost.
        Without one they are not changed.
        """
        message = Message(self.rank, kind, self.step, self.step_ended, weight, is_sum=True)
        self.weight_posted[peer] += weight
        connection = self._connections[peer]
        with connection.lock:
            last = connection.outbox[-1] if connection.outbox else None
            is_new = last is None or not last.is_sum or last.kind != kind
            if is_new:
                message.tensors = self.buffers.take()
                connection.outbox.append(message)
            else:
                last.absorb(message)
            for buffer, tensor in zip(message.tensors if is_new else last.tensors, tensors):
                if buffer.dtype == tensor.dtype:
                    buffer.copy_(tensor) if is_new else buffer.add_(tensor.to(buffer.device))
                    continue
                if not is_new:
                    tensor.add_(buffer.to(tensor.device, tensor.dtype))
                buffer.copy_(tensor)
                tensor.sub_(buffer.to(tensor.device, tensor.dtype))
            connection.lock.notify_all()

    def ping(self, peer: int) -> None:
        """Update `last_heard` and `latest` of the peer for this rank, unless another message to it waits anyway."""
        if self.num_waiting(peer) == 0:
            self.post(peer, PING)

    def num_waiting(self, peer: int) -> int:
        """Return the number of messages to `peer` that have not left, with the one that is being sent."""
        connection = self._connections[peer]
        with connection.lock:
            return len(connection.outbox) + connection.is_sending

    def collect(self, timeout_seconds: float = 0.0) -> list[Message]:
        """Return the messages since the last call: in the order sent by each peer, by rank of the peers.

        With a timeout it waits until there is a message, or one more peer is gone, or the time is up.
        """
        with self._arrived:
            if timeout_seconds > 0.0:
                gone = self.gone
                self._arrived.wait_for(lambda: any(self._inboxes) or self.gone != gone, timeout_seconds)
            messages = [message for inbox in self._inboxes for message in inbox]
            for inbox in self._inboxes:
                inbox.clear()
        on_cpu = [device.type == "cpu" for device in self._devices]
        for message in messages:
            self.weight_collected[message.sender] += message.weight
            if message.tensors is not None and not message.is_bytes and not all(on_cpu):
                staged, message.tensors = message.tensors, [t.to(d) for t, d in zip(message.tensors, self._devices)]
                if not any(on_cpu):
                    self.buffers.give(staged)
        return messages

    def recycle(self, message: Message) -> None:
        """Reuse the buffers of a collected message. They must not be read afterwards."""
        if message.tensors is None or message.is_bytes or any(t.device.type != "cpu" for t in message.tensors):
            return
        self.buffers.give(message.tensors)
        message.tensors = None

    def take_back(self, peer: int) -> list[Message]:
        """Remove and return the messages to `peer` that have not left, in order, with tensors on the CPU, as sent."""
        messages = self._connections[peer].take_back()
        self.weight_posted[peer] -= sum(message.weight for message in messages)
        return messages

    def cut(self, peer: int) -> None:
        """End the connection to one peer at once: both ranks then have the other in `died`."""
        self._connections[peer].cut()

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Say goodbye to all peers and end the threads. Messages that a peer has not received by then are lost.

        A peer that still uses its mailbox answers the goodbye in the background and has this rank in `left`. With a
        timeout of 0 the connections are cut, and peers have this rank in `died`; so also when the interpreter exits.
        """
        atexit.unregister(self.close)
        if os.getpid() != self._pid:  # a fork has the connections, but none of the threads
            return
        deadline = time.monotonic() + timeout_seconds
        connections = self._connections.values()
        if timeout_seconds > 0.0:
            for connection in connections:
                connection.post_goodbye()
        for connection in connections:
            if timeout_seconds <= 0.0 or not connection.join(deadline - time.monotonic()):
                connection.cut()
        for connection in connections:
            if connection.join(_CUT_SECONDS):
                connection.release()

    def notify(self) -> None:
        with self._arrived:
            self._arrived.notify_all()
        self.sending.notify()
        self.receiving.notify()

    def deliver(self, message: Message) -> None:
        with self._arrived:
            inbox = self._inboxes[message.sender]
            self.last_heard[message.sender] = time.monotonic()
            self.latest[message.sender] = message.step, message.step_ended
            if message.kind == PING:  # not into the inbox, where it would keep two sums apart
                return
            if message.is_sum and inbox and inbox[-1].is_sum and inbox[-1].kind == message.kind:
                self._add_to(inbox[-1], message)
            else:
                inbox.append(message)
            self._arrived.notify_all()

    def _add_to(self, message: Message, later: Message) -> None:
        message.absorb(later)
        # In the precision of the sender's tensors: the sum of two rounded messages would be rounded again.
        for i, (tensor, dtype) in enumerate(zip(later.tensors, self._dtypes)):
            message.tensors[i] = message.tensors[i].to(dtype).add_(tensor)
        self.buffers.give(later.tensors)


def _narrower(dtype: torch.dtype, wire_dtype: torch.dtype | None) -> torch.dtype:
    if wire_dtype is None or not dtype.is_floating_point:
        return dtype
    return wire_dtype if wire_dtype.itemsize < dtype.itemsize else dtype
