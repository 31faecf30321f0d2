"""SuNCEt, the supervised contrastive loss on labelled images (arXiv 2006.10803)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..distributed.collectives import all_gather_cat, rank
from .assignments import at_least_float32, check_temperature, without_autocast
from .simclr import without_self
from .soft_nearest_neighbor import log_mean_labels


def suncet_loss(
    projections: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.1,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the supervised noise-contrastive estimation: each labelled image has to find those of its class.

    With s_ij the cosine of rows i and j, j running over the labelled images of **all** ranks, and one-hot labels
    (arXiv 2006.10803, equation 1):

        loss = mean_i -log( sum_{j != i, y_j = y_i} exp(s_ij / temperature) / sum_{j != i} exp(s_ij / temperature) )

    With soft labels Y: the cross-entropy of p_i = softmax_{j != i}(s_ij / temperature) Y with Y_i.

    Args:
        projections (`torch.Tensor` of shape `(N, D)`): Projections of this rank's labelled images.
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
        log_weights = torch.log_softmax(without_self(queries @ keys.T / temperature, own), dim=-1)
        return -(labels * log_mean_labels(log_weights, key_labels)).sum(dim=-1).mean()


def _check_positives(labels: torch.Tensor, key_labels: torch.Tensor) -> None:
    others = (key_labels.sum(dim=0) - labels) * labels
    alone = others.sum(dim=1) <= 0
    if alone.any():
        raise ValueError(
            f"{int(alone.sum())} of {len(labels)} labelled images are the only one of their class, but SuNCEt "
            "compares each with others of its class. Give at least 2 images per class, or 2 views per image."
        )
