"""Labelled rows, their class numbers and the names of classes. No label of another row is read."""

import os
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from .map_style import AnyDataset, image_dataset
from .sources import image_file_names
from .splits import check_labels, first_few, low_shot_indices, match_list_file


def labelled_rows(
    dataset: datasets.Dataset,
    *,
    mask: Sequence[bool] | Sequence[int] | np.ndarray | None = None,
    list_file: str | os.PathLike | None = None,
    classes: Sequence[str] | Sequence[int] | None = None,
) -> np.ndarray:
    """Return the rows whose labels may be used, from a mask, row numbers or a list file.

    No label is read to find them; `classes` reads those of the rows found, and of no other.

    Args:
        dataset (`datasets.Dataset`): Result of [`~hf_msn.load_images`], not streamed.
        mask (`Sequence[bool]`, `Sequence[int]` or `numpy.ndarray`, *optional*):
            True for each labelled row, (N,), or the row numbers. Either this or `list_file`.
        list_file (`str` or `os.PathLike`, *optional*):
            File with the names of the labelled images, see [`~hf_msn.data.splits.match_list_file`].
        classes (`Sequence[str]` or `Sequence[int]`, *optional*):
            Names or numbers of classes that must have a labelled row.

    Returns:
        `numpy.ndarray`: the rows, ascending, int64.

    Raises:
        FileNotFoundError: If the list does not exist.
        ValueError: If both or neither are given, the data is streamed, no row is labelled, a mask has another length,
            a row number does not exist or occurs twice, a list does not fit, or a class has no labelled row.
    """
    if (mask is None) == (list_file is None):
        given = "both" if mask is not None else "neither"
        raise ValueError(f"Exactly one of `mask` and `list_file` selects the labelled rows, but {given} is given.")
    dataset = _with_numbered_rows(dataset)
    if list_file is not None:
        rows = np.sort(match_list_file(list_file, image_file_names(dataset)))
    else:
        values = np.asarray(mask)
        if values.dtype == bool:
            if values.shape != (len(dataset),):
                raise ValueError(
                    f"A boolean `mask` must have one entry per row, ({len(dataset)},), but has shape {values.shape}."
                )
            values = np.flatnonzero(values)
        rows = check_rows("mask", values, len(dataset))
    if classes is not None:
        _check_classes(dataset, rows, classes)
    return rows


def draw_labelled_rows(
    dataset: datasets.Dataset,
    *,
    images_per_class: int | None = None,
    fraction: float | None = None,
    seed: int,
) -> np.ndarray:
    """Draw the labelled rows of an experiment that simulates few labels on labelled data.

    A stratified draw needs the class of every row: this function reads all labels once, and returns nothing but the
    rows. If only some rows have labels, use [`labelled_rows`].

    Args:
        dataset (`datasets.Dataset`): Labelled dataset, from [`~hf_msn.load_images`].
        images_per_class, fraction, seed: As in [`~hf_msn.data.splits.low_shot_indices`].

    Returns:
        `numpy.ndarray`: the rows, ascending, int64.

    Raises:
        ValueError: See [`~hf_msn.data.splits.low_shot_indices`] and [`class_numbers`].
    """
    dataset = _with_numbered_rows(dataset)
    labels = class_numbers(dataset)
    return low_shot_indices(
        labels, images_per_class=images_per_class, fraction=fraction, seed=seed, class_names=class_names(dataset)
    )


def class_names(dataset: AnyDataset) -> list[str] | None:
    """Return the names by class number, from the features; `None` if the labels are plain numbers or absent.

    A dataset of views ([`~hf_msn.MultiViewDataset`], [`~hf_msn.SupportDataset`]) has them as an attribute.
    """
    if hasattr(dataset, "class_names"):
        return dataset.class_names
    feature = (getattr(dataset, "features", None) or {}).get("label")
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def class_numbers(dataset: datasets.Dataset, rows: np.ndarray | None = None, which: str = "dataset") -> np.ndarray:
    """Return the labels (R,) of some rows, by default all, as int64, and read those of no other row.

    Raises:
        ValueError: If there is no column `label`, or a label is not a class number or beyond the names. The message
            calls the dataset `which`.
    """
    columns = list(dataset.features or ())
    if "label" not in columns:
        raise ValueError(
            f"The {which} must have a column 'label', but has {columns}. Name it with `label_column` of "
            "`load_images`, or put the images into class folders."
        )
    names = class_names(dataset)
    # the rows first: nothing may touch the column while other rows are in it
    selected = dataset if rows is None else dataset.select(rows)
    labels = check_labels(selected.select_columns("label").with_format(None)[:]["label"], rows, which)
    if names is not None and labels.max() >= len(names):
        place = int(labels.argmax())
        raise ValueError(
            f"Labels of the {which} must be below {len(names)}, the number of class names, but row "
            f"{place if rows is None else rows[place]} has label {labels[place]}. Load the data with all its classes."
        )
    return labels


def check_class_names(first: AnyDataset, second: AnyDataset) -> list[str] | None:
    """Check that the class numbers of two datasets mean the same classes. Reads their features, never a row.

    Returns the class names of the first. A dataset without class names agrees with any.
    """
    names, other = class_names(first), class_names(second)
    if names is not None and other is not None and names != other:
        number = next((number for number, pair in enumerate(zip(names, other)) if pair[0] != pair[1]), None)
        difference = (
            f"there are {len(names)} and {len(other)} classes"
            if number is None
            else f"class {number} is '{names[number]}' and '{other[number]}'"
        )
        if unknown := [name for name in other if name not in names]:
            difference += f" (the second has {first_few(unknown)}, which the first lacks)"
        raise ValueError(
            f"The two datasets must have the same class names in the same order, but {difference}. Use data of the "
            "same classes, or remove the column 'label' if its classes do not matter."
        )
    return names


def numbered_as(train: AnyDataset, test: AnyDataset) -> AnyDataset:
    """Return the test data with the class numbers of the train data.

    They differ if the classes are text, which each split numbers by itself, and the test data lacks one. Other
    differences are errors.
    """
    names, own = class_names(train), class_names(test)
    numbers = [names.index(name) for name in own or () if names and name in names]
    is_part = (
        own is not None and names is not None and len(numbers) == len(own) < len(names) and numbers == sorted(numbers)
    )
    if not is_part or not isinstance(test, datasets.Dataset):
        check_class_names(train, test)
        return test
    labels = np.array(numbers)[class_numbers(test, which="test data")]
    return test.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=names))


def check_every_class_is_learnt(
    train_labels: np.ndarray, test_labels: np.ndarray, where: str, class_names: list[str] | None
) -> None:
    """Check that every class of the test labels occurs in the train labels. `where` names the latter."""
    unseen = np.setdiff1d(test_labels, train_labels).tolist()
    if unseen:
        names = dict(enumerate(class_names or ()))
        raise ValueError(
            f"Every class of the test data must occur in the {where}, but {len(unseen)} do not: "
            f"{first_few([names.get(label, label) for label in unseen])}. Use train and test data of the same classes."
        )


def check_rows(name: str, values: Sequence[int] | np.ndarray, num_rows: int) -> np.ndarray:
    """Return row numbers as an ascending int64 array, if they are different integers in [0, `num_rows`)."""
    values = np.asarray(values)
    if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be one or more row numbers, but has shape {values.shape} and type {values.dtype}."
        )
    rows, counts = np.unique(values.astype(np.int64), return_counts=True)
    if wrong := rows[(rows < 0) | (rows >= num_rows)].tolist():
        raise ValueError(f"`{name}` must hold row numbers from 0 to {num_rows - 1}, but holds {first_few(wrong)}.")
    if repeated := rows[counts > 1].tolist():
        raise ValueError(
            f"`{name}` must hold each row number once, but holds {first_few(repeated)} more than once. Convert a mask "
            "of 0 and 1 to booleans."
        )
    return rows


def _with_numbered_rows(dataset: Any) -> datasets.Dataset:
    dataset = dataset if hasattr(dataset, "select") else image_dataset(dataset)
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"`dataset` must have numbered rows, but is a {type(dataset).__name__}. Load it without `streaming`."
        )
    return dataset


def _check_classes(dataset: datasets.Dataset, rows: np.ndarray, classes: Sequence[str] | Sequence[int]) -> None:
    names = class_names(dataset)
    present = set(class_numbers(dataset, rows).tolist())
    if names is not None:
        present |= {names[number] for number in present}
    if absent := [entry for entry in classes if entry not in present]:
        raise ValueError(
            f"Each of the {len(classes)} `classes` must have a labelled row, but {len(absent)} have none: "
            f"{first_few(absent)}. Check their spelling (without class names, give numbers) or label an image of each."
        )
