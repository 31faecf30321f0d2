"""One connection between two ranks of a [`Mailbox`], with a thread that sends and one that receives."""

import dataclasses
import datetime
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist

PING, GOODBYE = -1, -2  # kinds that the mailbox keeps for itself
_TAKE_BACK_SECONDS = 2.0  # for the sending thread of a peer that is gone to end
_FOREVER = datetime.timedelta(days=365)  # threads wait without deadline: one that ends would close the connection
_NUM_FIXED = 6  # kind, flags, step, its end, weight and number of bytes precede the numbers of a header
_HAS_TENSORS, _IS_SUM, _IS_BYTES = 1, 2, 4
_MAX_SPARE = 8
_LARGE_BYTES = 2**16  # from here on a message is confirmed and takes turns; a smaller one is soon gone


@dataclasses.dataclass
class Message:
    """A whole message from one rank to another. Sums that were added up have the latest step."""

    sender: int  # place in the group
    kind: int  # >= 0, defined by the user of the mailbox
    step: int = 0  # last step of the sender
    step_ended: float = 0.0  # when that step ended, on the sender's clock
    weight: float = 0.0  # push-sum weight that belongs to the tensors
    numbers: tuple[float, ...] = ()
    tensors: list[torch.Tensor] | None = None  # flat buffers that belong to the receiver
    is_sum: bool = False
    is_bytes: bool = False  # it has one uint8 tensor of any size

    @property
    def is_large(self) -> bool:
        """Whether it takes turns. Bytes are of agreements, which have deadlines of their own."""
        has_buffers = self.tensors is not None and not self.is_bytes
        return has_buffers and sum(tensor.nbytes for tensor in self.tensors) >= _LARGE_BYTES

    def absorb(self, later: "Message") -> None:
        """Take over step and weight of a later sum. The caller adds the tensors."""
        self.step, self.step_ended = later.step, later.step_ended
        self.weight += later.weight


class Buffers:
    """Sets of flat CPU buffers of equal sizes, reused instead of allocated."""

    def __init__(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype]):
        self._sizes, self._dtypes = list(sizes), list(dtypes)
        self._spare: list[list[torch.Tensor]] = []

    def take(self) -> list[torch.Tensor]:
        try:
            return self._spare.pop()
        except IndexError:
            return [torch.empty(size, dtype=dtype) for size, dtype in zip(self._sizes, self._dtypes)]

    def give(self, tensors: list[torch.Tensor]) -> None:
        # Sums of rounded messages have a wider dtype.
        if len(self._spare) < _MAX_SPARE and [t.dtype for t in tensors] == self._dtypes:
            self._spare.append(tensors)


class Turns:
    """One large message at a time over one direction of this rank's link, that of the oldest step first.

    Messages that share a link all arrive late, and a rank waits for the oldest only. One that takes longer than
    `seconds`, as with a stopped peer, loses its turn: the others go on beside it.
    """

    def __init__(self, seconds: float):
        self._seconds, self._changed, self._numbers = seconds, threading.Condition(), itertools.count()
        self._waiting: list[tuple[int, int]] = []
        self._holder: tuple[int, int] | None = None
        self._until = 0.0

    @contextmanager
    def take(self, step: int, is_over: Callable[[], bool]) -> Iterator[None]:
        """Wait for a turn, or until `is_over()`, and hold it."""
        with self._changed:
            own = (step, next(self._numbers))
            self._waiting.append(own)
            while not is_over():
                now = time.monotonic()
                is_taken = self._holder is not None and now < self._until
                if not is_taken and min(self._waiting) == own:
                    break
                self._changed.wait(self._until - now if is_taken else None)
            self._waiting.remove(own)
            if not is_over():
                self._holder, self._until = own, time.monotonic() + self._seconds
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                if self._holder == own:
                    self._holder = None
                self._changed.notify_all()

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Connection:
    """The connection of a [`Mailbox`] to one peer: gloo groups of two, so that their failures affect no other peer.

    There is one group per direction, because gloo moves bytes over a socket in one direction at a time. Large messages
    leave and arrive in [`Turns`], and the receiver confirms them: until then they may be in buffers of the system.
    """

    def __init__(self, mailbox, peer: int, store: dist.Store):
        is_second = mailbox.rank > peer
        self._mailbox, self.peer, self._other = mailbox, peer, 0 if is_second else 1
        self.lock = threading.Condition()
        self.outbox: deque[Message] = deque()
        self.is_sending = False
        self.died = self.left = self._has_posted_goodbye = False
        self.bytes_sent = 0
        timeout = datetime.timedelta(seconds=mailbox.connect_seconds)
        up, down = (
            dist.ProcessGroupGloo(dist.PrefixStore(direction, store), int(is_second), 2, timeout)
            for direction in ("up", "down")
        )
        self._out, self._in = (down, up) if is_second else (up, down)
        self._threads = [
            threading.Thread(target=self._run, args=(loop,), name=f"hf_msn mailbox {name} {peer}", daemon=True)
            for loop, name in ((self._send_loop, "to"), (self._receive_loop, "from"))
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

    def post_goodbye(self) -> None:
        with self.lock:
            if not self._has_posted_goodbye and not self.died:
                self._has_posted_goodbye = True
                self.outbox.append(Message(self.peer, GOODBYE))
                self.lock.notify_all()

    def take_back(self) -> list[Message]:
        """Remove and return the messages that wait; once the peer is gone also the one that was on its way."""
        if self.is_gone:
            self._threads[0].join(_TAKE_BACK_SECONDS)
        with self.lock:
            messages = [message for message in self.outbox if message.kind >= 0]
            self.outbox = deque(message for message in self.outbox if message.kind < 0)
        return messages

    def cut(self) -> None:
        """End the connection at once, also under threads that wait for the other side."""
        for group in (self._out, self._in):
            close_pair(group, self._other)

    def join(self, seconds: float) -> bool:
        """Return whether both threads ended within `seconds`."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def release(self) -> None:
        self._out = self._in = None

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException:
            with self.lock:
                self.died = not self.left
                self.lock.notify_all()
            self.cut()  # the peer has to notice an error that was not the connection's
            self._mailbox.notify()

    def _send_loop(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.outbox or self.is_gone)
                first = self.outbox[0] if self.outbox else None
            # It waits in the outbox, to be added to or taken back.
            with self._turn(self._mailbox.sending, first):
                with self.lock:
                    if self.died:
                        return
                    if not self.outbox and not self.left:  # taken back
                        continue
                    # A peer that has left reads only a goodbye; the rest stays here to be taken back.
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
            if message.kind == GOODBYE:
                return
            if message.tensors is not None and not message.is_bytes:
                self._mailbox.buffers.give(message.tensors)
            self._mailbox.notify()

    def _receive_loop(self) -> None:
        while True:
            message = self._receive()
            if message.kind == GOODBYE:
                with self.lock:
                    self.left = self._has_posted_goodbye = True
                    self.lock.notify_all()
                self._mailbox.notify()
                return
            self._mailbox.deliver(message)

    def _send(self, message: Message) -> None:
        flags = _HAS_TENSORS * (message.tensors is not None) + _IS_SUM * message.is_sum + _IS_BYTES * message.is_bytes
        size = message.tensors[0].numel() if message.is_bytes else 0
        numbers = [*message.numbers] + [0.0] * (self._mailbox.num_numbers - len(message.numbers))
        header = [message.kind, flags, message.step, message.step_ended, message.weight, size, *numbers]
        tensors = [torch.tensor(header, dtype=torch.float64), *(message.tensors or ())]
        works = [self._out.send([tensor], self._other, 0) for tensor in tensors if tensor.numel()]
        for work in works:
            work.wait(_FOREVER)
        if message.is_large:
            self._out.recv([torch.empty(1)], self._other, 0).wait(_FOREVER)
        self.bytes_sent += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _receive(self) -> Message:
        header = torch.empty(_NUM_FIXED + self._mailbox.num_numbers, dtype=torch.float64)
        self._in.recv([header], self._other, 0).wait(_FOREVER)
        kind, flags, step, ended, weight, size, *numbers = header.tolist()
        is_sum, is_bytes = bool(int(flags) & _IS_SUM), bool(int(flags) & _IS_BYTES)
        message = Message(self.peer, int(kind), int(step), ended, weight, tuple(numbers), None, is_sum, is_bytes)
        if int(flags) & _HAS_TENSORS:
            message.tensors = [torch.empty(int(size), dtype=torch.uint8)] if is_bytes else self._mailbox.buffers.take()
            with self._turn(self._mailbox.receiving, message):
                works = [self._in.recv([tensor], self._other, 0) for tensor in message.tensors if tensor.numel()]
                for work in works:
                    work.wait(_FOREVER)
            if message.is_large:
                self._in.send([torch.zeros(1)], self._other, 0).wait(_FOREVER)
        return message

    def _turn(self, turns: Turns, message: Message | None) -> AbstractContextManager:
        if message is None or not message.is_large:
            return nullcontext()
        return turns.take(message.step, lambda: self.is_gone)


def close_pair(group: dist.ProcessGroupGloo, other: int) -> None:
    """End the connection of a gloo group to one of its ranks at once, also under operations that wait."""
    # An operation that runs out of time closes its connection; there is no other way.
    with suppress(RuntimeError):
        group.recv([torch.empty(1)], other, 1).wait(datetime.timedelta(milliseconds=1))
