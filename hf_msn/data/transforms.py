"""Transforms from an image to pixels: the random views of pretraining, and the fixed one of evaluation."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BitImageProcessor
from transformers.hf_argparser import HfArg

from ..checks import check_choice, check_integer, check_number
from . import view_parameters
from .augmentation import finish_views
from .decoding import decode_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CROP_ATTEMPTS = 10
# Images with a shorter side of at least this are cropped at whole pixels, as in torchvision. In smaller ones rounding
# to a pixel would matter.
WHOLE_PIXELS_FROM = 64

# one row of random numbers per view: four per attempt to crop, then one per other choice
_FLIP, _JITTER, _STRENGTHS, _ORDER, _GRAYSCALE, _BLUR, _RADIUS, _ANGLE, _SHIFT = 40, 41, 42, 46, 50, 51, 52, 53, 54
_NUM_RANDOM = 56

_REDUCTIONS = (8, 4, 2)  # by which a JPEG decoder can divide the sides


@dataclass
class MultiViewTransform:
    """Draw the views of one image: the target view, the anchor views, the focal views.

    Each view is drawn independently: a crop of random area and aspect ratio resized to a square (with optional
    rotation and shift), a flip, colour jitter (brightness, contrast, saturation, hue in random order), grayscale,
    solarize, equalize, blur, normalisation. The defaults are the paper's. Crops are cut and resized in uint8, at whole
    pixels as in torchvision; crops of images with a shorter side below 64 pixels, and rotated ones, are not rounded to
    whole pixels. Everything after that is computed in float32: torchvision's operators for float tensors, and a
    Gaussian whose kernel ends at 4 standard deviations, with reflected borders.

    The two halves are available separately: [`~MultiViewTransform.crops`] returns uint8 crops and one row of
    parameters per view, a quarter of the bytes; [`~MultiViewTransform.finish`] makes the views of a whole batch on its
    device. The pretraining trainers do that; calling the transform does both.

    All randomness comes from torch's global generator, and each view consumes the same amount of it whatever the
    settings, so that one setting does not change the draws of the others (`solarize` and `equalize` draw after them).

    Raises:
        ValueError: If a value is outside its range.
    """

    image_size: int = HfArg(default=224, help="Side of the target and anchor views, in pixels.")
    focal_size: int = HfArg(default=96, help="Side of the focal views, in pixels.")
    anchor_views: int = HfArg(default=1, help="Anchor views per image: large, with patches dropped.")
    focal_views: int = HfArg(default=10, help="Focal views per image: small, no patches dropped.")
    global_scale: tuple[float, float] = HfArg(
        default=(0.3, 1.0), help="Smallest and largest share of the area in a target or anchor view."
    )
    focal_scale: tuple[float, float] = HfArg(
        default=(0.05, 0.3), help="Smallest and largest share of the area in a focal view."
    )
    aspect_ratio: tuple[float, float] = HfArg(
        default=(3 / 4, 4 / 3), help="Smallest and largest width / height of a crop."
    )
    horizontal_flip: float = HfArg(default=0.5, help="Probability of a left-right flip.")
    color_jitter: float = HfArg(
        default=0.5,
        help="Strength s: brightness, contrast and saturation change by up to 0.8 s, hue by up to 0.2 s.",
    )
    color_jitter_probability: float = HfArg(default=0.8, help="Probability of colour jitter.")
    grayscale: float = HfArg(default=0.2, help="Probability of conversion to grayscale.")
    solarize: float = HfArg(
        default=0.0, help="Probability that all values above a random threshold are inverted, as in PAWS on CIFAR-10."
    )
    equalize: float = HfArg(default=0.0, help="Probability that the histogram of each channel is equalized.")
    blur_probability: float = HfArg(default=0.5, help="Probability of Gaussian blur.")
    blur_radius: tuple[float, float] = HfArg(
        default=(0.1, 2.0),
        help="Smallest and largest radius (standard deviation) of the blur, in pixels.",
    )
    rotation: float = HfArg(
        default=0.0, help="Largest rotation either way, in degrees. The corners are filled with black."
    )
    translation: float = HfArg(
        default=0.0,
        help="Largest shift either way, as a share of the view's side. The rest is filled with black.",
    )
    interpolation: str = HfArg(default="bilinear", help="How crops are resized: bilinear or bicubic.")
    image_mean: tuple[float, float, float] = HfArg(
        default=IMAGENET_MEAN, help="Mean of the normalisation, for values in 0..1."
    )
    image_std: tuple[float, float, float] = HfArg(
        default=IMAGENET_STD, help="Standard deviation of the normalisation, for values in 0..1."
    )

    def __post_init__(self):
        check_integer("image_size", self.image_size, meaning="is a side in pixels")
        check_integer("anchor_views", self.anchor_views, 0, meaning="counts views")
        check_integer("focal_views", self.focal_views, 0, meaning="counts views")
        if self.anchor_views + self.focal_views < 1:
            raise ValueError(
                "`anchor_views` and `focal_views` are both 0, but at least one of them must be >= 1, or nothing "
                "learns from the target. The paper uses 1 and 10."
            )
        if self.focal_views > 0:
            check_integer("focal_size", self.focal_size, meaning="is a side in pixels")
        for name in ("global_scale", "focal_scale"):
            self._check_pair(name, "bounds the share of the image's area", maximum=1)
        self._check_pair("aspect_ratio", "bounds width / height")
        self._check_pair("blur_radius", "bounds a radius in pixels")
        probabilities = ("color_jitter_probability", "grayscale", "solarize", "equalize", "blur_probability")
        for name in ("horizontal_flip", *probabilities):
            check_number(name, getattr(self, name), minimum=0, maximum=1, meaning="is a probability")
        check_number("color_jitter", self.color_jitter, minimum=0, maximum=1.25, remedy="The paper uses 0.5.")
        check_number("rotation", self.rotation, minimum=0, maximum=180, meaning="is an angle in degrees")
        check_number("translation", self.translation, minimum=0, below=1, meaning="is a share of the view's side")
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("image_mean", "image_std"):
            value = tuple(float(entry) for entry in getattr(self, name))
            if len(value) != 3 or (name == "image_std" and min(value) <= 0):
                raise ValueError(f"`{name}` must hold one number per channel, 3 (std > 0), but is {value}.")
            setattr(self, name, value)

    def _check_pair(self, name: str, meaning: str, maximum: float | None = None) -> None:
        pair = getattr(self, name)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"`{name}` must be a pair (smallest, largest), but is {pair!r}.")
        smallest = check_number(name, pair[0], above=0, maximum=maximum, meaning=meaning)
        largest = check_number(name, pair[1], minimum=smallest, maximum=maximum, meaning=meaning)
        setattr(self, name, (smallest, largest))

    @classmethod
    def for_small_grayscale(cls, image_size: int = 8, **settings) -> "MultiViewTransform":
        """Return the recipe for small gray images such as digits: crops, small rotations and shifts, no colour.

        `settings` are fields of the class, in place of the recipe's.
        """
        recipe = {
            "focal_size": max(1, image_size // 2),
            "focal_views": 0,
            "global_scale": (0.6, 1.0),
            "focal_scale": (0.2, 0.6),
            "horizontal_flip": 0.0,
            "color_jitter": 0.0,
            "color_jitter_probability": 0.0,
            "grayscale": 0.0,
            "blur_probability": 0.0,
            "rotation": 10.0,
            "translation": 0.05,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
        }
        return cls(image_size=image_size, **{**recipe, **settings})

    def evaluation_image_processor(self, crop_fraction: float = 224 / 256) -> BitImageProcessor:
        """Return [`evaluation_image_processor`] with this size, normalisation and interpolation."""
        settings = {name: getattr(self, name) for name in ("image_mean", "image_std", "interpolation")}
        return evaluation_image_processor(self.image_size, crop_fraction=crop_fraction, **settings)

    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Draw the views of one image, a `PIL.Image` or an array (see [`~hf_msn.decode_image`]).

        Returns:
            `dict[str, torch.Tensor]`, float32, normalised: `pixel_values` (3, H, H), the target view;
            `anchor_pixel_values` (V, 3, H, H); `focal_pixel_values` (F, 3, h, h), absent without focal views.
        """
        return self.finish(self.crops(image))

    def global_views(self, image: Image.Image, num_views: int) -> torch.Tensor:
        """Draw views (V, 3, H, H) of one image in the way of the target view, such as PAWS' support images."""
        return self.finish(self.draw_support(num_views).crops(_rgb(image)))["support_pixel_values"]

    def crops(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Draw and cut the views of one image, without finishing them.

        Returns:
            `dict[str, torch.Tensor]`: uint8 crops, channels last: `pixel_values` (H, H, 3); `anchor_pixel_values`
            (V, H, H, 3); `focal_pixel_values` (F, h, h, 3), absent without focal views; and `view_parameters`
            (1 + V + F, 12), float32, for [`~MultiViewTransform.finish`].
        """
        return self.draw().crops(_rgb(image))

    def finish(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Finish the views of a batch on its device: flip, colour jitter, grayscale, blur, normalisation.

        `batch` has crops and `view_parameters` from [`~MultiViewTransform.crops`], of one image or stacked, or
        `support_pixel_values` with `support_view_parameters`. Returns it with finished views (..., 3, H, W), float32,
        and without parameters. Other entries, and finished views, stay.
        """

        def finished(crops: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return finish_views(crops, rows, self.image_mean, self.image_std, colored=self.is_colored)

        batch = dict(batch)
        if (rows := batch.pop("view_parameters", None)) is not None:
            num_anchors = batch["anchor_pixel_values"].shape[-4]
            batch["pixel_values"] = finished(batch["pixel_values"], rows[..., 0, :])
            anchors, focal = rows[..., 1 : 1 + num_anchors, :], rows[..., 1 + num_anchors :, :]
            batch["anchor_pixel_values"] = finished(batch["anchor_pixel_values"], anchors)
            if "focal_pixel_values" in batch:
                batch["focal_pixel_values"] = finished(batch["focal_pixel_values"], focal)
        if (rows := batch.pop("support_view_parameters", None)) is not None:
            batch["support_pixel_values"] = finished(batch["support_pixel_values"], rows)
        return batch

    def draw(self) -> "DrawnViews":
        """Draw all that is random about the views of one image. The image may be decoded afterwards."""
        groups = [("pixel_values", 1, False), ("anchor_pixel_values", self.anchor_views, False)]
        if self.focal_views > 0:
            groups.append(("focal_pixel_values", self.focal_views, True))
        return DrawnViews(self, groups)

    def draw_support(self, num_views: int) -> "DrawnViews":
        """Draw `num_views` views in the way of the target view, as [`~MultiViewTransform.draw`] does."""
        check_integer("num_views", num_views, meaning="counts views")
        return DrawnViews(self, [("support_pixel_values", num_views, False)], "support_view_parameters")

    @property
    def is_colored(self) -> bool:
        """Whether any view can get jitter, grayscale, solarize, equalize or blur."""
        jitters = self.color_jitter > 0 and self.color_jitter_probability > 0
        return jitters or self._changes_tones or self.grayscale > 0 or self.blur_probability > 0

    @property
    def _changes_tones(self) -> bool:
        return self.solarize > 0 or self.equalize > 0

    def finishes_as(self, other: Any) -> bool:
        """Return whether [`~MultiViewTransform.finish`] of both transforms does the same to the same crops."""
        return isinstance(other, MultiViewTransform) and (
            (self.image_mean, self.image_std, self.is_colored, type(self).finish)
            == (other.image_mean, other.image_std, other.is_colored, type(other).finish)
        )


class DrawnViews:
    """Views that are drawn but not cut, from torch's global generator. [`MultiViewTransform.draw`] returns them.

    `groups` holds the name of the crops, the number of views, and whether they are focal views.
    """

    def __init__(
        self, transform: MultiViewTransform, groups: list[tuple[str, int, bool]], parameters_name="view_parameters"
    ):
        self._transform = transform
        self._groups = groups
        self._parameters_name = parameters_name
        self._is_focal = [is_focal for _, number, is_focal in groups for _ in range(number)]
        self._random = torch.rand(len(self._is_focal), _NUM_RANDOM, dtype=torch.float64).tolist()
        # after all others, which are the same without them
        tones = (len(self._is_focal), 3) if transform._changes_tones else (len(self._is_focal), 0)
        self._random_tones = torch.rand(tones, dtype=torch.float64).tolist()
        self._boxes: dict[tuple[int, int], list[Box]] = {}
        self._rotates = transform.rotation > 0 or transform.translation > 0

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """Return the box of each view, in pixels, in an image of this width and height."""
        if size not in self._boxes:
            transform = self._transform
            scales = (transform.global_scale, transform.focal_scale)
            whole_pixels = self._cuts_whole_pixels(size)
            self._boxes[size] = [
                crop_box(size, scales[is_focal], transform.aspect_ratio, row, whole_pixels)
                for is_focal, row in zip(self._is_focal, self._random)
            ]
        return self._boxes[size]

    def reduction(self, size: tuple[int, int]) -> int:
        """Return the number by which the sides of the image may be divided when it is decoded: 1, 2, 4 or 8.

        Every crop then still has at least as many pixels as its view along both sides, so that nothing is enlarged.
        Small images and rotated crops are never reduced.
        """
        if not self._cuts_whole_pixels(size):
            return 1
        spare = min(
            min(right - left, bottom - top) / self._side(is_focal)
            for is_focal, (left, top, right, bottom) in zip(self._is_focal, self.boxes(size))
        )
        return next((reduction for reduction in _REDUCTIONS if reduction <= spare), 1)

    def crops(self, image: Image.Image, full_size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
        """Cut the views out of an RGB image. `full_size` is its width and height before it was reduced in decoding.

        Returns the crops by name, (number, H, W, 3), uint8 (the target is one, (H, W, 3)), and the parameters of all
        views, (views, 12), float32; with solarize or equalize (views, 14).
        """
        transform = self._transform
        full_size = full_size or image.size
        boxes = self.boxes(full_size)
        if reduced := full_size != image.size:
            across, down = image.width / full_size[0], image.height / full_size[1]
            boxes = [(box[0] * across, box[1] * down, box[2] * across, box[3] * down) for box in boxes]
        cuts_whole_pixels = not reduced and self._cuts_whole_pixels(full_size)
        source = pixels_of(image) if cuts_whole_pixels else image
        cut, begin = {}, 0
        for name, number, is_focal in self._groups:
            rows, own_boxes = self._random[begin : begin + number], boxes[begin : begin + number]
            arguments = (source, own_boxes, self._side(is_focal), transform.interpolation)
            if self._rotates:
                cut[name] = rotated_crops(*arguments, *self._angles_and_shifts(rows))
            elif cuts_whole_pixels:
                cut[name] = whole_pixel_crops(*arguments)
            else:
                cut[name] = fine_crops(*arguments)
            begin += number
        if "pixel_values" in cut:
            cut["pixel_values"] = cut["pixel_values"][0]
        rows = [self._parameters(row) + self._tones(tones) for row, tones in zip(self._random, self._random_tones)]
        cut[self._parameters_name] = torch.tensor(rows)
        return cut

    def _cuts_whole_pixels(self, size: tuple[int, int]) -> bool:
        return not self._rotates and min(size) >= WHOLE_PIXELS_FROM

    def _side(self, is_focal: bool) -> int:
        return self._transform.focal_size if is_focal else self._transform.image_size

    def _angles_and_shifts(self, rows: list[list[float]]) -> tuple[list[float], list[tuple[float, float]]]:
        largest, farthest = self._transform.rotation, self._transform.translation
        angles = [math.radians(between((-largest, largest), row[_ANGLE])) for row in rows]
        shifts = [tuple(between((-farthest, farthest), row[_SHIFT + axis]) for axis in (0, 1)) for row in rows]
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

    def _tones(self, random: list[float]) -> list[float]:
        if not random:
            return []
        solarized, threshold, equalized = random
        # the authors draw the threshold from 0 to 256, for values from 0 to 255
        threshold = threshold * 256 / 255 if solarized < self._transform.solarize else 2.0
        return [threshold, float(equalized < self._transform.equalize)]


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


def gives_crops(transform: Any) -> bool:
    """Return whether views can be cut in one place and finished in another: not if a subclass changes them."""
    return isinstance(transform, MultiViewTransform) and all(
        getattr(type(transform), name) is getattr(MultiViewTransform, name)
        for name in ("__call__", "global_views", "crops", "draw", "draw_support")
    )


class EvaluationImageProcessor(BitImageProcessor):
    """A `BitImageProcessor` whose crop begins where torchvision's `CenterCrop` begins: half pixels round to even."""

    def center_crop(self, image: torch.Tensor, size: Any, **kwargs) -> torch.Tensor:
        height, width = image.shape[-2:]
        if size.height > height or size.width > width:
            return super().center_crop(image, size, **kwargs)  # with a border
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        return image[..., top : top + size.height, left : left + size.width]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_processor_type": BitImageProcessor.__name__}


def cropped_as_in_torchvision(image_processor: Any) -> Any:
    """Return a loaded `BitImageProcessor` as an [`EvaluationImageProcessor`]; any other one as it is."""
    if type(image_processor) is not BitImageProcessor:
        return image_processor
    return EvaluationImageProcessor(**image_processor.to_dict())


def evaluation_image_processor(
    image_size: int = 224,
    *,
    image_mean: tuple[float, float, float] = IMAGENET_MEAN,
    image_std: tuple[float, float, float] = IMAGENET_STD,
    crop_fraction: float = 224 / 256,
    interpolation: str = "bilinear",
) -> BitImageProcessor:
    """Return the image processor of the paper's evaluation: resize, centre crop, normalisation.

    The shortest edge becomes `image_size / crop_fraction` pixels, of which the middle `image_size` are kept, as in
    torchvision. It is saved as a `BitImageProcessor` of plain `transformers` (`preprocessor_config.json`,
    `AutoImageProcessor`), which crops a quarter of the image sizes one pixel further up or left.

    Args:
        image_size (`int`, *optional*, defaults to 224): Side of the square the encoder sees, in pixels.
        image_mean, image_std (*optional*, default to ImageNet's): For values in 0..1; the same as in pretraining.
        crop_fraction (`float`, *optional*, defaults to 224 / 256):
            The crop's side over the resized shortest edge. 1.0 keeps all of a square image.
        interpolation (`str`, *optional*, defaults to `"bilinear"`): `"bilinear"` or `"bicubic"`.

    Raises:
        ValueError: If `image_size` is below 1, `crop_fraction` outside (0, 1], or `interpolation` unknown.
    """
    check_integer("image_size", image_size, meaning="is a side in pixels")
    check_number("crop_fraction", crop_fraction, above=0, maximum=1, remedy="The paper uses 224 / 256.")
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    return EvaluationImageProcessor(
        size={"shortest_edge": round(image_size / crop_fraction)},
        crop_size={"height": image_size, "width": image_size},
        resample=INTERPOLATIONS[interpolation],
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def _rgb(image: Image.Image | np.ndarray) -> Image.Image:
    if not isinstance(image, Image.Image):
        return decode_image(image)  # arrays; names what is no image
    return image if image.mode == "RGB" else image.convert("RGB")
