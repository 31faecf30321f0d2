"""Sinkhorn-Knopp balancing of assignments (arXiv 1306.0895), as MSN uses it for its targets."""

import torch
import torch.distributed as dist

from ..checks import check_integer
from ..distributed.collectives import all_gather_cat
from .assignments import at_least_float32


def sinkhorn(probabilities: torch.Tensor, iterations: int = 3, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Balance assignments so that every prototype gets the same mass, by Sinkhorn-Knopp iterations.

    Each iteration scales the columns to equal sums over the batches of **all** ranks, then each row to 1.

    Args:
        probabilities (`torch.Tensor` of shape `(B, K)`): Assignments of this rank's images. An entry of 0 counts as
            the smallest normal number, so that a prototype that nobody uses gives no 0 / 0.
        iterations (`int`, *optional*, defaults to 3): At least 1; MSN uses 3.
        group (`ProcessGroup`, *optional*): The ranks whose images share the prototypes.

    Returns:
        `torch.Tensor` of shape `(B, K)`: Rows that sum to 1, in at least float32, without gradient.

    Raises:
        ValueError: If there are fewer than 1 iterations.
    """
    with torch.no_grad():
        probabilities = at_least_float32(probabilities)
        floor = torch.finfo(probabilities.dtype).tiny
        return log_sinkhorn(probabilities.clamp_min(floor).log(), iterations, group).exp()


def log_sinkhorn(
    log_probabilities: torch.Tensor, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return the logarithm of [`sinkhorn`] from log-probabilities `(B, K)`: exact where probabilities underflow."""
    check_integer("iterations", iterations, meaning="counts Sinkhorn iterations", remedy="MSN uses 3.")
    with torch.no_grad():
        for _ in range(iterations):
            # The constants of the usual form (columns 1 / K, rows 1 / B) cancel, as the rows come last.
            columns = torch.logsumexp(log_probabilities, dim=0, keepdim=True)
            columns = torch.logsumexp(all_gather_cat(columns, group), dim=0, keepdim=True)
            log_probabilities = torch.log_softmax(log_probabilities - columns, dim=-1)
    return log_probabilities
