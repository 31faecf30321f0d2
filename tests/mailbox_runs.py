"""Messages for the tests of the mailbox."""

import threading
import time

import torch

SIZES = [7, 3]


def full(value, dtype=torch.float64):
    return [torch.full((size,), float(value), dtype=dtype) for size in SIZES]


def collect_until(mailbox, enough, seconds=10.0):
    """Messages, until `enough(messages)`."""
    messages, deadline = [], time.monotonic() + seconds
    while not enough(messages):
        assert time.monotonic() < deadline, f"only {len(messages)} messages after {seconds} s"
        messages += mailbox.collect(0.2)
    return messages


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hf_msn mailbox")]
