"""Soft assignments of embeddings to prototypes or to labelled supports, shared by MSN and PAWS.

Everything here computes in at least float32, whatever the input and whatever autocast is on: the exponents reach
1 / (temperature * sharpen_temperature), far beyond what half precision holds.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..distributed.collectives import all_gather_cat


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
    check_temperature("temperature", temperature)
    if supports.shape[0] != support_labels.shape[0]:
        raise ValueError(
            f"`supports` has {supports.shape[0]} rows and `support_labels` {support_labels.shape[0]}, "
            "but each support needs one row of labels."
        )
    with without_autocast(queries):
        similarities = log_assignments(queries, supports, temperature)
        return similarities.exp() @ support_labels.to(similarities.dtype)


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
