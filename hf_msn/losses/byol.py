"""The loss of BYOL and SimSiam (arXiv 2006.07733, 2011.10566)."""

import torch
import torch.nn.functional as F

from .assignments import at_least_float32, without_autocast


def byol_loss(predictions: torch.Tensor, target_projections: torch.Tensor, *, normalize: bool = True) -> torch.Tensor:
    """Return the squared distance between the prediction of each view and the target of the other one, both ways.

    With q the predictions and z the targets of an image, its two global views being 1 and 2, its S small crops 3 to
    2 + S, and V_t the views other than t (arXiv 2006.07733, equation 2, for S = 0):

        loss = mean over images of sum_{t in {1, 2}} 1 / (1 + S) sum_{v in V_t} |q_v / |q_v| - z_t / |z_t||^2

    Each distance is 2 - 2 cos(q_v, z_t), and the loss is in [0, 8]. SimSiam's, the mean of -cos both ways, has a
    quarter of its gradient. Computed in at least float32, also under autocast.

    Args:
        predictions (`torch.Tensor` of shape `((2+S)*B, D)`): View-major: the first global view of all images, the
            second one, then the small crops one by one.
        target_projections (`torch.Tensor` of shape `(2*B, D)`): The two global views **swapped**: the second ones
            first, so that row i is what prediction i is compared with. Gets no gradient.
        normalize (`bool`, *optional*, defaults to `True`): `False` compares the vectors as they are, as the theory of
            linear networks does (arXiv 2102.06810, equation 1).

    Returns:
        `torch.Tensor`: Scalar: the mean over this rank's images.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_shapes(predictions, target_projections)
    with without_autocast(predictions):
        predictions, targets = at_least_float32(predictions), at_least_float32(target_projections.detach())
        if normalize:
            predictions, targets = F.normalize(predictions, dim=-1), F.normalize(targets, dim=-1)
        views = predictions.unflatten(0, (-1, len(targets) // 2))
        targets = targets.unflatten(0, (2, -1))
        distances = (views[:2] - targets).square().sum(dim=-1).sum(dim=0)  # (B,)
        crops = (views[2:, None] - targets).square().sum(dim=-1).sum(dim=(0, 1))
        return ((distances + crops) / (len(views) - 1)).mean()


def _check_shapes(predictions: torch.Tensor, targets: torch.Tensor) -> None:
    if predictions.ndim != 2 or targets.ndim != 2 or predictions.shape[1] != targets.shape[1]:
        raise ValueError(
            "`byol_loss` takes predictions ((2+S)*B, D) and targets (2*B, D), but got shapes "
            f"{tuple(predictions.shape)} and {tuple(targets.shape)}."
        )
    num_images = len(targets) // 2
    if len(targets) == 0 or len(targets) % 2 or len(predictions) < len(targets) or len(predictions) % num_images:
        raise ValueError(
            f"There are {len(predictions)} predictions for {len(targets)} targets, but there must be 2 targets per "
            "image, and predictions for these and a whole number of small crops, all images of the first view first."
        )
