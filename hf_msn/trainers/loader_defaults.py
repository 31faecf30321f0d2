"""How many processes read data where nobody says it, and whether to pin memory."""

import os

import torch

MOST_WORKERS = 16


def uses_accelerator(use_cpu: bool) -> bool:
    """Whether training will run on an accelerator such as a GPU."""
    told_not_to = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return not told_not_to and torch.accelerator.is_available()


def default_num_workers(has_accelerator: bool, loaders: int = 1) -> int:
    """Processes that read data for one loader of this rank.

    With an accelerator: the cores that this process may use, divided by the ranks of the machine (`LOCAL_WORLD_SIZE`),
    less one for the rank itself, at most 16, shared among its loaders. Without one: 0, as the model's own
    threads already use every core, and workers would take them away and be started for nothing in short runs.

    Args:
        has_accelerator (`bool`):
            Result of [`uses_accelerator`].
        loaders (`int`, *optional*, defaults to 1):
            Loaders that read at the same time: 2 with a support set.
    """
    if not has_accelerator:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_this_rank = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return max(0, min(MOST_WORKERS, of_this_rank - 1) // loaders)
