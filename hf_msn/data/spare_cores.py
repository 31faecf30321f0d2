"""The number of processes that can read data for a rank on an accelerator."""

import os

from ..distributed.collectives import world_size

MOST_WORKERS = 16


def spare_cores() -> int:
    """Return the cores available to this process, divided by the ranks of the machine, minus one; at most 16.

    Launchers set the number of ranks of the machine as `LOCAL_WORLD_SIZE`; without it all ranks are counted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    return max(0, min(MOST_WORKERS, cores // ranks - 1))
