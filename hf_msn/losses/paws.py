"""The loss of PAWS: predicting view assignments with support samples (arXiv 2104.13963)."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ..distributed.collectives import all_gather_cat, all_reduce_mean
from .assignments import check_temperature, without_autocast
from .soft_nearest_neighbor import log_soft_nearest_neighbor

# Entries of a target below this count as 0 (appendix of the paper): they are noise of the support.
TARGET_FLOOR = 1e-4


class PAWSLossOutput(NamedTuple):
    """The loss of PAWS and its parts. Scalars are in nats.

    Args:
        loss (`torch.Tensor`): Scalar: cross_entropy + me_max_weight * me_max.
        cross_entropy (`torch.Tensor`): Scalar: of this rank's anchors against their targets.
        me_max (`torch.Tensor`): Scalar: minus the entropy of the mean sharpened prediction over all ranks; between
            -log C, where all classes are predicted alike, and 0, where all images fall in one.
        anchor_probabilities (`torch.Tensor` of shape `((2+num_small_crops)*B, C)`): p, with gradient.
        target_probabilities (`torch.Tensor` of shape `(2*B, C)`): The sharpened targets of the two global views,
            without gradient; in the order of the anchors that they are the targets of.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    me_max: torch.Tensor
    anchor_probabilities: torch.Tensor
    target_probabilities: torch.Tensor


def paws_loss(
    anchor_projections: torch.Tensor,
    anchor_supports: torch.Tensor,
    target_projections: torch.Tensor,
    target_supports: torch.Tensor,
    support_labels: torch.Tensor,
    *,
    num_small_crops: int = 6,
    temperature: float = 0.1,
    sharpen_temperature: float = 0.25,
    me_max_weight: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> PAWSLossOutput:
    """Cross-entropy between the class predictions of two views of an image, made by comparison with labelled images.

    With d(z, S) = softmax(normalize(z) normalize(S)^T / temperature) Y over the supports S of **all** ranks with
    labels Y, and rho sharpening by 1 / sharpen_temperature (arXiv 2104.13963, equations 1 to 3):

        loss = mean_i H(target_i, d(anchor_i, S)) - me_max_weight * H(mean_i rho(d(anchor_i, S)))

    The target of a global view is rho(d) of the other one, that of each small crop the mean of the two; entries below
    1e-4 are set to 0, and no gradient goes through targets. The mean in the second term runs over the anchors of all
    ranks. Supports are gathered with gradient: averaging the gradients over the ranks, as
    `DistributedDataParallel` does, gives those of one rank with all anchors and all supports. All ranks must hold
    equally many anchors and equally many supports.

    Computed in logarithms and in at least float32, also under autocast.

    Args:
        anchor_projections (`torch.Tensor` of shape `((2+num_small_crops)*B, D)`): View-major: the first global view of
            all images, the second one, then the small crops one by one.
        anchor_supports (`torch.Tensor` of shape `(N, D)`): This rank's labelled images, by the same head as the
            anchors.
        target_projections (`torch.Tensor` of shape `(2*B, D)`): The two global views **swapped**: the second ones
            first. Gets no gradient.
        target_supports (`torch.Tensor` of shape `(N, D)`): The same labelled images, by the head of the targets. Gets
            no gradient.
        support_labels (`torch.Tensor` of shape `(N, C)`): One-hot or smoothed; the columns mean the same on all ranks.
        num_small_crops (`int`, *optional*, defaults to 6): 0 without multi-crop.
        temperature (`float`, *optional*, defaults to 0.1): tau, above 0.
        sharpen_temperature (`float`, *optional*, defaults to 0.25): T, above 0; smaller is sharper.
        me_max_weight (`float`, *optional*, defaults to 1.0): Weight of the mean-entropy maximisation; 0 turns it off.
        group (`ProcessGroup`, *optional*): The ranks that share supports and mean. By default all.

    Returns:
        [`PAWSLossOutput`]: The total to minimise and its parts.

    Raises:
        ValueError: If a temperature is not above 0, or the shapes do not fit.
    """
    check_temperature("temperature", temperature)
    check_temperature("sharpen_temperature", sharpen_temperature)
    _check_shapes(
        anchor_projections, anchor_supports, target_projections, target_supports, support_labels, num_small_crops
    )

    with without_autocast(anchor_projections):
        labels = all_gather_cat(support_labels, group)
        with torch.no_grad():
            target_log = log_soft_nearest_neighbor(
                target_projections, all_gather_cat(target_supports, group), labels, temperature
            )
            target = torch.log_softmax(target_log / sharpen_temperature, dim=-1).exp()
            first, second = target.chunk(2)
            targets = torch.stack([first, second, *[(first + second) / 2] * num_small_crops])
            targets = torch.where(targets < TARGET_FLOOR, 0.0, targets)

        anchor_log = log_soft_nearest_neighbor(
            anchor_projections, all_gather_cat(anchor_supports, group), labels, temperature
        )
        cross_entropy = -(targets * anchor_log.view_as(targets)).sum(dim=-1).mean()
        sharpened = torch.log_softmax(anchor_log / sharpen_temperature, dim=-1).exp()
        mean = all_reduce_mean(sharpened.mean(dim=0), group)
        # A class that nothing is predicted to be has mean 0 and 0 log 0 = 0; the floor keeps the gradient finite.
        me_max = (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
        loss = cross_entropy + me_max_weight * me_max

    return PAWSLossOutput(loss, cross_entropy, me_max, anchor_log.exp(), targets[:2].flatten(0, 1))


def _check_shapes(anchors, anchor_supports, targets, target_supports, labels, num_small_crops: int) -> None:
    if num_small_crops < 0:
        raise ValueError(f"`num_small_crops` must be >= 0, but is {num_small_crops}. The paper has 6.")
    tensors = (anchors, anchor_supports, targets, target_supports, labels)
    if any(tensor.ndim != 2 for tensor in tensors):
        raise ValueError(
            "`paws_loss` takes anchors ((2+num_small_crops)*B, D), supports (N, D), targets (2*B, D), supports (N, D) "
            f"and labels (N, C), but got shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}."
        )
    if anchors.shape[1] != anchor_supports.shape[1] or targets.shape[1] != target_supports.shape[1]:
        raise ValueError(
            "Anchors and their supports, and targets and theirs, must share their last dimension, but have "
            f"{anchors.shape[1]} and {anchor_supports.shape[1]}, {targets.shape[1]} and {target_supports.shape[1]}."
        )
    if not len(anchor_supports) == len(target_supports) == len(labels) or len(labels) == 0 or labels.shape[1] == 0:
        raise ValueError(
            "Each support needs an embedding for the anchors, one for the targets and a row of labels, and there must "
            f"be at least one, but there are {len(anchor_supports)}, {len(target_supports)} and "
            f"{tuple(labels.shape)}."
        )
    if len(targets) == 0 or len(targets) % 2 or 2 * len(anchors) != (2 + num_small_crops) * len(targets):
        raise ValueError(
            f"With `num_small_crops` {num_small_crops} there must be {2 + num_small_crops} anchors and 2 targets an "
            f"image, but there are {len(anchors)} anchors and {len(targets)} targets."
        )
