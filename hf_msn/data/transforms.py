"""The views of an image (target, anchors, focal views), and the processor that evaluates the same encoder."""

import math
import numbers
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F
from transformers import BitImageProcessor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CROP_ATTEMPTS = 10
# one row of random numbers for each view: four for each attempt to crop, then one for each other choice
_FLIP, _JITTER, _STRENGTHS, _ORDER, _GRAYSCALE, _BLUR, _RADIUS, _ANGLE, _SHIFT = 40, 41, 42, 46, 50, 51, 52, 53, 54
_NUM_RANDOM = 56


def evaluation_image_processor(
    image_size: int = 224,
    *,
    image_mean: tuple[float, float, float] = IMAGENET_MEAN,
    image_std: tuple[float, float, float] = IMAGENET_STD,
    crop_fraction: float = 224 / 256,
    interpolation: str = "bilinear",
) -> BitImageProcessor:
    """Makes the image processor of the paper's evaluation: resize, centre crop, normalisation.

    The shortest edge becomes `image_size / crop_fraction` pixels, of which the middle `image_size` are kept.

    It saves and loads with plain `transformers` (`preprocessor_config.json`, `AutoImageProcessor`).

    Args:
        image_size (`int`, *optional*, defaults to 224):
            Side of the square the encoder sees, in pixels.
        image_mean, image_std (`tuple[float, float, float]`, *optional*, default to ImageNet's):
            Normalisation of values in 0..1; the same as in pretraining.
        crop_fraction (`float`, *optional*, defaults to 224 / 256):
            The crop's side over the resized shortest edge. 1.0 keeps all of a square image.
        interpolation (`str`, *optional*, defaults to `"bilinear"`):
            `"bilinear"` or `"bicubic"`.

    Returns:
        `transformers.BitImageProcessor`: gives `pixel_values` (B, 3, image_size, image_size).

    Raises:
        ValueError: a size below 1, a fraction outside (0, 1], an unknown interpolation.
    """
    _check_size("image_size", image_size)
    if not 0 < crop_fraction <= 1:
        raise ValueError(
            f"`crop_fraction` is crop over resized shortest edge and must be in (0, 1], but is {crop_fraction}. "
            "The paper uses 224 / 256; 1.0 crops nothing off a square image."
        )
    _check_interpolation(interpolation)
    return BitImageProcessor(
        size={"shortest_edge": round(image_size / crop_fraction)},
        crop_size={"height": image_size, "width": image_size},
        resample=_INTERPOLATIONS[interpolation],
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


@dataclass
class MultiViewTransform:
    """Makes the views of one image, each drawn by itself: the target view, the anchor views, the focal views.

    A view is, in this order: a crop of random area and aspect ratio resized to a square (with the optional rotation
    and shift), a flip, colour jitter (brightness, contrast, saturation, hue in random order), gray, blur,
    normalisation. The defaults are the paper's. Crops are not rounded to whole pixels, which matters for images of 8
    pixels. All randomness comes from torch's global generator, and each view takes the same amount of it whatever the
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
        _check_size("image_size", self.image_size)
        for name in ("anchor_views", "focal_views"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"`{name}` is a number of views and must be >= 0, but is {getattr(self, name)}.")
        if self.anchor_views + self.focal_views < 1:
            raise ValueError(
                "`anchor_views` and `focal_views` are both 0, so nothing would learn from the target; "
                "at least one of them must be >= 1. The paper uses 1 and 10."
            )
        if self.focal_views > 0:
            _check_size("focal_size", self.focal_size)
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
        _check_interpolation(self.interpolation)
        for name in ("image_mean", "image_std"):
            value = tuple(float(entry) for entry in getattr(self, name))
            if len(value) != 3 or (name == "image_std" and min(value) <= 0):
                raise ValueError(f"`{name}` is one number for each of 3 channels (std above 0), but is {value}.")
            setattr(self, name, value)
        std = torch.tensor(self.image_std).view(1, 3, 1, 1)
        self._multiplier = 1 / (255 * std)
        self._offset = torch.tensor(self.image_mean).view(1, 3, 1, 1) / std

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
        num_global = 1 + self.anchor_views
        random = _draws(num_global + self.focal_views)
        views = self._views(image, self.image_size, self.global_scale, random[:num_global])
        batch = {"pixel_values": views[0], "anchor_pixel_values": views[1:]}
        if self.focal_views > 0:
            batch["focal_pixel_values"] = self._views(image, self.focal_size, self.focal_scale, random[num_global:])
        return batch

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
        if not _is_whole(num_views) or num_views < 1:
            raise ValueError(f"`num_views` is a number of views and must be a whole number >= 1, but is {num_views}.")
        return self._views(image, self.image_size, self.global_scale, _draws(num_views))

    def _views(
        self, image: Image.Image, size: int, scale: tuple[float, float], random: list[list[float]]
    ) -> torch.Tensor:
        if image.mode != "RGB":
            image = image.convert("RGB")
        return self._normalize([self._view(image, size, scale, u) for u in random])

    def _view(self, image: Image.Image, size: int, scale: tuple[float, float], random: list[float]) -> Image.Image:
        box = self._crop_box(image.size, scale, random)
        if self.rotation > 0 or self.translation > 0:
            view = self._turned_crop(image, box, size, random)
        else:
            view = image.resize((size, size), _INTERPOLATIONS[self.interpolation], box=box)
        if random[_FLIP] < self.horizontal_flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter > 0 and random[_JITTER] < self.color_jitter_probability:
            view = self._jittered(view, random)
        if random[_GRAYSCALE] < self.grayscale:
            view = view.convert("L").convert("RGB")
        if random[_BLUR] < self.blur_probability:
            view = view.filter(ImageFilter.GaussianBlur(_between(self.blur_radius, random[_RADIUS])))
        return view

    def _crop_box(
        self, size: tuple[int, int], scale: tuple[float, float], random: list[float]
    ) -> tuple[float, float, float, float]:
        image_width, image_height = size
        log_ratio = (math.log(self.aspect_ratio[0]), math.log(self.aspect_ratio[1]))
        for attempt in range(0, 4 * _CROP_ATTEMPTS, 4):
            area = image_width * image_height * _between(scale, random[attempt])
            ratio = math.exp(_between(log_ratio, random[attempt + 1]))
            width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if width <= image_width and height <= image_height:
                left = random[attempt + 2] * (image_width - width)
                top = random[attempt + 3] * (image_height - height)
                return left, top, min(left + width, image_width), min(top + height, image_height)
        # no crop fits a very long image: the middle, as near to the allowed ratios as can be
        ratio = min(max(image_width / image_height, self.aspect_ratio[0]), self.aspect_ratio[1])
        width, height = min(image_width, image_height * ratio), min(image_height, image_width / ratio)
        left, top = (image_width - width) / 2, (image_height - height) / 2
        return left, top, left + width, top + height

    def _turned_crop(
        self, image: Image.Image, box: tuple[float, float, float, float], size: int, random: list[float]
    ) -> Image.Image:
        left, top, right, bottom = box
        angle = math.radians(_between((-self.rotation, self.rotation), random[_ANGLE]))
        shift_x = _between((-self.translation, self.translation), random[_SHIFT]) * (right - left)
        shift_y = _between((-self.translation, self.translation), random[_SHIFT + 1]) * (bottom - top)
        center_x, center_y = (left + right) / 2 - shift_x, (top + bottom) / 2 - shift_y
        # an affine transform samples without smoothing: larger crops are turned at full resolution, then made small
        reduces = max(right - left, bottom - top) > size
        out = (max(1, round(right - left)), max(1, round(bottom - top))) if reduces else (size, size)
        step_x, step_y = (right - left) / out[0], (bottom - top) / out[1]
        cos, sin = math.cos(angle), math.sin(angle)
        # Pillow asks for the map from result to source: center + rotation @ (step * (out - out_center))
        a, b = cos * step_x, -sin * step_y
        d, e = sin * step_x, cos * step_y
        coefficients = (
            a,
            b,
            center_x - (a * out[0] + b * out[1]) / 2,
            d,
            e,
            center_y - (d * out[0] + e * out[1]) / 2,
        )
        resampling = _INTERPOLATIONS[self.interpolation]
        view = image.transform(out, Image.Transform.AFFINE, coefficients, resampling, fillcolor=0)
        return view.resize((size, size), resampling) if reduces else view

    def _jittered(self, view: Image.Image, random: list[float]) -> Image.Image:
        strengths = random[_STRENGTHS : _STRENGTHS + 4]
        order = random[_ORDER : _ORDER + 4]
        strength, hue = 0.8 * self.color_jitter, 0.2 * self.color_jitter
        for operator in sorted(range(4), key=order.__getitem__):
            if operator == 3:
                view = F.adjust_hue(view, _between((-hue, hue), strengths[3]))
            else:
                factor = _between((1 - strength, 1 + strength), strengths[operator])
                view = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[operator](view, factor)
        return view

    def _normalize(self, views: list[Image.Image]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.mul_(self._multiplier).sub_(self._offset)


def _draws(num_views: int) -> list[list[float]]:
    return torch.rand(num_views, _NUM_RANDOM, dtype=torch.float64).tolist()


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_size(name: str, value) -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"`{name}` is a side in pixels and must be a whole number >= 1, but is {value}.")


def _check_range(transform: MultiViewTransform, name: str, low: float, high: float, meaning: str) -> None:
    value = getattr(transform, name)
    try:
        smallest, largest = (float(entry) for entry in value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` is a pair (smallest, largest), but is {value!r}.") from None
    if not low < smallest <= largest <= high or math.isinf(largest):
        raise ValueError(f"`{name}` is {meaning}, smallest first, but is {value}.")
    setattr(transform, name, (smallest, largest))


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"`interpolation` is one of {', '.join(_INTERPOLATIONS)}, but is {interpolation!r}.")
