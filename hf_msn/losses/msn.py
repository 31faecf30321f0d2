"""The loss of Masked Siamese Networks (arXiv 2204.07141)."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..distributed.collectives import all_reduce_mean
from .assignments import check_temperature, log_assignments, without_autocast
from .sinkhorn import log_sinkhorn


class MSNLossOutput(NamedTuple):
    """The loss of MSN and its parts. Scalars are in nats.

    Args:
        loss (`torch.Tensor`): Scalar: cross_entropy + me_max_weight * me_max + entropy_weight * entropy.
        cross_entropy (`torch.Tensor`): Scalar: of this rank's anchors against their targets.
        me_max (`torch.Tensor`): Scalar: log K minus the entropy of the mean anchor assignment over all ranks; 0 when
            all prototypes are used alike, log K when all images share one.
        entropy (`torch.Tensor`): Scalar: mean entropy of this rank's anchor assignments.
        anchor_probabilities (`torch.Tensor` of shape `(V*B, K)`): p, with gradient.
        target_probabilities (`torch.Tensor` of shape `(B, K)`): The sharpened targets, without gradient.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    me_max: torch.Tensor
    entropy: torch.Tensor
    anchor_probabilities: torch.Tensor
    target_probabilities: torch.Tensor


def msn_loss(
    anchor_projections: torch.Tensor,
    target_projections: torch.Tensor,
    prototypes: torch.Tensor,
    *,
    temperature: float = 0.1,
    sharpen_temperature: float = 0.25,
    use_sinkhorn: bool = False,
    me_max_weight: float = 1.0,
    entropy_weight: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> MSNLossOutput:
    """Cross-entropy between the prototype assignments of anchors and targets, with mean-entropy maximisation.

    With p = softmax(normalize(z) normalize(Q)^T / temperature) for anchors and, sharpened by 1 / sharpen_temperature
    and without gradient, for targets (arXiv 2204.07141, equation 1 and section 3):

        loss = mean_{b,v} H(target_b, p_bv) + me_max_weight * (log K - H(mean_{b,v} p_bv)) + entropy_weight * mean H(p)

    The mean inside the second term runs over the batches of all ranks; its gradient is such that averaging over ranks,
    as `DistributedDataParallel` does, gives the gradient of one rank with the concatenated batch. All ranks must hold
    batches of the same size.

    Computed in logarithms and in at least float32, also under autocast: a sharpened probability underflows long before
    its logarithm does.

    Args:
        anchor_projections (`torch.Tensor` of shape `(V*B, D)`): View-major: all images of the first view, then of
            the second.
        target_projections (`torch.Tensor` of shape `(B, D)`): Gets no gradient.
        prototypes (`torch.Tensor` of shape `(K, D)`): Gets its gradient through the anchors only.
        temperature (`float`, *optional*, defaults to 0.1): tau, above 0.
        sharpen_temperature (`float`, *optional*, defaults to 0.25): T, above 0; smaller is sharper.
        use_sinkhorn (`bool`, *optional*, defaults to `False`): Balance the targets over the prototypes, 3 iterations
            over all ranks.
        me_max_weight (`float`, *optional*, defaults to 1.0): lambda. The paper has 5 without Sinkhorn.
        entropy_weight (`float`, *optional*, defaults to 0.0): Weight of the entropy of single assignments.
        group (`ProcessGroup`, *optional*): The ranks that share the mean and the Sinkhorn marginals. By default all.

    Returns:
        [`MSNLossOutput`]: The total to minimise and its parts.

    Raises:
        ValueError: If a temperature is not above 0, or the shapes do not fit.
    """
    check_temperature("temperature", temperature)
    check_temperature("sharpen_temperature", sharpen_temperature)
    _check_shapes(anchor_projections, target_projections, prototypes)
    num_images, num_prototypes = target_projections.shape[0], prototypes.shape[0]

    with without_autocast(anchor_projections):
        with torch.no_grad():
            target_log = log_assignments(target_projections, prototypes, temperature)
            target_log = torch.log_softmax(target_log / sharpen_temperature, dim=-1)
            if use_sinkhorn:
                target_log = log_sinkhorn(target_log, group=group)
            target = target_log.exp()

        anchor_log = log_assignments(anchor_projections, prototypes, temperature)
        anchor = anchor_log.exp()
        views = anchor_log.view(-1, num_images, num_prototypes)
        cross_entropy = -(target * views).sum(dim=-1).mean()
        entropy = -(anchor * anchor_log).sum(dim=-1).mean()
        mean = all_reduce_mean(anchor.mean(dim=0), group)
        # An unused prototype has mean 0 and 0 log 0 = 0; the floor keeps the logarithm and its gradient finite.
        mean_log = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        me_max = math.log(num_prototypes) + (mean * mean_log).sum()
        loss = cross_entropy + me_max_weight * me_max + entropy_weight * entropy

    return MSNLossOutput(loss, cross_entropy, me_max, entropy, anchor, target)


def _check_shapes(anchors: torch.Tensor, targets: torch.Tensor, prototypes: torch.Tensor) -> None:
    if anchors.ndim != 2 or targets.ndim != 2 or prototypes.ndim != 2:
        raise ValueError(
            "`msn_loss` takes anchors (V*B, D), targets (B, D) and prototypes (K, D), but got shapes "
            f"{tuple(anchors.shape)}, {tuple(targets.shape)} and {tuple(prototypes.shape)}."
        )
    if not anchors.shape[1] == targets.shape[1] == prototypes.shape[1]:
        raise ValueError(
            "Anchors, targets and prototypes must share their last dimension, but have "
            f"{anchors.shape[1]}, {targets.shape[1]} and {prototypes.shape[1]}."
        )
    if len(anchors) == 0 or len(targets) == 0 or len(prototypes) == 0 or len(anchors) % len(targets) != 0:
        raise ValueError(
            f"There are {len(anchors)} anchors for {len(targets)} targets and {len(prototypes)} prototypes, but each "
            "must be at least one and the anchors a whole number of views of the targets' images, all of the first "
            "view first."
        )
