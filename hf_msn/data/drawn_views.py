"""The views of one image with all that is random about them decided: before the image is read, as it says how."""

import math
from typing import TYPE_CHECKING

import torch
from PIL import Image

from . import view_parameters
from .crops import WHOLE_PIXELS_FROM, Box, between, crop_box, fine_crops, pixels_of, turned_crops, whole_pixel_crops

if TYPE_CHECKING:
    from .transforms import MultiViewTransform

# one row of random numbers for each view: four for each attempt to crop, then one for each other choice
_FLIP, _JITTER, _STRENGTHS, _ORDER, _GRAYSCALE, _BLUR, _RADIUS, _ANGLE, _SHIFT = 40, 41, 42, 46, 50, 51, 52, 53, 54
_NUM_RANDOM = 56

_REDUCTIONS = (8, 4, 2)  # what the decoder of JPEG can divide the sides by


class DrawnViews:
    """Views that are drawn but not cut. [`~hf_msn.data.MultiViewTransform.draw`] makes them.

    Args:
        transform ([`~hf_msn.data.MultiViewTransform`]):
            Says from what ranges. The numbers come from torch's global generator.
        groups (`list[tuple[str, int, bool]]`):
            Name of the crops, number of views, and whether they are focal ones.
        parameters_name (`str`, *optional*, defaults to `"view_parameters"`):
            What the rows of parameters are called.
    """

    def __init__(
        self,
        transform: "MultiViewTransform",
        groups: list[tuple[str, int, bool]],
        parameters_name: str = "view_parameters",
    ):
        self._transform = transform
        self._groups = groups
        self._parameters_name = parameters_name
        num_views = sum(number for _, number, _ in groups)
        self._random = torch.rand(num_views, _NUM_RANDOM, dtype=torch.float64).tolist()
        self._boxes: dict[tuple[int, int], list[Box]] = {}

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """The box of each view in an image of a width and height, in pixels."""
        if size not in self._boxes:
            transform, rows = self._transform, iter(self._random)
            whole_pixels = self._cuts_whole_pixels(size)
            self._boxes[size] = [
                crop_box(
                    size,
                    transform.focal_scale if is_focal else transform.global_scale,
                    transform.aspect_ratio,
                    next(rows),
                    whole_pixels,
                )
                for _, number, is_focal in self._groups
                for _ in range(number)
            ]
        return self._boxes[size]

    def reduction(self, size: tuple[int, int]) -> int:
        """By how much the sides of an image may be divided when it is decoded: 1, 2, 4 or 8.

        Every crop then still has at least as many pixels as its view along both sides, so that nothing is enlarged.
        Small images and turned crops are never reduced.
        """
        if not self._cuts_whole_pixels(size):
            return 1
        boxes = iter(self.boxes(size))
        spare = math.inf
        for _, number, is_focal in self._groups:
            side = self._side(is_focal)
            for _ in range(number):
                left, top, right, bottom = next(boxes)
                spare = min(spare, (right - left) / side, (bottom - top) / side)
        return next((reduction for reduction in _REDUCTIONS if reduction <= spare), 1)

    def crops(self, image: Image.Image, full_size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
        """Cuts the views out of the image.

        Args:
            image (`PIL.Image.Image`):
                In mode RGB.
            full_size (`tuple[int, int]`, *optional*):
                Width and height before it was reduced in decoding, where it was.

        Returns:
            `dict[str, torch.Tensor]`: the crops by name, (number, H, W, 3), uint8 (the target is one, (H, W, 3)), and
            the parameters of all views, (views, 12), float32.
        """
        full_size = full_size or image.size
        boxes = self.boxes(full_size)
        if reduced := full_size != image.size:
            across, down = image.width / full_size[0], image.height / full_size[1]
            boxes = [(box[0] * across, box[1] * down, box[2] * across, box[3] * down) for box in boxes]
        cuts_whole_pixels = not reduced and self._cuts_whole_pixels(full_size)
        source = pixels_of(image) if cuts_whole_pixels else image
        cut, begin = {}, 0
        for name, number, is_focal in self._groups:
            rows, of_group = self._random[begin : begin + number], boxes[begin : begin + number]
            arguments = (source, of_group, self._side(is_focal), self._transform.interpolation)
            if self._turns:
                cut[name] = turned_crops(*arguments, *self._turns_of(rows))
            elif cuts_whole_pixels:
                cut[name] = whole_pixel_crops(*arguments)
            else:
                cut[name] = fine_crops(*arguments)
            begin += number
        if "pixel_values" in cut:
            cut["pixel_values"] = cut["pixel_values"][0]
        cut[self._parameters_name] = torch.tensor([self._parameters(row) for row in self._random])
        return cut

    @property
    def _turns(self) -> bool:
        return self._transform.rotation > 0 or self._transform.translation > 0

    def _cuts_whole_pixels(self, size: tuple[int, int]) -> bool:
        return not self._turns and min(size) >= WHOLE_PIXELS_FROM

    def _side(self, is_focal: bool) -> int:
        return self._transform.focal_size if is_focal else self._transform.image_size

    def _turns_of(self, rows: list[list[float]]) -> tuple[list[float], list[tuple[float, float]]]:
        turn, move = self._transform.rotation, self._transform.translation
        angles = [math.radians(between((-turn, turn), row[_ANGLE])) for row in rows]
        shifts = [tuple(between((-move, move), row[_SHIFT + axis]) for axis in (0, 1)) for row in rows]
        return angles, shifts

    def _parameters(self, random: list[float]) -> list[float]:
        transform = self._transform
        strength, hue = 0.8 * transform.color_jitter, 0.2 * transform.color_jitter
        order = random[_ORDER : _ORDER + 4]
        row = [0.0] * view_parameters.NUM_PARAMETERS
        row[view_parameters.FLIP] = float(random[_FLIP] < transform.horizontal_flip)
        row[view_parameters.JITTER] = float(
            transform.color_jitter > 0 and random[_JITTER] < transform.color_jitter_probability
        )
        bounds = [(1 - strength, 1 + strength)] * 3 + [(-hue, hue)]
        for operator in range(4):
            row[view_parameters.FACTORS + operator] = between(bounds[operator], random[_STRENGTHS + operator])
        row[view_parameters.ORDER : view_parameters.ORDER + 4] = sorted(range(4), key=order.__getitem__)
        row[view_parameters.GRAYSCALE] = float(random[_GRAYSCALE] < transform.grayscale)
        if random[_BLUR] < transform.blur_probability:
            row[view_parameters.SIGMA] = between(transform.blur_radius, random[_RADIUS])
        return row
