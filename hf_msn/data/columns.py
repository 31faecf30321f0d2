"""Find the columns of the images and the labels."""

from collections.abc import Mapping
from typing import Any

import datasets
from transformers.utils import logging

from .map_style import AnyDataset, image_dataset

logger = logging.get_logger(__name__)

LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")


def image_and_label(
    dataset: AnyDataset,
    source: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> AnyDataset:
    """Return a dataset with the columns `image`, undecoded, and, if labelled, `label`: `ClassLabel`, `int64` or text.

    `source` names its origin in errors. For the columns see [`~hf_msn.load_images`].
    """
    features = dataset.features
    if features is None:
        dataset = dataset._resolve_features()
        features = dataset.features
    image_column = find_image_column(features, image_column, source)
    required = label_column is not None
    label_column = find_label_column(features, image_column, label_column, source)
    feature = None if label_column is None else _feature(features, label_column)
    if label_column is not None and not _is_label(feature):
        if required:
            raise ValueError(
                f"`label_column` must hold class labels, integers or strings, but '{label_column}' of '{source}' "
                f"holds {feature}. Name another column."
            )
        label_column = None
    if _is_text(feature) and isinstance(dataset, datasets.IterableDataset):
        logger.warning(
            "'%s' of '%s' holds class names, which a stream cannot number, as not all are known: its images have no "
            "labels here. For labels, load it without `streaming`, or name a column of integers.",
            *(label_column, source),
        )
        label_column = None

    if features[image_column] != datasets.Image(decode=False):
        # first of all: any later operation would decode the images of a stream, and stop at a broken one
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if label_column is None:
        dataset = dataset.select_columns(image_column)
    else:
        dataset = _take_label(dataset, image_column, label_column)
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    is_number = label_column is not None and not isinstance(feature, datasets.ClassLabel) and not _is_text(feature)
    if is_number and feature.dtype != "int64":
        dataset = dataset.cast_column("label", datasets.Value("int64"))
    return dataset


def number_labels(dataset: AnyDataset) -> AnyDataset:
    """Return a dataset whose labels are numbers: of texts, by their alphabetical order."""
    return dataset.class_encode_column("label") if _is_text(dataset.features.get("label")) else dataset


def undecoded(dataset: Any) -> AnyDataset:
    """Return a dataset whose images `datasets` does not decode: a broken one would end the run without its row."""
    dataset = image_dataset(dataset)
    columns = getattr(dataset, "column_names", ())  # `None` for some streams
    if columns is not None and "image" not in columns:
        raise ValueError(
            f"`dataset` must have a column 'image', but is a {type(dataset).__name__} with {list(columns)}. Load it "
            "with `load_images`."
        )
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise ValueError("`dataset` must have images, but has no rows. Check its source, split and filters.")
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is not None:
        if dataset.format["type"] == "custom":
            logger.warning("The transform of the dataset (`with_transform`) is not applied to its images.")
        dataset = dataset.with_format(None)
    if getattr((dataset.features or {}).get("image"), "decode", False):
        return dataset.cast_column("image", datasets.Image(decode=False))
    return dataset


def find_image_column(features: Mapping[str, Any], column: str | None, source: str) -> str:
    """Return the column of images: `column` if it is given, else the only one, or the one named `image`."""
    if column is not None:
        if column not in features:
            raise ValueError(
                f"`image_column` must hold images, but '{source}' has no column '{column}'. It has {_names(features)}."
            )
        if not _can_be_image(features[column]):
            raise ValueError(
                f"`image_column` must hold images, but '{column}' of '{source}' holds {features[column]}. It has "
                f"{_names(features)}."
            )
        return column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name, feature in features.items() if _is_encoded_image(feature)]
    if len(found) == 1 or "image" in found:
        return "image" if "image" in found else found[0]
    problem = f"several image columns ({', '.join(found)})" if found else "no column of images"
    if "image" in features and not found:
        problem += f": 'image' holds {features['image']}"
    raise ValueError(f"'{source}' has {problem}. Name one with `image_column`: it has {_names(features)}.")


def find_label_column(features: Mapping[str, Any], image_column: str, column: str | None, source: str) -> str | None:
    """Return the column of labels, if there is one: `column` if it is given, else the one with a usual name."""
    if column is not None:
        if column == image_column:
            raise ValueError(
                f"`label_column` must name a column of labels, but '{column}' of '{source}' holds the images. It has "
                f"{_names(features)}."
            )
        if _feature(features, column) is None:
            raise ValueError(
                f"`label_column` must name a column of labels, but '{source}' has no such column '{column}'. It has "
                f"{_names(features)}. Class folders and `metadata.csv` label a folder of images."
            )
        return column
    if "label" in features:
        return "label"
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in LABEL_NAMES if name in features]
    if not found and isinstance(features.get("json"), dict):
        found = [f"json.{name}" for name in LABEL_NAMES if name in features["json"]]
    if len(found) > 1:
        raise ValueError(
            f"'{source}' has several columns that may be the label ({', '.join(found)}). Name one with "
            f"`label_column`: it has {_names(features)}."
        )
    return found[0] if found else None


def _feature(features: datasets.Features, column: str):
    if column in features:
        return features[column]
    outer, _, inner = column.partition(".")
    nested = features.get(outer)
    return nested.get(inner) if inner and isinstance(nested, dict) else None


def _take_label(dataset, image_column: str, label_column: str):
    if label_column in dataset.features:
        dataset = dataset.select_columns([image_column, label_column])
        return dataset if label_column == "label" else dataset.rename_column(label_column, "label")
    outer, _, inner = label_column.partition(".")
    dataset = dataset.select_columns([image_column, outer])
    features = datasets.Features(
        {image_column: dataset.features[image_column], "label": _feature(dataset.features, label_column)}
    )

    def lift(batch: dict) -> dict:
        return {"label": [None if row is None else row[inner] for row in batch[outer]]}

    return dataset.map(lift, batched=True, remove_columns=outer, features=features)


def _is_text(feature) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _is_label(feature) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    if not isinstance(feature, datasets.Value):
        return False
    return _is_text(feature) or feature.dtype == "bool" or feature.dtype.startswith(("int", "uint"))


def _is_encoded_image(feature) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _can_be_image(feature) -> bool:
    # text: the path of a file
    return isinstance(feature, datasets.Image) or _is_text(feature) or _is_encoded_image(feature)


def _names(features) -> str:
    return ", ".join(f"'{name}'" for name in features)
