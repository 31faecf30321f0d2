"""Contrastive losses: NT-Xent of SimCLR (arXiv 2002.05709) and SuNCEt (arXiv 2006.10803)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..distributed.collectives import all_gather_cat, rank
from .assignments import at_least_float32, check_temperature, log_mean_labels, without_autocast


def nt_xent_loss(
    projections: torch.Tensor,
    *,
    temperature: float = 0.1,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy: each view has to find the other view of its image.

    With s_ij the cosine of rows i and j, and j running over the views of **all** ranks (arXiv 2002.05709, equation 1):

        loss = mean_i -log( exp(s_i,pair(i) / temperature) / sum_{j != i} exp(s_ij / temperature) )

    As in the authors' code of SuNCEt, the gradient goes through row i alone: the rows j that it is compared with count
    as constants. Each pair comes up both as (i, j) and as (j, i), so that every row still learns from every other.

    Args:
        projections (`torch.Tensor` of shape `(2*B, D)`): The first view of all images of this rank, then the second.
        temperature (`float`, *optional*, defaults to 0.1): tau, above 0.
        group (`ProcessGroup`, *optional*): The ranks whose views are compared; equally many on each. By default all.

    Returns:
        `torch.Tensor`: Scalar, in nats: the mean over this rank's views. The mean over ranks, and the gradient that
        `DistributedDataParallel` averages, are those of one rank with all images.

    Raises:
        ValueError: If the temperature is not above 0, or the rows are not two views an image.
    """
    check_temperature("temperature", temperature)
    if projections.ndim != 2 or len(projections) == 0 or len(projections) % 2:
        raise ValueError(
            "`nt_xent_loss` takes the first views of all images, then their second views, (2*B, D), but got shape "
            f"{tuple(projections.shape)}."
        )
    num_rows = len(projections)
    with without_autocast(projections):
        queries = F.normalize(at_least_float32(projections), dim=-1)
        keys = all_gather_cat(queries.detach(), group)
        own = rank(group) * num_rows + torch.arange(num_rows, device=queries.device)
        similarities = _without_self(queries @ keys.T / temperature, own)
        return F.cross_entropy(similarities, own.roll(num_rows // 2))


def suncet_loss(
    projections: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.1,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Supervised noise-contrastive estimation: each labelled image has to find those of its class.

    With s_ij the cosine of rows i and j, j running over the labelled images of **all** ranks, and one-hot labels
    (arXiv 2006.10803, equation 1):

        loss = mean_i -log( sum_{j != i, y_j = y_i} exp(s_ij / temperature) / sum_{j != i} exp(s_ij / temperature) )

    With soft labels Y: the cross-entropy of p_i = softmax_{j != i}(s_ij / temperature) Y with Y_i.

    Args:
        projections (`torch.Tensor` of shape `(N, D)`): Of this rank's labelled images.
        labels (`torch.Tensor` of shape `(N, C)`): One-hot or smoothed; the columns mean the same on all ranks.
        temperature (`float`, *optional*, defaults to 0.1): tau, above 0.
        group (`ProcessGroup`, *optional*): The ranks whose images are compared; equally many on each. By default all.

    Returns:
        `torch.Tensor`: Scalar, in nats: the mean over this rank's images. The mean over ranks, and the gradient that
        `DistributedDataParallel` averages, are those of one rank with all images.

    Raises:
        ValueError: If the temperature is not above 0, the shapes do not fit, or an image is the only one of its class.
    """
    check_temperature("temperature", temperature)
    if projections.ndim != 2 or labels.ndim != 2 or len(projections) != len(labels) or len(labels) == 0:
        raise ValueError(
            "`suncet_loss` takes projections (N, D) and labels (N, C) with N >= 1, but got shapes "
            f"{tuple(projections.shape)} and {tuple(labels.shape)}."
        )
    with without_autocast(projections):
        queries = F.normalize(at_least_float32(projections), dim=-1)
        labels = labels.to(queries.dtype)
        keys, key_labels = all_gather_cat(queries, group), all_gather_cat(labels, group)
        _check_positives(labels, key_labels)
        own = rank(group) * len(queries) + torch.arange(len(queries), device=queries.device)
        log_weights = torch.log_softmax(_without_self(queries @ keys.T / temperature, own), dim=-1)
        return -(labels * log_mean_labels(log_weights, key_labels)).sum(dim=-1).mean()


def _without_self(similarities: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Sets the similarity of each row to itself, which is column `own`, so low that its exponential is 0."""
    return similarities.scatter(1, own.unsqueeze(1), torch.finfo(similarities.dtype).min / 2)


def _check_positives(labels: torch.Tensor, key_labels: torch.Tensor) -> None:
    others = (key_labels.sum(dim=0) - labels) * labels
    alone = others.sum(dim=1) <= 0
    if alone.any():
        raise ValueError(
            f"{int(alone.sum())} of {len(labels)} labelled images are the only one of their class, but SuNCEt "
            "compares each with others of its class. Give at least 2 images, or 2 views, a class."
        )
