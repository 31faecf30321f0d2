"""Crops of views: draw the boxes, cut them out of the image, resize them to squares of uint8."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CROP_ATTEMPTS = 10
# Images with a shorter side of at least this are cropped at whole pixels, as in torchvision. In smaller ones rounding
# to a pixel would matter.
WHOLE_PIXELS_FROM = 64


def crop_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    random: list[float],
    whole_pixels: bool,
) -> Box:
    """Return a box of random area and aspect ratio: torchvision's `RandomResizedCrop`, from given random numbers.

    `random` holds numbers in [0, 1), four per attempt, ten attempts. `size` is width and height of the image; `scale`
    bounds the share of its area, `aspect_ratio` width / height.
    """
    image_width, image_height = size
    log_ratio = (math.log(aspect_ratio[0]), math.log(aspect_ratio[1]))
    for attempt in range(0, 4 * CROP_ATTEMPTS, 4):
        area = image_width * image_height * between(scale, random[attempt])
        ratio = math.exp(between(log_ratio, random[attempt + 1]))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if whole_pixels:
            width, height = round(width), round(height)
            if 0 < width <= image_width and 0 < height <= image_height:
                left = int(random[attempt + 2] * (image_width - width + 1))
                top = int(random[attempt + 3] * (image_height - height + 1))
                return left, top, left + width, top + height
        elif width <= image_width and height <= image_height:
            left = random[attempt + 2] * (image_width - width)
            top = random[attempt + 3] * (image_height - height)
            return left, top, min(left + width, image_width), min(top + height, image_height)
    # no crop fits a very long image: take its middle, at the nearest allowed ratio
    ratio = min(max(image_width / image_height, aspect_ratio[0]), aspect_ratio[1])
    width, height = min(image_width, image_height * ratio), min(image_height, image_width / ratio)
    if whole_pixels:
        width, height = max(1, round(width)), max(1, round(height))
        left, top = (image_width - width) // 2, (image_height - height) // 2
    else:
        left, top = (image_width - width) / 2, (image_height - height) / 2
    return left, top, left + width, top + height


def pixels_of(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an RGB image: (1, 3, H, W), uint8, channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)


def whole_pixel_crops(pixels: torch.Tensor, boxes: list[Box], size: int, interpolation: str) -> torch.Tensor:
    """Cut boxes of whole pixels and resize with antialiasing: torchvision's `resized_crop` on uint8, to the bit.

    `pixels` (1, 3, H, W) are from [`pixels_of`]; returns (len(boxes), size, size, 3), uint8. Channels last is Pillow's
    layout, and the one for which torch's kernel is five times as fast as Pillow's.
    """
    crops = torch.empty(len(boxes), size, size, 3, dtype=torch.uint8)
    for crop, (left, top, right, bottom) in zip(crops, boxes):
        source = pixels[:, :, top:bottom, left:right]
        if source.shape[-2:] != (size, size):
            source = source.contiguous(memory_format=torch.channels_last)
            source = F.interpolate(source, (size, size), mode=interpolation, antialias=True, align_corners=False)
        crop.copy_(source[0].permute(1, 2, 0))
    return crops


def fine_crops(image: Image.Image, boxes: list[Box], size: int, interpolation: str) -> torch.Tensor:
    """Cut boxes that may begin and end within pixels, with Pillow. Shapes as in [`whole_pixel_crops`]."""
    resampling = INTERPOLATIONS[interpolation]
    return _stack([image.resize((size, size), resampling, box=box) for box in boxes], size)


def rotated_crops(
    image: Image.Image,
    boxes: list[Box],
    size: int,
    interpolation: str,
    angles: list[float],
    shifts: list[tuple[float, float]],
) -> torch.Tensor:
    """Cut boxes that are rotated by `angles` (radians) and moved by `shifts` (shares of their sides)."""
    resampling, views = INTERPOLATIONS[interpolation], []
    for (left, top, right, bottom), angle, shift in zip(boxes, angles, shifts):
        center_x = (left + right) / 2 - shift[0] * (right - left)
        center_y = (top + bottom) / 2 - shift[1] * (bottom - top)
        # an affine transform does not antialias: rotate larger crops at full resolution, then resize
        reduces = max(right - left, bottom - top) > size
        out = (max(1, round(right - left)), max(1, round(bottom - top))) if reduces else (size, size)
        step_x, step_y = (right - left) / out[0], (bottom - top) / out[1]
        cos, sin = math.cos(angle), math.sin(angle)
        # Pillow asks for the map from result to source: center + rotation @ (step * (out - out_center))
        a, b = cos * step_x, -sin * step_y
        d, e = sin * step_x, cos * step_y
        c = center_x - (a * out[0] + b * out[1]) / 2
        f = center_y - (d * out[0] + e * out[1]) / 2
        view = image.transform(out, Image.Transform.AFFINE, (a, b, c, d, e, f), resampling, fillcolor=0)
        views.append(view.resize((size, size), resampling) if reduces else view)
    return _stack(views, size)


def between(bounds: tuple[float, float], share: float) -> float:
    """Return the number at a share of the way from the first bound to the second."""
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _stack(views: list[Image.Image], size: int) -> torch.Tensor:
    if not views:
        return torch.empty(0, size, size, 3, dtype=torch.uint8)
    return torch.from_numpy(np.stack([np.asarray(view) for view in views]))
