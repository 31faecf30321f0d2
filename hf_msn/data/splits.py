"""Stratified splits with few labels, and the lists of the published ImageNet subsets."""

import logging as levels
import numbers
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from transformers.utils import logging

from ..checks import check_integer, check_number

logger = logging.get_logger(__name__)


def low_shot_indices(
    labels: Sequence[int] | np.ndarray,
    *,
    images_per_class: int | None = None,
    fraction: float | None = None,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw a stratified split: `images_per_class` images per class, or a `fraction` of each class.

    Each class has its own order, a function of (`seed`, class, size of the class) alone; the split takes the first k
    of it. So with one seed the images at k = 1 are among those at k = 2, and the same on any machine.

    Args:
        labels (`Sequence[int]` or `numpy.ndarray`):
            Class number of each row, (N,).
        images_per_class (`int`, *optional*):
            Images per class, k >= 1. Either this or `fraction`.
        fraction (`float`, *optional*):
            Share of each class in (0, 1], rounded to whole images, at least one.
        seed (`int`):
            Seed of the split, >= 0.
        class_names (`Sequence[str]`, *optional*):
            Names by class number; each of these classes must have images.

    Returns:
        `numpy.ndarray`: rows of the split, ascending, int64.

    Raises:
        ValueError: If there are no images, a label is not a class number, an argument is out of range, both or neither
            of k and fraction are given, or a class has fewer than k images (it is named).
    """
    if (images_per_class is None) == (fraction is None):
        raise ValueError(
            f"Exactly one of `images_per_class` and `fraction` must be given, but they are {images_per_class} and "
            f"{fraction}."
        )
    check_integer("seed", seed, 0)
    labels = check_labels(labels)
    counts = np.bincount(labels, minlength=len(class_names or ()))
    if images_per_class is not None:
        check_integer("images_per_class", images_per_class)
        _check_class_sizes(counts, images_per_class, class_names)
    else:
        check_number("fraction", fraction, above=0, maximum=1, remedy="1 % is 0.01.")
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    chosen = []
    for number, rows in enumerate(by_class):
        if len(rows) == 0:
            continue
        k = images_per_class if fraction is None else max(1, int(fraction * len(rows) + 0.5))
        # RandomState is frozen by numpy: its streams are the same in every version
        order = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, number]))).permutation(len(rows))
        chosen.append(rows[order[:k]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def check_labels(
    labels: Sequence[int] | np.ndarray, rows: np.ndarray | None = None, which: str = "labelled data"
) -> np.ndarray:
    """Return labels as an int64 array, (N,).

    Args:
        labels (`Sequence[int]` or `numpy.ndarray`):
            Class number of each labelled image, (N,): integers >= 0, not necessarily 0 to n - 1.
        rows (`numpy.ndarray`, *optional*):
            Their rows, for the errors. By default 0 to N - 1.
        which (`str`, *optional*):
            The data's name, for the errors.

    Raises:
        ValueError: If there is none, the shape differs, or a label is `None`, negative or not an integer.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"Labels of the {which} must be one or more numbers, (N,), but have shape {values.shape}. Check the split "
            "and the labelled rows."
        )
    if values.dtype.kind in "iu":
        is_wrong = values < 0
    else:
        is_wrong = np.array([not _is_class_number(label) for label in values])
    if is_wrong.any():
        place = int(is_wrong.argmax())
        label = values[place].item() if isinstance(values[place], np.generic) else values[place]
        raise ValueError(
            f"Labels of the {which} must be class numbers >= 0, but row {place if rows is None else rows[place]} has "
            f"label {label!r} (None and -1 mark unlabelled rows; {int(is_wrong.sum())} of {len(values)} are wrong). "
            "Use labelled rows only, and number named classes (`load_images` does)."
        )
    return values.astype(np.int64)


@dataclass
class ListFileReport:
    """The contents of a list file.

    Args:
        path (`str`): The file.
        counts (`dict[str, int]`): Images per class, each name counted once.
        expected (`int`, *optional*): The number in a file name such as `3imgs_class.txt`.
        duplicates (`list[str]`): Names that occur more than once.
    """

    path: str
    counts: dict[str, int]
    expected: int | None
    duplicates: list[str]

    @property
    def is_as_named(self) -> bool:
        """Whether the counts are even and match the file's name. The list of a share may be uneven."""
        smallest, largest = min(self.counts.values()), max(self.counts.values())
        is_share = re.search(r"percent|%", os.path.basename(self.path).lower()) is not None
        even = smallest == largest or is_share
        return even and self.expected in (None, smallest) and not self.duplicates

    def __str__(self) -> str:
        smallest, largest = min(self.counts.values()), max(self.counts.values())
        sizes = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        images, classes = sum(self.counts.values()), len(self.counts)
        text = f"'{self.path}' lists {images} images of {classes} classes, {sizes} per class"
        if self.expected is not None and not smallest == largest == self.expected:
            text += f", although its name says {self.expected}"
        if self.duplicates:
            repeated = first_few(self.duplicates)
            text += f"; {len(self.duplicates)} names occur more than once ({repeated}) and count once"
        return text + "."


def read_list_file(path: str | os.PathLike) -> list[str]:
    """Read a list in the format of the published ImageNet subsets: one file name per line, `<class>_<image>.JPEG`.

    Args:
        path (`str` or `os.PathLike`):
            The list. Empty lines are skipped.

    Returns:
        `list[str]`: the names, in the order of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has no names, or lines in another format (the first five are shown).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The list file '{path}' must be text, one image name per line, but is not: {error}."
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    wrong = [name for name in names if not re.fullmatch(r"[^_\s]+_\S+", _base(name))]
    if wrong or not names:
        raise ValueError(
            f"The list file '{path}' must have lines of the form <class>_<image>, such as n01440764_10026.JPEG, but "
            f"{len(wrong)} of {len(names)} are not: {first_few(wrong)}."
        )
    return names


def report_list_file(path: str | os.PathLike) -> ListFileReport:
    """Count the classes of a list file.

    Args:
        path (`str` or `os.PathLike`):
            The list.
    """
    names = Counter(_stem(name) for name in read_list_file(path))
    expected = re.search(r"(\d+)[ _-]*im(?:g|age)", Path(path).name.lower())
    return ListFileReport(
        path=str(path),
        counts=dict(sorted(Counter(_class(name) for name in names).items())),
        expected=int(expected.group(1)) if expected else None,
        duplicates=[name for name, count in names.items() if count > 1],
    )


def match_list_file(
    path: str | os.PathLike,
    file_names: Sequence[str | None],
    *,
    class_names: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> np.ndarray:
    """Return the rows of a dataset that a list file names, and log how many images per class it holds.

    Names are compared without folder and extension: first as they are, then without the `_<class>` that the Hub's
    ImageNet rows end in (`n01440764_10026_n01440764.JPEG`). Uneven counts, and counts that differ from the number in
    the file's name, are logged as a warning (one published list named for 3 images per class holds 5).

    Args:
        path (`str` or `os.PathLike`):
            The list, see [`read_list_file`].
        file_names (`Sequence[str | None]`):
            File name of each row, from [`~hf_msn.data.sources.image_file_names`].
        class_names (`Sequence[str]`, *optional*):
            Known classes; a class of the list that is not among them is an error.
        allow_missing (`bool`, *optional*, defaults to `False`):
            Skip names without a row, with a warning.

    Returns:
        `numpy.ndarray`: the rows, in the list's order, each once, int64.

    Raises:
        FileNotFoundError: If the list does not exist.
        ValueError: If names have no row or several, or classes are unknown (counted, the first five shown).
    """
    names = list(dict.fromkeys(_stem(name) for name in read_list_file(path)))
    if class_names is not None and (unknown := sorted({_class(name) for name in names} - set(class_names))):
        raise ValueError(
            f"Classes of the list file '{path}' must be among the dataset's {len(class_names)}, but {len(unknown)} "
            f"are not: {first_few(unknown)}. Check that list and dataset belong together."
        )
    exact: dict[str, list[int]] = {}
    shortened: dict[str, list[int]] = {}
    for row, file_name in enumerate(file_names):
        if file_name is None:
            continue
        stem = _stem(file_name)
        exact.setdefault(stem, []).append(row)
        suffix = f"_{_class(stem)}"
        if stem.endswith(suffix):
            shortened.setdefault(stem.removesuffix(suffix), []).append(row)
    matches = {name: exact.get(name) or shortened.get(name) or [] for name in names}
    missing = [name for name, rows in matches.items() if not rows]
    if missing:
        text = f"{len(missing)} of {len(names)} names of the list file '{path}' have no row: {first_few(missing)}"
        if not allow_missing or len(missing) == len(names):
            raise ValueError(f"{text}. Check that list and dataset belong together.")
        logger.warning("%s; skipped.", text)
    several = [f"{name} (rows {', '.join(map(str, rows[:3]))})" for name, rows in matches.items() if len(rows) > 1]
    if several:
        raise ValueError(
            f"File names must be unique in the dataset, but {len(several)} names of the list file '{path}' have "
            f"several rows: {first_few(several)}."
        )
    report = report_list_file(path)
    logger.log(levels.INFO if report.is_as_named else levels.WARNING, "%s", report)
    return np.array([rows[0] for rows in matches.values() if rows], dtype=np.int64)


def first_few(entries: Sequence[Any], number: int = 5) -> str:
    """Return the first entries as text, with "..." if there are more."""
    return ", ".join(map(str, entries[:number])) + (", ..." if len(entries) > number else "")


def _is_class_number(label: Any) -> bool:
    return isinstance(label, numbers.Integral) and not isinstance(label, (bool, np.bool_)) and label >= 0


def _check_class_sizes(counts: np.ndarray, images_per_class: int, class_names: Sequence[str] | None) -> None:
    # without names, a number without rows is no class
    names = dict(enumerate(class_names or ()))
    few = [
        f"{names.get(number, number)} has {count}"
        for number, count in enumerate(counts)
        if count < images_per_class and (count > 0 or class_names is not None)
    ]
    if few:
        raise ValueError(
            f"Each class must have at least `images_per_class` = {images_per_class} images, but {len(few)} have "
            f"fewer: {first_few(few)}. Use fewer images per class, or more data."
        )


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _stem(name: str) -> str:
    return PurePosixPath(_base(name)).stem


def _class(name: str) -> str:
    return _base(name).split("_", 1)[0]
