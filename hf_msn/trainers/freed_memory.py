"""Keeps the C library from giving freed memory back to the system between two steps on a CPU."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next request, in all of the process; `False` where there is no glibc.

    By default it gives blocks of some MiB, the size of activations, back to the system when they are freed. Each step
    then gets them anew, page by page, filled with zeros: that took a tenth to a third of a step where it was measured.
    The process holds on to its peak, which it needs in each step anyway.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _LARGEST)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))
