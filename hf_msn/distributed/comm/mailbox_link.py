"""One connection between two ranks of a [`Mailbox`], with a thread that sends and one that receives."""

import contextlib
import dataclasses
import datetime
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from .turns import Turns

GOODBYE, MARKER, _NOTHING = -1, -2, -3  # kinds that the mailbox keeps for itself
_PUT_BACK_SECONDS = 2.0  # for the sending thread of a peer that is gone to end
_FOREVER = datetime.timedelta(days=365)  # threads wait without deadline: one that ends would close the connection
_FIXED = 5  # kind, flags, step, weight and number of bytes come before the numbers
_HAS_TENSORS, _IS_SUM, _IS_BYTES = 1, 2, 4
_MOST_SPARE = 8


@dataclasses.dataclass
class Message:
    """What one rank sent to another, whole.

    Attributes:
        sender (`int`): Place of the sender in the group.
        kind (`int`): What the user of the mailbox means by it, >= 0.
        step (`int`): The sender's step; of sums that were added up, the latest.
        weight (`float`): The push-sum weight that goes with the tensors; of sums that were added up, their sum.
        numbers (`tuple[float, ...]`): Further numbers in float64; of sums that were added up, the latest.
        tensors (`list[torch.Tensor]`, *optional*): Flat buffers that belong to the receiver.
        is_sum (`bool`): Whether it was posted by `post_sum`.
        is_bytes (`bool`): Whether it was posted by `post_bytes`: `tensors` is then one of uint8, of any size.
    """

    sender: int
    kind: int
    step: int = 0
    weight: float = 0.0
    numbers: tuple[float, ...] = ()
    tensors: list[torch.Tensor] | None = None
    is_sum: bool = False
    is_bytes: bool = False

    def absorb(self, later: "Message") -> None:
        """Takes over step, weight and numbers of a later sum; the tensors are the caller's to add."""
        self.step, self.weight, self.numbers = max(self.step, later.step), self.weight + later.weight, later.numbers


class Buffers:
    """Sets of flat CPU buffers of equal sizes, used again instead of allocated anew."""

    def __init__(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype]):
        self._sizes, self._dtypes = list(sizes), list(dtypes)
        self._spare: list[list[torch.Tensor]] = []

    def take(self) -> list[torch.Tensor]:
        try:
            return self._spare.pop()
        except IndexError:
            return [torch.empty(size, dtype=dtype) for size, dtype in zip(self._sizes, self._dtypes)]

    def give(self, tensors: list[torch.Tensor]) -> None:
        # Sums that were received in a lower precision and added up are of another one.
        if len(self._spare) < _MOST_SPARE and [t.dtype for t in tensors] == self._dtypes:
            self._spare.append(tensors)


class Link:
    """The connection to one peer: gloo groups of two, so that what happens to them touches no other peer.

    One for each direction: gloo moves bytes over a socket in one direction at a time.

    Args:
        peer (`int`): The other's place in the mailbox.
        is_second (`bool`): Whether this rank is the second of the two.
        store: Where the two find each other, for them alone.
        num_numbers (`int`): Of a message.
        buffers ([`Buffers`]): For what is received, and to give back what was sent.
        deliver (`Callable`): Called with each message, in the order sent, by the receiving thread.
        changed (`Callable`): Called after a message has left, or the connection has ended.
        turns ([`Turns`]): Of the messages with tensors of all links.
        connect_seconds (`float`): How long to wait for the peer to connect.

    Raises:
        RuntimeError: If the peer did not connect.
    """

    def __init__(
        self,
        peer: int,
        is_second: bool,
        store: dist.Store,
        num_numbers: int,
        buffers: Buffers,
        deliver: Callable[[Message], None],
        changed: Callable[[], None],
        turns: Turns,
        connect_seconds: float,
    ):
        self.peer, self._other = peer, 0 if is_second else 1
        self._num_numbers, self._buffers = num_numbers, buffers
        self._deliver, self._changed, self._turns = deliver, changed, turns
        self.lock = threading.Condition()
        self.outbox: deque[Message] = deque()
        self.is_sending = False
        self.died = self.left = self._said_goodbye = False
        self.error: BaseException | None = None
        self.bytes_sent = 0
        up, down = (
            dist.ProcessGroupGloo(
                dist.PrefixStore(direction, store), int(is_second), 2, datetime.timedelta(seconds=connect_seconds)
            )
            for direction in ("up", "down")
        )
        self._out, self._in = (down, up) if is_second else (up, down)
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"hf_msn mailbox {what} {peer}", daemon=True)
            for loop, what in ((self._send_loop, "to"), (self._receive_loop, "from"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_gone(self) -> bool:
        return self.died or self.left

    def put(self, message: Message) -> None:
        with self.lock:
            self.outbox.append(message)
            self.lock.notify_all()

    def say_goodbye(self) -> None:
        with self.lock:
            if not self._said_goodbye and not self.died:
                self._said_goodbye = True
                self.outbox.append(Message(self.peer, GOODBYE))
                self.lock.notify_all()

    def take_back(self) -> list[Message]:
        """What waits to be sent; once the peer is gone also what was on its way when it went."""
        if self.is_gone:
            self._threads[0].join(_PUT_BACK_SECONDS)
        with self.lock:
            messages = [message for message in self.outbox if message.kind >= 0]
            self.outbox = deque(message for message in self.outbox if message.kind < 0)
        return messages

    def cut(self) -> None:
        """Ends the connection at once, also under threads that wait for the other side."""
        # The only way there is: an operation that runs out of time closes its group's connection.
        for group in (self._out, self._in):
            with contextlib.suppress(RuntimeError):
                group.recv([torch.empty(1)], self._other, 1).wait(datetime.timedelta(milliseconds=1))

    def join(self, seconds: float) -> bool:
        """Whether both threads have ended within `seconds`."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def release(self) -> None:
        self._out = self._in = None

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            with self.lock:
                self.died, self.error = not self.left, self.error or error
                self.lock.notify_all()
            self.cut()  # the peer has to learn of an error that was not the connection's
            self._changed()

    def _send_loop(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.outbox or self.is_gone)
                is_large = bool(self.outbox) and self.outbox[0].tensors is not None
            # The message is taken out when it is its turn: until then later sums are added to it.
            with self._turns.turn(lambda: self.is_gone) if is_large else contextlib.nullcontext():
                message = self._send_next()
            if message is None or message.kind == GOODBYE:
                return
            if message.kind == _NOTHING:
                continue
            if message.tensors is not None and not message.is_bytes:
                self._buffers.give(message.tensors)
            self._changed()

    def _send_next(self) -> Message | None:
        """The message that was sent, or `None` if there is nothing to send any more."""
        with self.lock:
            if self.died:
                return None
            if not self.outbox and not self.left:  # somebody has taken back what waited
                return Message(self.peer, _NOTHING)
            # A peer that has left reads only a goodbye: the rest stays here to be taken back.
            message = Message(self.peer, GOODBYE) if self.left else self.outbox.popleft()
            self.is_sending = True
        try:
            self._send(message)
        except BaseException:
            with self.lock:
                self.outbox.appendleft(message)
            raise
        finally:
            self.is_sending = False
        return message

    def _receive_loop(self) -> None:
        while True:
            message = self._receive()
            if message.kind == GOODBYE:
                with self.lock:
                    self.left = self._said_goodbye = True
                    self.lock.notify_all()
                self._changed()
                return
            self._deliver(message)

    def _send(self, message: Message) -> None:
        flags = _HAS_TENSORS * (message.tensors is not None) + _IS_SUM * message.is_sum + _IS_BYTES * message.is_bytes
        num_bytes = message.tensors[0].numel() if message.is_bytes else 0
        numbers = [*message.numbers] + [0.0] * (self._num_numbers - len(message.numbers))
        header = torch.tensor(
            [message.kind, flags, message.step, message.weight, num_bytes, *numbers], dtype=torch.float64
        )
        tensors = [header, *(message.tensors or ())]
        works = [self._out.send([tensor], self._other, 0) for tensor in tensors if tensor.numel()]
        for work in works:
            work.wait(_FOREVER)
        self.bytes_sent += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _receive(self) -> Message:
        header = torch.empty(_FIXED + self._num_numbers, dtype=torch.float64)
        self._in.recv([header], self._other, 0).wait(_FOREVER)
        kind, flags, step, weight, num_bytes, *numbers = header.tolist()
        flags, tensors = int(flags), None
        if flags & _HAS_TENSORS:
            is_bytes = bool(flags & _IS_BYTES)
            tensors = [torch.empty(int(num_bytes), dtype=torch.uint8)] if is_bytes else self._buffers.take()
            works = [self._in.recv([tensor], self._other, 0) for tensor in tensors if tensor.numel()]
            for work in works:
                work.wait(_FOREVER)
        kinds = {"is_sum": bool(flags & _IS_SUM), "is_bytes": bool(flags & _IS_BYTES)}
        return Message(self.peer, int(kind), int(step), weight, tuple(numbers), tensors, **kinds)
