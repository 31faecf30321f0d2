"""The settings that follow from the images, the labels and the processor, for a run without a recipe.

`docs/defaults.md` says where each of them comes from.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..data.decoding import BrokenImageError, decode_image
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD

_SAMPLED_IMAGES = 128
_GRAY_DIFFERENCE = 2.0  # of the largest and the smallest channel, of 255
_DRAWN_SHARE = 0.2  # of pixels that equal their left neighbour
_LARGE_SIDE = 128
# Images like ImageNet, on an accelerator, have the settings of the papers.
_IMAGENET_SIDE, _IMAGENET_IMAGES = 192, 100_000
_SEEN_IMAGES = 400_000  # over all epochs, on fewer images
_SUPPORT_IMAGES = 160


@dataclass(frozen=True)
class ImageSummary:
    """The properties of images that settings follow from.

    Attributes:
        num_images (`int`, *optional*): Number of training images; `None` for a stream.
        side (`int`): Median of the shorter sides, in pixels.
        is_gray (`bool`): Whether nearly all images are without colour.
        is_drawn (`bool`): Whether images have areas of a single colour, as digits and icons have and photographs not.
        mean, std (`tuple[float, ...]`): Of the channels, in [0, 1].
    """

    num_images: int | None = None
    side: int = 256
    is_gray: bool = False
    is_drawn: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def summarize_images(images: datasets.Dataset | datasets.IterableDataset) -> ImageSummary:
    """Look at 128 images, evenly spaced or the first of a stream. Unreadable ones are left out."""
    num_images = len(images) if isinstance(images, datasets.Dataset) else None
    sides, differences, equal_shares, moments = [], [], [], []
    for image in _sampled(images, num_images):
        pixels = np.asarray(image).astype(np.int16)
        sides.append(min(image.size))
        differences.append(np.ptp(pixels, axis=-1).mean())
        moments.append([(pixels / 255).mean(axis=(0, 1)), ((pixels / 255) ** 2).mean(axis=(0, 1))])
        equal_shares.append((pixels[:, 1:] == pixels[:, :-1]).all(axis=-1).mean())
    if not sides:
        return ImageSummary(num_images)  # training says what is wrong with them
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(square - mean**2).clip(0.05)  # images of a single colour
    return ImageSummary(
        num_images,
        side=int(np.median(sides)),
        is_gray=bool(np.quantile(differences, 0.95) < _GRAY_DIFFERENCE),
        is_drawn=bool(np.median(equal_shares) > _DRAWN_SHARE),
        mean=tuple(mean.round(3).tolist()),
        std=tuple(std.round(3).tolist()),
    )


def _sampled(images: datasets.Dataset | datasets.IterableDataset, num_images: int | None) -> Iterator[Image.Image]:
    if num_images is None:
        rows = islice(images, _SAMPLED_IMAGES)
    else:
        positions = np.linspace(0, num_images - 1, min(_SAMPLED_IMAGES, num_images)).astype(int)
        rows = (images[int(position)] for position in positions)
    for row in rows:
        try:
            yield decode_image(row["image"])
        except BrokenImageError:
            continue


def default_fields(
    method: str,
    summary: ImageSummary,
    given: Mapping[str, Any],
    *,
    has_accelerator: bool,
    labels_per_class: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the fields of a recipe that are not `given`.

    Args:
        method (`str`): Name of the method.
        summary (`ImageSummary`): The training images.
        given (`Mapping[str, Any]`): The fields that the user gives. Others follow from them.
        has_accelerator (`bool`): Whether training runs on an accelerator. A CPU has smaller views and a smaller model.
        labels_per_class (`np.ndarray`, *optional*): (C,) counts of the labelled images, for a method with labels.
    """
    if has_accelerator and summary.side >= _IMAGENET_SIDE and (summary.num_images or math.inf) >= _IMAGENET_IMAGES:
        return {}  # the defaults of the fields
    fields = _sizes(summary, given, has_accelerator)
    fields |= _views(method, summary, fields["image_size"], has_accelerator)
    if "timm_model" not in given:
        fields |= _encoder(given, has_accelerator)
    fields |= _head(method, summary) | _training(method, summary, {**fields, **given})
    if labels_per_class is not None:
        fields |= _support(labels_per_class)
    return {name: value for name, value in fields.items() if name not in given}


def _sizes(summary: ImageSummary, given: Mapping[str, Any], has_accelerator: bool) -> dict[str, int]:
    """Sides of views and patches: 4 to 8 patches per side on a CPU, 7 to 14 on an accelerator."""
    size = given.get("image_size") or min(summary.side, 224 if has_accelerator else 64)
    if "timm_model" in given:
        return {"image_size": size, "focal_size": max(1, size // 2)}
    per_side = 4 if not has_accelerator else 8 if size < _LARGE_SIDE else 14
    patch = given.get("patch_size")
    if patch is None:
        about = max(2, round(size / per_side))
        divisors = [side for side in range(1, size + 1) if size % side == 0]
        patch = min(divisors, key=lambda side: abs(side - about))
        if "image_size" not in given and abs(patch - about) > 1:
            patch = about  # a prime size, which is rounded
    if "image_size" not in given:
        size = max(1, round(size / patch)) * patch
    return {"image_size": size, "patch_size": patch, "focal_size": max(1, size // patch // 2) * patch}


def _views(method: str, summary: ImageSummary, image_size: int, has_accelerator: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"image_mean": summary.mean, "image_std": summary.std}
    fields |= {"focal_views": 4 if method == "msn" and has_accelerator else 0, "focal_scale": (0.15, 0.4)}
    if image_size < _LARGE_SIDE:
        # whole images: the subject of a small one fills it
        fields |= {"global_scale": (0.4, 1.0), "crop_fraction": 1.0, "blur_probability": 0.0}
    if summary.is_gray:
        fields |= {"color_jitter": 0.4, "grayscale": 0.0}
    if summary.is_drawn:
        # colour is part of what a drawing shows
        fields |= {"color_jitter": 0.2, "grayscale": 0.0, "blur_probability": 0.0}
    if summary.is_drawn and summary.is_gray:
        # characters: a mirrored one, or a part of one, is another
        fields |= {"horizontal_flip": 0.0, "rotation": 10.0, "translation": 0.05}
        fields |= {"global_scale": (0.65, 1.0), "color_jitter": 0.0, "color_jitter_probability": 0.0}
    return fields


def _encoder(given: Mapping[str, Any], has_accelerator: bool) -> dict[str, Any]:
    """A narrow ViT. Its initial weights are wider than 0.02, which is meant for widths of 768 and more."""
    width = given.get("hidden_size") or (384 if has_accelerator else 128)
    largest = max(1, width // (64 if has_accelerator else 32))
    return {
        "hidden_size": width,
        "num_hidden_layers": 6 if has_accelerator else 4,
        "num_attention_heads": next(heads for heads in range(largest, 0, -1) if width % heads == 0),
        "intermediate_size": 4 * width if has_accelerator else 2 * width,
        "initializer_range": round(1 / math.sqrt(width), 3),
        "position_initializer_range": 1.0,
    }


def _head(method: str, summary: ImageSummary) -> dict[str, Any]:
    fields: dict[str, Any] = {"projection_hidden_dim": 256, "projection_dim": 64}
    if method == "msn":
        prototypes = 2 ** round(math.log2((summary.num_images or _IMAGENET_IMAGES) / 60))
        fields |= {"head_initializer_range": None, "num_prototypes": min(max(64, prototypes), 1024), "mask_ratio": 0.4}
    elif method == "paws":
        fields |= {"label_smoothing": 0.1, "projection_activation": "gelu"}
    return fields


def _training(method: str, summary: ImageSummary, given: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "per_device_train_batch_size": min(64, max(2, (summary.num_images or 64) // 4)),
        "warmup_steps": 0.1,  # of all steps
        "schedule_stretch": 1.0,
    }
    if not given.get("use_lars"):
        rate = 2e-3 * math.sqrt(128 / max(128, given.get("hidden_size", 512)))
        fields |= {"learning_rate": round(rate, 5), "final_weight_decay": 0.04}
    if method in ("msn", "byol") and given.get("ema", True):
        fields["ema_momentum"] = 0.98
    if not {"num_train_epochs", "max_steps", "max_minutes"} & given.keys():
        num_epochs = _SEEN_IMAGES / (summary.num_images or _SEEN_IMAGES)
        fields["num_train_epochs"] = float(round(min(max(num_epochs, 20), 400)))
    return fields


def _support(labels_per_class: np.ndarray) -> dict[str, Any]:
    """As many classes and images per class in a support set as there are, up to 160 images."""
    num_classes = min(int((labels_per_class > 0).sum()), _SUPPORT_IMAGES // 2)
    most = int(np.median(labels_per_class[labels_per_class > 0]))
    return {
        "global_support_classes": num_classes,
        "global_support_images_per_class": max(1, min(most, _SUPPORT_IMAGES // num_classes)),
        "support_views_per_image": 2 if 2 * num_classes * most <= _SUPPORT_IMAGES else 1,
    }
