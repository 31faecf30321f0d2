"""Flip, colour jitter, grayscale, blur and normalisation of views, on the device of the batch.

[`finish_views`] is the entry. On a CPU it calls the compiled loop of `numba_augmentation`; on an accelerator, or
without numba, the operators of this file, which are torchvision's on float tensors with one factor per view.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional
from transformers.utils import logging

from .view_parameters import (
    BLUR_REACH,
    BRIGHTNESS,
    CONTRAST,
    EQUALIZE,
    FACTORS,
    FLIP,
    GRAY_WEIGHTS,
    GRAYSCALE,
    HUE,
    JITTER,
    NUM_PARAMETERS,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
)

logger = logging.get_logger(__name__)


def finish_views(
    crops: torch.Tensor, parameters: torch.Tensor, mean: Sequence[float], std: Sequence[float], *, colored: bool = True
) -> torch.Tensor:
    """Turn uint8 crops (..., H, W, 3) into float32 views (..., 3, H, W) on the device of the crops.

    `parameters` (..., 12 or 14), float32, has one row per view, with the columns of `view_parameters`. Mean and
    standard deviation are those of values in 0..1. `colored=False` promises that no view has more than a flip.
    """
    leading, device = crops.shape[:-3], crops.device
    crops, parameters = crops.reshape(-1, *crops.shape[-3:]), parameters.reshape(-1, parameters.shape[-1])
    if len(crops) == 0:
        views = torch.empty(0, 3, *crops.shape[1:3], device=device)
    elif not colored:
        views = _normalize(crops, parameters, *_scales(tuple(mean), tuple(std), 255, device))
    else:
        scales = _scales(tuple(mean), tuple(std), 1, device)
        with torch.autocast(device.type, enabled=False):  # bf16 is too coarse for the blur
            if device.type == "cpu" and has_numba():
                views = _finish_views_on_cpu(crops, parameters, *scales)
            else:
                views = finish_views_with_torch(crops, parameters, *scales)
    return views.view(*leading, *views.shape[1:])


def _finish_views_on_cpu(crops: torch.Tensor, parameters: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    from . import numba_augmentation

    views = numba_augmentation.finish_views(crops, parameters[:, :NUM_PARAMETERS], *scales)
    if parameters.shape[1] > NUM_PARAMETERS:  # the compiled loop neither solarizes nor equalizes
        others = (parameters[:, SOLARIZE] <= 1) | (parameters[:, EQUALIZE] > 0)
        if others.any():
            views[others] = finish_views_with_torch(crops[others], parameters[others], *scales)
    return views


def finish_views_with_torch(
    crops: torch.Tensor, parameters: torch.Tensor, multiplier: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Finish crops (N, H, W, 3) with torch's operators. Each operator sees only the views that it changes.

    The parameters are (N, 12), or (N, 14) with solarize and equalize; they are copied to the host once, to group the
    views. `multiplier` and `offset` (3,) normalise values in 0..1 as `value * multiplier - offset`.
    """
    views = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    rows = parameters.cpu()
    operators = {BRIGHTNESS: adjust_brightness, CONTRAST: adjust_contrast, SATURATION: adjust_saturation}
    operators[HUE] = adjust_hue

    def change(selected: torch.Tensor, operator, column: int | None = None) -> None:
        numbers = selected.nonzero().flatten().to(views.device, non_blocking=True)
        if len(numbers):
            factors = [] if column is None else [rows[selected, column].to(views.device, non_blocking=True)]
            views.index_copy_(0, numbers, operator(views.index_select(0, numbers), *factors))

    change(rows[:, FLIP] > 0, lambda views: views.flip(-1))
    for place in range(4):
        for number, operator in operators.items():
            change((rows[:, JITTER] > 0) & (rows[:, ORDER + place] == number), operator, FACTORS + number)
    change(rows[:, GRAYSCALE] > 0, lambda views: gray_values(views).expand_as(views))
    if rows.shape[1] > NUM_PARAMETERS:
        change(rows[:, SOLARIZE] <= 1, solarize, SOLARIZE)
        change(rows[:, EQUALIZE] > 0, equalize)
    radius = math.ceil(BLUR_REACH * rows[:, SIGMA].max().item())  # from the host: the device is not waited for
    change(rows[:, SIGMA] > 0, lambda views, sigma: gaussian_blur(views, sigma, radius), SIGMA)
    return views.mul_(multiplier.view(1, 3, 1, 1)).sub_(offset.view(1, 3, 1, 1))


def gray_values(views: torch.Tensor) -> torch.Tensor:
    """Return the gray values (N, 1, H, W) of views (N, 3, H, W)."""
    red, green, blue = views.unbind(1)
    return (GRAY_WEIGHTS[0] * red).add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2]).unsqueeze(1)


def adjust_brightness(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply views (N, 3, H, W) by factors (N,), clipped to 0..1."""
    return (views * factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale the distance from the view's mean gray value, clipped to 0..1."""
    return _blend(views, gray_values(views).mean(dim=(2, 3), keepdim=True), factors)


def adjust_saturation(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale the distance from the pixel's gray value, clipped to 0..1."""
    return _blend(views, gray_values(views), factors)


def adjust_hue(views: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Shift the hue by a share of the colour circle (N,). HSV's value and chroma are kept."""
    red, green, blue = views.unbind(1)
    value = views.amax(dim=1)
    chroma = value - views.amin(dim=1)
    share = torch.where(chroma > 0, chroma, 1).reciprocal_()
    hue = torch.where(value == green, (blue - red) * share + 2, (red - green) * share + 4)
    hue = torch.where(value == red, (green - blue) * share, hue) + 6 * shifts.view(-1, 1, 1)
    shifted = torch.empty_like(views)
    for channel, place in enumerate((5, 3, 1)):
        k = (hue + place).remainder_(6)
        shifted[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return shifted


def solarize(views: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Invert the values that are at least the threshold of their view (N,)."""
    return torch.where(views >= thresholds.view(-1, 1, 1, 1), 1 - views, views)


def equalize(views: torch.Tensor) -> torch.Tensor:
    """Equalize the histogram of each channel, of values rounded to 8 bits: torchvision's `equalize`."""
    return functional.equalize_image((views * 255).round_().to(torch.uint8)).to(torch.float32).mul_(1 / 255)


def gaussian_blur(views: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """Blur each view (N, C, H, W) with its own sigma (N,), in pixels and above 0. Borders are reflected.

    The kernel ends at `ceil(4 sigma)` pixels; `radius` is at least the largest of these. The blur along one axis,
    borders included, is a matrix; two batched products are faster than a convolution with one kernel per view.
    """
    longest = min(views.shape[-2:]) - 1
    reach = torch.clamp(torch.ceil(BLUR_REACH * sigma), max=longest)
    radius = min(radius, longest)
    distance = torch.arange(-radius, radius + 1, device=views.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2) * (distance.abs() <= reach[:, None])
    weights = weights / weights.sum(dim=1, keepdim=True)
    down, across = (_blur_matrices(weights, distance, side).unsqueeze(1) for side in views.shape[-2:])
    return down @ views @ across.transpose(-1, -2)


@cache
def has_numba() -> bool:
    """Return whether numba is installed. If not, warn once."""
    if find_spec("numba") is not None:
        return True
    logger.warning(
        "numba is not installed: colour and blur of the views run on torch's operators, several times slower on a "
        "CPU. `pip install numba` makes them fast."
    )
    return False


@cache
def _scales(
    mean: tuple[float, ...], std: tuple[float, ...], highest: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    std = torch.tensor(std)
    return (1 / (highest * std)).to(device), (torch.tensor(mean) / std).to(device)


def _normalize(
    crops: torch.Tensor, parameters: torch.Tensor, multiplier: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    flipped = parameters[:, FLIP].bool().view(-1, 1, 1, 1)
    if crops.device.type != "cpu" or flipped.any():  # on an accelerator the test would wait for the device
        crops = torch.where(flipped, crops.flip(-2), crops)
    views = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return views.mul_(multiplier.view(1, 3, 1, 1)).sub_(offset.view(1, 3, 1, 1))


def _blur_matrices(weights: torch.Tensor, distance: torch.Tensor, side: int) -> torch.Tensor:
    source = (torch.arange(side, device=weights.device)[:, None] + distance).abs()
    source = torch.where(source < side, source, 2 * (side - 1) - source)
    places = F.one_hot(source, side).to(weights.dtype)  # (side, kernel, side)
    return torch.einsum("nk,skt->nst", weights, places)


def _blend(views: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    factors = factors.view(-1, 1, 1, 1)
    return (views * factors).add_((1 - factors) * others).clamp_(0, 1)
