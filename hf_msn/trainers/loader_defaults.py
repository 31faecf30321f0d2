"""How many processes read data where nobody says it, and whether to pin memory."""

import os

import torch

from ..data.spare_cores import spare_cores


def uses_accelerator(use_cpu: bool) -> bool:
    """Whether training will run on an accelerator such as a GPU."""
    told_not_to = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return not told_not_to and torch.accelerator.is_available()


def default_num_workers(has_accelerator: bool, loaders: int = 1) -> int:
    """Processes that read data for one loader of this rank.

    With an accelerator: [`~hf_msn.data.spare_cores.spare_cores`], shared among its loaders. Without one: 0, as the
    model's own threads already use every core, and workers would take them away and be started for nothing in short
    runs.

    Args:
        has_accelerator (`bool`):
            Result of [`uses_accelerator`].
        loaders (`int`, *optional*, defaults to 1):
            Loaders that read at the same time: 2 with a support set.
    """
    return spare_cores() // loaders if has_accelerator else 0
