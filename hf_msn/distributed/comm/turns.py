"""Turns at a network link that several threads send over."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_SECONDS = 0.05
_PATIENCE_SECONDS = 1.0


class Turns:
    """Lets large messages leave one after the other: two that share a link both arrive as late as the second one.

    Who does not get on, because its peer is stopped, is overtaken: after 1 s and twice the longest turn so far.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._next = 0
        self._ahead: list[int] = []  # tickets of those who send or wait, but for the overtaken
        self._longest = 0.0

    @contextmanager
    def turn(self, gives_up: Callable[[], bool]) -> Iterator[None]:
        """Waits for the turn. Enters at once when `gives_up()`, for what follows to fail by itself."""
        with self._changed:
            ticket, self._next = self._next, self._next + 1
            self._ahead.append(ticket)
            first, since = self._ahead[0], time.monotonic()
            while self._ahead[0] != ticket and not gives_up():
                self._changed.wait(_LOOK_SECONDS)
                if self._ahead[0] != first:
                    first, since = self._ahead[0], time.monotonic()
                elif time.monotonic() - since > _PATIENCE_SECONDS + 2.0 * self._longest:
                    self._ahead.remove(first)
                    self._changed.notify_all()
            started = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                if ticket in self._ahead:
                    self._ahead.remove(ticket)
                    self._longest = max(self._longest, time.monotonic() - started)
                self._changed.notify_all()
