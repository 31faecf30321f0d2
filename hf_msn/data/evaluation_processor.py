"""The image processor that evaluates what was pretrained: resize, centre crop, normalisation."""

import numbers

from transformers import BitImageProcessor

from .crops import INTERPOLATIONS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    check_size("image_size", image_size)
    if not 0 < crop_fraction <= 1:
        raise ValueError(
            f"`crop_fraction` is crop over resized shortest edge and must be in (0, 1], but is {crop_fraction}. "
            "The paper uses 224 / 256; 1.0 crops nothing off a square image."
        )
    check_interpolation(interpolation)
    return BitImageProcessor(
        size={"shortest_edge": round(image_size / crop_fraction)},
        crop_size={"height": image_size, "width": image_size},
        resample=INTERPOLATIONS[interpolation],
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def check_size(name: str, value) -> None:
    """Raises a `ValueError` unless the value is a side in pixels."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` is a side in pixels and must be a whole number >= 1, but is {value}.")


def check_interpolation(interpolation: str) -> None:
    """Raises a `ValueError` for an unknown interpolation."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` is one of {', '.join(INTERPOLATIONS)}, but is {interpolation!r}.")
