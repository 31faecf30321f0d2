"""Keep freed memory in the process between two steps on a CPU."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next request, in the whole process. Return `False` without glibc.

    By default glibc returns blocks of some MiB, the size of activations, to the system, and each step gets them again
    page by page, filled with zeros. The process keeps its peak, which each step needs anyway.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _LARGEST)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))
