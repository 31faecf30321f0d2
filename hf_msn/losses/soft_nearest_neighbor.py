"""Class probabilities by comparison with labelled embeddings, as PAWS predicts (arXiv 2104.13963)."""

import math

import torch
from torch.utils.checkpoint import checkpoint

from .assignments import at_least_float32, check_temperature, log_assignments, without_autocast

# Elements of one block of the exact, slower path to a log-probability.
_MOST_ELEMENTS = 2**24


def soft_nearest_neighbor(
    queries: torch.Tensor, supports: torch.Tensor, support_labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return class probabilities of the queries: a similarity-weighted mean of the supports' labels.

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
    """Return the logarithm of [`soft_nearest_neighbor`], exact at any temperature; `(B, C)`.

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
    """Return log(exp(log_weights) @ labels) without underflow: `(B, N)`, `(N, C)` -> `(B, C)`.

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
    """Raise probabilities to the power 1 / temperature and renormalise them over the last dimension.

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
