"""Take the images of other kinds of datasets: torchvision's, `Subset`, a list."""

import io
import operator
import os
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .decoding import BrokenImageError, decode_image
from .folders import image_files

logger = logging.get_logger(__name__)

AnyDataset = datasets.Dataset | datasets.IterableDataset


def image_dataset(dataset: Any) -> AnyDataset:
    """Return a `Dataset` with the columns `image` and, if it is labelled, `label`; one of `datasets` stays as it is.

    torchvision's `ImageFolder` becomes its files, a `Subset` the rows of what it is a part of. The images of any other
    map-style dataset are encoded as PNG, once and in memory. Its items are images (`PIL.Image`, array or path), pairs
    (image, label), or dicts with `image` and perhaps `label`.

    Raises:
        ValueError: If it has splits instead of rows, no row numbers, no rows, or items without an image.
    """
    if isinstance(dataset, AnyDataset):
        return dataset
    if isinstance(dataset, Mapping):
        names = ", ".join(repr(str(name)) for name in dataset)
        raise ValueError(
            f"`dataset` must be one split, but is a {type(dataset).__name__} of {names}. Choose one of them, such as "
            f"dataset[{str(next(iter(dataset), 'train'))!r}]."
        )
    if isinstance(dataset, torch.utils.data.Subset):
        return image_dataset(dataset.dataset).select(dataset.indices)
    if isinstance(dataset, str | os.PathLike) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"`dataset` must be a dataset with numbered images, but is a {type(dataset).__name__}. Load images with "
            "`load_images`."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` must have images, but has no rows. Check its source, split and filters.")
    # names of the numbers before a transform of the labels
    names = getattr(dataset, "classes", None) if getattr(dataset, "target_transform", None) is None else None
    if hasattr(dataset, "samples") and names:
        if getattr(dataset, "transform", None) is not None:
            logger.warning("The transform of the %s is not applied to its images.", type(dataset).__name__)
        files, numbers = zip(*dataset.samples)
        return image_files(files, [names[number] for number in numbers], names)
    return _from_items(dataset, names)


def _from_items(dataset: Any, names: list[str] | None) -> datasets.Dataset:
    images, labels = [], []
    for row in range(len(dataset)):
        item = dataset[row]
        if isinstance(item, Mapping) and "image" in item:
            image, label = item["image"], item.get("label")
        elif isinstance(item, tuple | list) and len(item) == 2:
            image, label = item
        else:
            image, label = item, None
        is_row = isinstance(image, Mapping) and {"bytes", "path"} & set(image)
        if not is_row and not isinstance(image, Image.Image | np.ndarray | str | os.PathLike):
            kind = f"dict of {list(image)}" if isinstance(image, Mapping) else type(image).__name__
            raise ValueError(
                "`dataset` must hold images (PIL, array, path), pairs (image, label) or dicts with 'image', but is a "
                f"{type(dataset).__name__} whose row {row} has a {kind}. Leave transforms to the views."
            )
        images.append(_encoded(image, row))
        labels.append(label)
    features = datasets.Features(image=datasets.Image(decode=False))
    given = [label for label in labels if label is not None]
    if not given:
        return datasets.Dataset.from_dict({"image": images}, features)
    if all(isinstance(label, str) for label in given):
        names = sorted(set(given))
    else:
        try:
            labels = [None if label is None else operator.index(label) for label in labels]
        except TypeError:
            kinds = ", ".join(sorted({type(label).__name__ for label in given}))
            logger.warning(
                "Labels must be all class numbers or all class names, but those of the %s are %s. Its images have no "
                "labels here. Convert them to int or str.",
                *(type(dataset).__name__, kinds),
            )
            return datasets.Dataset.from_dict({"image": images}, features)
    has_names = names and all(label is None or isinstance(label, str) or 0 <= label < len(names) for label in labels)
    features["label"] = datasets.ClassLabel(names=list(names)) if has_names else datasets.Value("int64")
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features)


def _encoded(image: Any, row: int) -> dict[str, Any]:
    if isinstance(image, Mapping):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    if isinstance(image, str | os.PathLike):
        return {"bytes": None, "path": os.fspath(image)}
    buffer = io.BytesIO()
    try:
        decode_image(image, row=row).save(buffer, "PNG")
    except BrokenImageError as error:
        if error.path is None:
            raise
        return {"bytes": None, "path": error.path}  # named and skipped when it is read
    return {"bytes": buffer.getvalue(), "path": getattr(image, "filename", None) or None}
