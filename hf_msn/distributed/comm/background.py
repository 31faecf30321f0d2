"""Calls in the background, one after the other."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class BackgroundCalls:
    """A thread that makes calls in the order in which they were submitted.

    It is a daemon: unlike that of an executor, a call that hangs does not keep the process from ending.
    """

    def __init__(self, name: str):
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[[], Any]) -> Future:
        """Return the future of the call's result."""
        future: Future = Future()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        """End the thread after the calls that were submitted."""
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            del item, call, future
