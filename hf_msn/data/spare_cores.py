"""How many processes can read data beside a rank that keeps an accelerator busy."""

import os

from ..distributed.collectives import world_size

MOST_WORKERS = 16


def spare_cores() -> int:
    """The cores that this process may use, divided by the ranks of the machine, less one for the rank; at most 16.

    The ranks of the machine are `LOCAL_WORLD_SIZE`, which launchers set; without it all ranks count as being here.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
    return max(0, min(MOST_WORKERS, cores // ranks - 1))
