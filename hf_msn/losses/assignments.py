"""Soft assignments of embeddings to prototypes or to labelled supports, shared by MSN and PAWS.

Everything here computes in at least float32, whatever the input and whatever autocast is on: the exponents reach
1 / (temperature * sharpen_temperature), far beyond what half precision holds.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..distributed.collectives import all_gather_cat

# Of one block of the exact, slower way to a log-probability.
_MOST_ELEMENTS = 2**24


def soft_nearest_neighbor(
    queries: torch.Tensor, supports: torch.Tensor, support_labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Class probabilities of the queries: a similarity-weighted mean of the supports' labels.

    d(z, S) = softmax(z S^T / temperature) Y with l2-normalised z and S (PAWS, arXiv 2104.13963, equation 1).

    Args:
        queries (`torch.Tensor` of shape `(B, D)`): Embeddings to classify.
        supports (`torch.Tensor` of shape `(N, D)`): Embeddings of the labelled images.
        support_labels (`torch.Tensor` of shape `(N, C)`): Their one-hot or smoothed labels.
        temperature (`float`): Above 0; the paper uses 0.1.

    Returns:
        `torch.Tensor` of shape `(B, C)`: Rows that sum to 1 if those of `support_labels` do.

    Raises:
        ValueError: If the temperature is not above 0 or the shapes do not fit.
    """
    with without_autocast(queries):
        return log_soft_nearest_neighbor(queries, supports, support_labels, temperature).exp()


def log_soft_nearest_neighbor(
    queries: torch.Tensor, supports: torch.Tensor, support_labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Logarithm of [`soft_nearest_neighbor`], exact at any temperature; `(B, C)`.

    A class that no support has gets the logarithm of the smallest normal number instead of minus infinity, so that its
    product with a target of 0 is 0.
    """
    check_temperature("temperature", temperature)
    if supports.shape[0] != support_labels.shape[0]:
        raise ValueError(
            f"`supports` has {supports.shape[0]} rows and `support_labels` {support_labels.shape[0]}, "
            "but each support needs one row of labels."
        )
    return log_mean_labels(log_assignments(queries, supports, temperature), support_labels)


def log_mean_labels(log_weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log(exp(log_weights) @ labels) without underflow: `(B, N)`, `(N, C)` -> `(B, C)`.

    One matrix product does for every row in which no class is too far from the nearest support. The rows in which one
    is take the logarithm of the sum class by class; at tau = 0.1 and one-hot labels there are none.
    """
    labels = labels.to(log_weights.dtype)
    limits = torch.finfo(log_weights.dtype)
    absent = (labels == 0).all(dim=0)
    # Normal numbers reach down to `tiny`; a sum above its root has lost nothing to underflow, whatever the summands.
    floor = limits.tiny**0.75
    mean = torch.where(absent, limits.tiny, log_weights.exp() @ labels)
    far = ((mean < floor) & ~absent).any(dim=1)
    if not far.any():
        return mean.log()
    log_mean = torch.empty_like(mean)
    log_mean[~far] = mean[~far].log()
    log_labels = torch.where(absent, math.log(limits.tiny), labels.log())
    rows = log_weights[far].split(max(1, _MOST_ELEMENTS // labels.numel()))
    log_mean[far] = torch.cat([checkpoint(_log_mean_of_rows, part, log_labels, use_reentrant=False) for part in rows])
    return log_mean


def _log_mean_of_rows(log_weights: torch.Tensor, log_labels: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(log_weights.unsqueeze(-1) + log_labels, dim=1)


def sharpen(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities raised to the power 1 / temperature and renormalised over the last dimension.

    Args:
        probabilities (`torch.Tensor` of shape `(..., K)`): Non-negative, at least one entry of each row above 0.
        temperature (`float`): Above 0. Below 1 sharpens, 1 leaves the probabilities as they are. MSN uses 0.25.

    Returns:
        `torch.Tensor` of shape `(..., K)`: In at least float32.

    Raises:
        ValueError: If the temperature is not above 0.
    """
    check_temperature("temperature", temperature)
    with without_autocast(probabilities):
        probabilities = at_least_float32(probabilities)
        # Relative to the largest entry, the power cannot make a whole row underflow to 0 / 0.
        relative = probabilities / probabilities.detach().amax(dim=-1, keepdim=True)
        powers = relative ** (1.0 / temperature)
        return powers / powers.sum(dim=-1, keepdim=True)


def sinkhorn(probabilities: torch.Tensor, iterations: int = 3, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Balances assignments so that every prototype gets the same mass, by Sinkhorn-Knopp iterations.

    Each iteration scales the columns to equal sums over the batches of **all** ranks, then each row to 1.

    Args:
        probabilities (`torch.Tensor` of shape `(B, K)`): Assignments of this rank's images. An entry of 0 counts as
            the smallest normal number, so that a prototype that nobody uses gives no 0 / 0.
        iterations (`int`, *optional*, defaults to 3): At least 1.
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
    """`sinkhorn` of logarithms `(B, K)`, to logarithms: exact where the probabilities themselves would underflow."""
    if iterations < 1:
        raise ValueError(f"`iterations` of Sinkhorn must be >= 1, but is {iterations}. MSN uses 3.")
    with torch.no_grad():
        for _ in range(iterations):
            # The constants of the usual form (columns 1 / K, rows 1 / B) cancel, as the rows come last.
            columns = torch.logsumexp(log_probabilities, dim=0, keepdim=True)
            columns = torch.logsumexp(all_gather_cat(columns, group), dim=0, keepdim=True)
            log_probabilities = torch.log_softmax(log_probabilities - columns, dim=-1)
    return log_probabilities


def log_assignments(embeddings: torch.Tensor, centers: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(normalize(embeddings) normalize(centers)^T / temperature): `(B, D)`, `(K, D)` -> `(B, K)`."""
    embeddings, centers = at_least_float32(embeddings), at_least_float32(centers)
    similarities = F.normalize(embeddings, dim=-1) @ F.normalize(centers, dim=-1).T
    return torch.log_softmax(similarities / temperature, dim=-1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself if it is float32 or float64, else a float32 copy."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """A context in which products of `tensor` keep its precision."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def check_temperature(name: str, value: float) -> None:
    """Raises a `ValueError` that names the setting unless `value` is above 0."""
    if not value > 0:
        raise ValueError(f"`{name}` divides similarities or logarithms and must be > 0, but is {value}.")
