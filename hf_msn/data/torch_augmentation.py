"""Colour, blur and normalisation of views by torch's operators, a batch at a time: on accelerators, or without numba.

The operators are those of torchvision on float tensors, with one factor for each view.
"""

import math

import torch
import torch.nn.functional as F

from .view_parameters import (
    BLUR_REACH,
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    FLIP,
    GRAY_WEIGHTS,
    GRAYSCALE,
    HUE,
    JITTER,
    ORDER,
    SATURATION,
    SIGMA,
)


def finish_views(
    crops: torch.Tensor, parameters: torch.Tensor, multiplier: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Flip, colour jitter, gray, blur and normalisation of N views; each operator sees only the views that it changes.

    Args:
        crops (`torch.Tensor` of shape (N, H, W, 3), uint8):
            On any device, where all the work is done.
        parameters (`torch.Tensor` of shape (N, 12), float32):
            The columns are those of `view_parameters`. They are read once from the device, to group the views.
        multiplier, offset (`torch.Tensor` of shape (3,), float32):
            The result is `value * multiplier - offset` for values in 0..1. On the device of the crops.

    Returns:
        `torch.Tensor` of shape (N, 3, H, W), float32.
    """
    views = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    known = parameters.cpu()
    operators = {BRIGHTNESS: adjust_brightness, CONTRAST: adjust_contrast, SATURATION: adjust_saturation}
    operators[HUE] = adjust_hue

    def change(which: torch.Tensor, operator, column: int | None = None) -> None:
        rows = which.nonzero().flatten().to(views.device, non_blocking=True)
        if len(rows):
            changed = views.index_select(0, rows)
            arguments = [] if column is None else [known[which, column].to(views.device, non_blocking=True)]
            views.index_copy_(0, rows, operator(changed, *arguments))

    change(known[:, FLIP] > 0, lambda flipped: flipped.flip(-1))
    for place in range(4):
        for number, operator in operators.items():
            change((known[:, JITTER] > 0) & (known[:, ORDER + place] == number), operator, FACTORS + number)
    change(known[:, GRAYSCALE] > 0, lambda coloured: gray_values(coloured).expand_as(coloured))
    blurred = known[:, SIGMA] > 0
    if blurred.any():
        radius = math.ceil(BLUR_REACH * known[:, SIGMA].max().item())
        change(blurred, lambda sharp, sigma: gaussian_blur(sharp, sigma, radius), SIGMA)
    return views.mul_(multiplier.view(1, 3, 1, 1)).sub_(offset.view(1, 3, 1, 1))


def gray_values(views: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) to (N, 1, H, W)."""
    red, green, blue = views.unbind(1)
    return (GRAY_WEIGHTS[0] * red).add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2]).unsqueeze(1)


def adjust_brightness(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) times its (N,) factors, clipped to 0..1."""
    return (views * _each(factors)).clamp_(0, 1)


def adjust_contrast(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Moves the values away from the view's mean gray value by the factors, clipped to 0..1."""
    return _blend(views, gray_values(views).mean(dim=(2, 3), keepdim=True), factors)


def adjust_saturation(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Moves the values away from the pixel's gray value by the factors, clipped to 0..1."""
    return _blend(views, gray_values(views), factors)


def adjust_hue(views: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns the hue by a share of the whole circle, keeping HSV's value and chroma."""
    red, green, blue = views.unbind(1)
    value = views.amax(dim=1)
    chroma = value - views.amin(dim=1)
    share = torch.where(chroma > 0, chroma, 1).reciprocal_()
    hue = torch.where(value == green, (blue - red) * share + 2, (red - green) * share + 4)
    hue = torch.where(value == red, (green - blue) * share, hue) + 6 * turns.view(-1, 1, 1)
    turned = torch.empty_like(views)
    for channel, place in enumerate((5, 3, 1)):
        k = (hue + place).remainder_(6)
        turned[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return turned


def gaussian_blur(views: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """Blurs each view by its own Gaussian, whose kernel ends at `ceil(4 sigma)` pixels, with reflected borders.

    A blur with its borders is a matrix; two batched products are faster than a convolution with a kernel a view.

    Args:
        views (`torch.Tensor` of shape (N, C, H, W)):
            Values of any range.
        sigma (`torch.Tensor` of shape (N,)):
            Standard deviations in pixels, above 0.
        radius (`int`):
            At least the largest of `ceil(4 sigma)`.
    """
    reach = torch.clamp(torch.ceil(BLUR_REACH * sigma), max=min(views.shape[-2:]) - 1)
    radius = min(radius, min(views.shape[-2:]) - 1)
    distance = torch.arange(-radius, radius + 1, device=views.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2) * (distance.abs() <= reach[:, None])
    weights = weights / weights.sum(dim=1, keepdim=True)
    down, across = (_blur_matrices(weights, distance, side).unsqueeze(1) for side in views.shape[-2:])
    return down @ views @ across.transpose(-1, -2)


def _blur_matrices(weights: torch.Tensor, distance: torch.Tensor, side: int) -> torch.Tensor:
    source = (torch.arange(side, device=weights.device)[:, None] + distance).abs()
    source = torch.where(source < side, source, 2 * (side - 1) - source)
    places = F.one_hot(source, side).to(weights.dtype)  # (side, kernel, side)
    return torch.einsum("nk,skt->nst", weights, places)


def _blend(views: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    factors = _each(factors)
    return (views * factors).add_((1 - factors) * others).clamp_(0, 1)


def _each(factors: torch.Tensor) -> torch.Tensor:
    return factors.view(-1, 1, 1, 1)
