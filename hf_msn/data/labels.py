"""Which rows are labelled, and their class numbers; no label of another row is read."""

import numbers
import os
from collections.abc import Sequence

import datasets
import numpy as np

from .sources import image_file_names
from .splits import low_shot_indices, match_list_file

_NUM_SHOWN = 5


def labelled_rows(
    dataset: datasets.Dataset,
    *,
    mask: Sequence[bool] | Sequence[int] | np.ndarray | None = None,
    list_file: str | os.PathLike | None = None,
    classes: Sequence[str] | Sequence[int] | None = None,
) -> np.ndarray:
    """Finds the rows whose labels may be used, from a mask, row numbers or a list file.

    No label is read to find them; `classes` reads those of the rows found, and of no other.

    Args:
        dataset (`datasets.Dataset`):
            Result of [`~hf_msn.data.load_images`], not streamed.
        mask (`Sequence[bool]`, `Sequence[int]` or `numpy.ndarray`, *optional*):
            True for each labelled row, (N,), or the numbers of the labelled rows. Either this or `list_file`.
        list_file (`str` or `os.PathLike`, *optional*):
            File with the names of the labelled images, see [`~hf_msn.data.match_list_file`].
        classes (`Sequence[str]` or `Sequence[int]`, *optional*):
            Names or numbers of classes that must have a labelled row.

    Returns:
        `numpy.ndarray`: the rows, ascending, int64: the same whichever way they were given.

    Raises:
        FileNotFoundError: no such list.
        ValueError: both or neither given, streamed data, no labelled row, a mask of another length, row numbers that
            are not there or there twice, a list that does not fit (see [`~hf_msn.data.match_list_file`]), a class
            without labelled row.
    """
    if (mask is None) == (list_file is None):
        given = "both are" if mask is not None else "none is"
        raise ValueError(f"Give either `mask` or `list_file` to say which rows are labelled, but {given} given.")
    if not hasattr(dataset, "select"):
        raise ValueError(
            f"Labelled rows are picked by number, but {type(dataset).__name__} has no numbered rows; load the data "
            "without `streaming`."
        )
    if list_file is not None:
        rows = np.sort(match_list_file(list_file, image_file_names(dataset)))
    else:
        rows = _rows_of_mask(mask, len(dataset))
    if classes is not None:
        _require_classes(dataset, rows, classes)
    return rows


def draw_labelled_rows(
    dataset: datasets.Dataset,
    *,
    images_per_class: int | None = None,
    fraction: float | None = None,
    seed: int,
) -> np.ndarray:
    """Draws the labelled rows of an experiment that simulates few labels on labelled data.

    A stratified draw has to see the class of every row: this function reads all labels once, and nothing but the
    rows leaves it. Where only some rows have labels, use [`labelled_rows`].

    Args:
        dataset (`datasets.Dataset`):
            Labelled data set, as [`~hf_msn.data.load_images`] gives it.
        images_per_class (`int`, *optional*):
            Images of each class, k >= 1. Either this or `fraction`.
        fraction (`float`, *optional*):
            Share of each class in (0, 1], rounded to whole images, at least one.
        seed (`int`):
            Seed of the draw, >= 0.

    Returns:
        `numpy.ndarray`: the rows, ascending, int64.

    Raises:
        ValueError: see [`~hf_msn.data.low_shot_indices`] and [`class_numbers`].
    """
    labels = class_numbers(dataset)
    return low_shot_indices(
        labels, images_per_class=images_per_class, fraction=fraction, seed=seed, class_names=class_names(dataset)
    )


def check_class_names(
    labelled: datasets.Dataset | datasets.IterableDataset, unlabelled: datasets.Dataset | datasets.IterableDataset
) -> None:
    """Refuses two data sets whose class numbers mean different classes. Reads their features, never a row.

    Args:
        labelled, unlabelled (`datasets.Dataset`, `datasets.IterableDataset` or a data set of views):
            The two data sets. One without class names agrees with any.

    Raises:
        ValueError: both have class names, and these differ in number or at a position.
    """
    first, second = class_names(labelled), class_names(unlabelled)
    if first is None or second is None or first == second:
        return
    differing = [number for number, (one, other) in enumerate(zip(first, second)) if one != other]
    if differing:
        number = differing[0]
        what = f"class {number} is '{first[number]}' in the labelled data, but '{second[number]}' in the unlabelled"
    else:
        what = f"the labelled data has {len(first)} classes, but the unlabelled has {len(second)}"
    raise ValueError(
        f"Labelled and unlabelled data have different class names: {what}. Load both from one source, or take the "
        "unlabelled data's column 'label' away (`remove_columns`) if its classes do not matter."
    )


def class_names(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    """Names by class number, from the features; None where the labels are plain numbers or not there.

    A data set of views ([`~hf_msn.data.MultiViewDataset`], [`~hf_msn.data.SupportDataset`]) knows them as well.
    """
    if hasattr(dataset, "class_names"):
        return dataset.class_names
    feature = (getattr(dataset, "features", None) or {}).get("label")
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def class_numbers(dataset: datasets.Dataset, rows: np.ndarray | None = None) -> np.ndarray:
    """Reads and checks the labels of some rows, and of no other.

    Args:
        dataset (`datasets.Dataset`):
            Data set with a column `label`.
        rows (`numpy.ndarray`, *optional*):
            The rows to read, (R,). By default all.

    Returns:
        `numpy.ndarray`: class number of each of these rows, (R,), int64.

    Raises:
        ValueError: no column `label`, or a label that is no class number (see [`check_labels`]) or beyond the names.
    """
    columns = list(dataset.features or ())
    if "label" not in columns:
        raise ValueError(
            f"The data set has no column 'label' to read the labelled rows' classes from; it has "
            f"{', '.join(columns) or 'none that are known'}. Name it to `load_images` with `label_column`."
        )
    names = class_names(dataset)
    # the rows first: nothing may touch the column while other rows are in it
    chosen = dataset if rows is None else dataset.select(rows)
    labels = check_labels(chosen.select_columns("label").with_format(None)[:]["label"], rows)
    if names is not None and labels.max() >= len(names):
        place = int(np.argmax(labels >= len(names)))
        raise ValueError(
            f"Row {place if rows is None else rows[place]} has label {labels[place]}, but the data set names "
            f"{len(names)} classes, 0 to {len(names) - 1}. Correct the label, or load the data with all its classes."
        )
    return labels


def check_labels(labels: Sequence[int] | np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Checks that labels are class numbers: whole numbers >= 0, not necessarily 0 to n - 1.

    Args:
        labels (`Sequence[int]` or `numpy.ndarray`):
            Class number of each labelled image, (N,).
        rows (`numpy.ndarray`, *optional*):
            Their rows, for the errors. By default 0 to N - 1.

    Returns:
        `numpy.ndarray`: the labels, (N,), int64.

    Raises:
        ValueError: none at all, another shape, or a label that is None, negative or no whole number.
    """
    values = np.asarray(labels)
    if values.size == 0:
        raise ValueError("There is no labelled image, but at least one is needed. Check the mask or the list file.")
    if values.ndim != 1:
        raise ValueError(f"Labels are one number for each row, (N,), but have shape {values.shape}.")
    is_wrong = np.zeros(len(values), dtype=bool)
    if values.dtype.kind == "O":
        is_wrong[:] = [not isinstance(label, numbers.Integral) or isinstance(label, bool) for label in values]
        if not is_wrong.any():
            values = values.astype(np.int64)
    elif values.dtype.kind not in "iu":
        is_wrong[:] = True
    if not is_wrong.any():
        is_wrong = values < 0
    if is_wrong.any():
        place = int(np.argmax(is_wrong))
        label = values[place].item() if isinstance(values[place], np.generic) else values[place]
        raise ValueError(
            f"Row {place if rows is None else rows[place]} has label {label!r}, but the label of a labelled image is "
            "its class number, a whole number >= 0 (None and -1 mark unlabelled rows). Leave such rows out of the "
            "labelled ones, and number named classes (`load_images` does)."
        )
    return values.astype(np.int64)


def _rows_of_mask(mask: Sequence[bool] | Sequence[int] | np.ndarray, num_rows: int) -> np.ndarray:
    values = np.asarray(mask)
    if values.ndim != 1:
        raise ValueError(f"`mask` is one entry for each row, (N,), but has shape {values.shape}.")
    if len(values) == 0:
        raise ValueError("`mask` is empty, but at least one row must be labelled; give its number, or a boolean mask.")
    if values.dtype.kind == "b":
        if len(values) != num_rows:
            raise ValueError(
                f"`mask` has {len(values)} entries, but the data set has {num_rows} rows; a boolean mask needs one "
                "for each row. Make it from the data set as it is given here."
            )
        if not values.any():
            raise ValueError("`mask` is False for every row, but at least one row must be labelled.")
        return np.flatnonzero(values).astype(np.int64)
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"`mask` is a boolean for each row or the numbers of the labelled rows, but holds {values.dtype}, such as "
            f"{values[0]!r}."
        )
    outside = values[(values < 0) | (values >= num_rows)]
    if len(outside):
        raise ValueError(
            f"`mask` names {len(outside)} rows that are not there ({_first(outside)}); the data set has {num_rows}, "
            f"numbered from 0 to {num_rows - 1}."
        )
    rows, counts = np.unique(values, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"`mask` names {int((counts > 1).sum())} rows more than once ({_first(rows[counts > 1])}); name each "
            "labelled row once, and give a mask of 0 and 1 as booleans."
        )
    return rows.astype(np.int64)


def _require_classes(dataset: datasets.Dataset, rows: np.ndarray, classes: Sequence[str] | Sequence[int]) -> None:
    names = class_names(dataset)
    present = set(class_numbers(dataset, rows).tolist())
    if any(isinstance(entry, str) for entry in classes):
        if names is None:
            raise ValueError(
                f"`classes` holds names ({_first(classes)}), but the labels of the data set are plain numbers; give "
                "class numbers."
            )
        present |= {names[number] for number in present}
    absent = [entry for entry in classes if entry not in present]
    if absent:
        raise ValueError(
            f"{len(absent)} of the {len(classes)} `classes` have no labelled row: {_first(absent)}. Check their "
            "spelling, label at least one image of each, or take them out of `classes`."
        )


def _first(entries: Sequence) -> str:
    return ", ".join(str(entry) for entry in entries[:_NUM_SHOWN]) + (", ..." if len(entries) > _NUM_SHOWN else "")
