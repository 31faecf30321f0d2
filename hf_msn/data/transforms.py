"""The views of an image: target, anchors, focal views."""

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import BitImageProcessor

from .augmentation import finish_views
from .drawn_views import DrawnViews
from .evaluation_processor import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_interpolation,
    check_size,
    evaluation_image_processor,
)


@dataclass
class MultiViewTransform:
    """Makes the views of one image, each drawn by itself: the target view, the anchor views, the focal views.

    A view is, in this order: a crop of random area and aspect ratio resized to a square (with the optional rotation
    and shift), a flip, colour jitter (brightness, contrast, saturation, hue in random order), gray, blur,
    normalisation. The defaults are the paper's. Cropping and resizing are done on uint8, at whole pixels as
    torchvision does it; crops of images whose shorter side is below 64 pixels, and turned ones, are not rounded to
    whole pixels, which matters for images of 8. Everything after that is done on float values, by torchvision's
    operators for float tensors and a true Gaussian, whose kernel ends at 4 standard deviations, with reflected
    borders.

    The two halves can be had apart: [`~MultiViewTransform.crops`] gives uint8 crops and a row of parameters for each
    view, a quarter of the bytes; [`~MultiViewTransform.finish`] makes the views of a whole batch on its device. The
    pretraining trainers do that; calling the transform does both.

    All randomness comes from torch's global generator, and each view takes the same amount of it whatever the
    settings, so that one setting does not change what the others draw.

    The class is a dataclass whose fields carry their help text, so that an argument parser can be made from it.

    Raises:
        ValueError: a value outside its range, at construction.

    Example:

    ```python
    >>> views = MultiViewTransform(focal_views=2)(image)
    >>> views["pixel_values"].shape, views["anchor_pixel_values"].shape, views["focal_pixel_values"].shape
    (torch.Size([3, 224, 224]), torch.Size([1, 3, 224, 224]), torch.Size([2, 3, 96, 96]))
    ```
    """

    image_size: int = field(default=224, metadata={"help": "Side of the target and anchor views, in pixels."})
    focal_size: int = field(default=96, metadata={"help": "Side of the focal views, in pixels."})
    anchor_views: int = field(default=1, metadata={"help": "Anchor views of an image: large, with patches dropped."})
    focal_views: int = field(default=10, metadata={"help": "Focal views of an image: small, nothing dropped."})
    global_scale: tuple[float, float] = field(
        default=(0.3, 1.0), metadata={"help": "Smallest and largest share of the area in a target or anchor view."}
    )
    focal_scale: tuple[float, float] = field(
        default=(0.05, 0.3), metadata={"help": "Smallest and largest share of the area in a focal view."}
    )
    aspect_ratio: tuple[float, float] = field(
        default=(3 / 4, 4 / 3), metadata={"help": "Smallest and largest width / height of a crop."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a left-right flip."})
    color_jitter: float = field(
        default=0.5,
        metadata={
            "help": "Strength s: brightness, contrast and saturation change by up to 0.8 s, hue by up to 0.2 s."
        },
    )
    color_jitter_probability: float = field(default=0.8, metadata={"help": "Probability of colour jitter."})
    grayscale: float = field(default=0.2, metadata={"help": "Probability of turning gray."})
    blur_probability: float = field(default=0.5, metadata={"help": "Probability of Gaussian blur."})
    blur_radius: tuple[float, float] = field(
        default=(0.1, 2.0),
        metadata={"help": "Smallest and largest radius (standard deviation) of the blur, in pixels."},
    )
    rotation: float = field(
        default=0.0, metadata={"help": "Largest rotation either way, in degrees. What comes into view is black (0)."}
    )
    translation: float = field(
        default=0.0,
        metadata={
            "help": "Largest shift either way, as a share of the view's side. What comes into view is black (0)."
        },
    )
    interpolation: str = field(default="bilinear", metadata={"help": "How crops are resized: bilinear or bicubic."})
    image_mean: tuple[float, float, float] = field(
        default=IMAGENET_MEAN, metadata={"help": "Mean of the normalisation, for values in 0..1."}
    )
    image_std: tuple[float, float, float] = field(
        default=IMAGENET_STD, metadata={"help": "Standard deviation of the normalisation, for values in 0..1."}
    )

    def __post_init__(self):
        check_size("image_size", self.image_size)
        for name in ("anchor_views", "focal_views"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"`{name}` is a number of views and must be >= 0, but is {getattr(self, name)}.")
        if self.anchor_views + self.focal_views < 1:
            raise ValueError(
                "`anchor_views` and `focal_views` are both 0, so nothing would learn from the target; "
                "at least one of them must be >= 1. The paper uses 1 and 10."
            )
        if self.focal_views > 0:
            check_size("focal_size", self.focal_size)
        for name in ("global_scale", "focal_scale"):
            _check_range(self, name, 0, 1, "a share of the image's area in (0, 1]")
        _check_range(self, "aspect_ratio", 0, math.inf, "width / height above 0")
        _check_range(self, "blur_radius", 0, math.inf, "a radius in pixels above 0")
        for name in ("horizontal_flip", "color_jitter_probability", "grayscale", "blur_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a probability and must be in [0, 1], but is {getattr(self, name)}.")
        if not 0 <= self.color_jitter <= 1.25:
            raise ValueError(
                f"`color_jitter` is the strength s and must be in [0, 1.25] (0.8 s <= 1), but is {self.color_jitter}. "
                "The paper uses 0.5; 0 turns it off."
            )
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"`rotation` is an angle in degrees and must be in [0, 180], but is {self.rotation}.")
        if not 0 <= self.translation < 1:
            raise ValueError(f"`translation` is a share of the side and must be in [0, 1), but is {self.translation}.")
        check_interpolation(self.interpolation)
        for name in ("image_mean", "image_std"):
            value = tuple(float(entry) for entry in getattr(self, name))
            if len(value) != 3 or (name == "image_std" and min(value) <= 0):
                raise ValueError(f"`{name}` is one number for each of 3 channels (std above 0), but is {value}.")
            setattr(self, name, value)

    @classmethod
    def for_small_grayscale(cls, image_size: int = 8, **settings) -> "MultiViewTransform":
        """The recipe for small gray images such as digits: crops, small turns and shifts; no flip, colour or blur.

        Args:
            image_size (`int`, *optional*, defaults to 8):
                Side of the target and anchor views, in pixels.
            **settings:
                Any field of the class, instead of the recipe's.
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
        """Makes the evaluation's processor at this size and normalisation; see [`evaluation_image_processor`]."""
        return evaluation_image_processor(
            self.image_size,
            image_mean=self.image_mean,
            image_std=self.image_std,
            crop_fraction=crop_fraction,
            interpolation=self.interpolation,
        )

    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Draws the views of one image.

        Args:
            image (`PIL.Image.Image`):
                The image, in mode RGB ([`~hf_msn.data.decode_image`] gives that).

        Returns:
            `dict[str, torch.Tensor]`, float32, normalised: `pixel_values` (3, H, H), the target view;
            `anchor_pixel_values` (V, 3, H, H); `focal_pixel_values` (F, 3, h, h), absent if there are none.
        """
        return self.finish(self.crops(image))

    def global_views(self, image: Image.Image, num_views: int) -> torch.Tensor:
        """Draws any number of views of one image, each as the target view is drawn: what PAWS' support images get.

        Args:
            image (`PIL.Image.Image`):
                The image, in mode RGB.
            num_views (`int`):
                Number of views V, >= 1.

        Returns:
            `torch.Tensor` of shape (V, 3, H, H), float32, normalised.

        Raises:
            ValueError: `num_views` is no whole number >= 1.
        """
        return self.finish(self.draw_support(num_views).crops(_rgb(image)))["support_pixel_values"]

    def crops(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Draws the views of one image and cuts them, but does not finish them.

        Args:
            image (`PIL.Image.Image`):
                The image, in mode RGB.

        Returns:
            `dict[str, torch.Tensor]`: uint8 crops, channels last as images are decoded: `pixel_values` (H, H, 3);
            `anchor_pixel_values` (V, H, H, 3); `focal_pixel_values` (F, h, h, 3), absent if there are none; and
            `view_parameters` (1 + V + F, 12), float32, what [`~MultiViewTransform.finish`] does to each.
        """
        return self.draw().crops(_rgb(image))

    def finish(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Finishes views: flip, colour jitter, gray, blur, normalisation, on the batch's device.

        Args:
            batch (`dict[str, torch.Tensor]`):
                What [`~MultiViewTransform.crops`] gives, of one image or stacked, and `support_pixel_values` with
                `support_view_parameters`. Other entries, and finished views, stay as they are.

        Returns:
            `dict[str, torch.Tensor]`: the same with finished views (..., 3, H, W), float32, and no parameters.
        """
        finished = dict(batch)
        parameters = finished.pop("view_parameters", None)
        if parameters is not None:
            num_anchors = batch["anchor_pixel_values"].shape[-4]
            finished["pixel_values"] = self._finished(batch["pixel_values"], parameters[..., 0, :])
            for name, rows in (
                ("anchor_pixel_values", parameters[..., 1 : 1 + num_anchors, :]),
                ("focal_pixel_values", parameters[..., 1 + num_anchors :, :]),
            ):
                if name in batch:
                    finished[name] = self._finished(batch[name], rows)
        parameters = finished.pop("support_view_parameters", None)
        if parameters is not None:
            finished["support_pixel_values"] = self._finished(batch["support_pixel_values"], parameters)
        return finished

    def draw(self) -> DrawnViews:
        """Draws all that is random about the views of one image, which may be read afterwards."""
        groups = [("pixel_values", 1, False), ("anchor_pixel_values", self.anchor_views, False)]
        if self.focal_views > 0:
            groups.append(("focal_pixel_values", self.focal_views, True))
        return DrawnViews(self, groups)

    def draw_support(self, num_views: int) -> DrawnViews:
        """As [`~MultiViewTransform.draw`], for any number of views that are each drawn as the target view is."""
        if not _is_whole(num_views) or num_views < 1:
            raise ValueError(f"`num_views` is a number of views and must be a whole number >= 1, but is {num_views}.")
        return DrawnViews(self, [("support_pixel_values", num_views, False)], "support_view_parameters")

    @property
    def is_colored(self) -> bool:
        """Whether any view can get jitter, gray or blur."""
        jitters = self.color_jitter > 0 and self.color_jitter_probability > 0
        return jitters or self.grayscale > 0 or self.blur_probability > 0

    def finishes_as(self, other: Any) -> bool:
        """Whether [`~MultiViewTransform.finish`] of the two transforms does the same to the same crops."""
        return isinstance(other, MultiViewTransform) and (
            (self.image_mean, self.image_std, self.is_colored, type(self).finish)
            == (other.image_mean, other.image_std, other.is_colored, type(other).finish)
        )

    def _finished(self, crops: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return finish_views(crops, parameters, self.image_mean, self.image_std, colored=self.is_colored)


def gives_crops(transform: Any) -> bool:
    """Whether a transform's views can be cut in one place and finished in another: not if a subclass changes them."""
    return isinstance(transform, MultiViewTransform) and all(
        getattr(type(transform), name) is getattr(MultiViewTransform, name)
        for name in ("__call__", "global_views", "crops", "draw", "draw_support")
    )


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_range(transform: MultiViewTransform, name: str, low: float, high: float, meaning: str) -> None:
    value = getattr(transform, name)
    try:
        smallest, largest = (float(entry) for entry in value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` is a pair (smallest, largest), but is {value!r}.") from None
    if not low < smallest <= largest <= high or math.isinf(largest):
        raise ValueError(f"`{name}` is {meaning}, smallest first, but is {value}.")
    setattr(transform, name, (smallest, largest))
