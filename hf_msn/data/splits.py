"""Which few images are labelled: seeded stratified splits, and the lists of the published ImageNet subsets."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

logger = logging.getLogger(__name__)

_NUM_SHOWN = 5


def low_shot_indices(
    labels: Sequence[int] | np.ndarray,
    *,
    images_per_class: int | None = None,
    fraction: float | None = None,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draws a stratified split: `images_per_class` images of each class, or a `fraction` of each class.

    Each class has its own order, a function of (`seed`, class, size of the class) alone; the split takes the first k
    of it. So with one seed the images at k = 1 are among those at k = 2, and the same on any machine.

    Args:
        labels (`Sequence[int]` or `numpy.ndarray`):
            Class number of each row, (N,).
        images_per_class (`int`, *optional*):
            Images of each class, k >= 1. Either this or `fraction`.
        fraction (`float`, *optional*):
            Share of each class in (0, 1], rounded to whole images, at least one.
        seed (`int`):
            Seed of the split, >= 0.
        class_names (`Sequence[str]`, *optional*):
            Names by class number, for the errors; a class among them that has no image at all is an error too.

    Returns:
        `numpy.ndarray`: rows of the split, ascending, int64.

    Raises:
        ValueError: no images, a label that is None or negative, k < 1, a fraction outside (0, 1], both or neither
            given, or classes with fewer than k images (named, with how many they have).
    """
    if (images_per_class is None) == (fraction is None):
        raise ValueError(
            f"Give either `images_per_class` or `fraction`, but they are {images_per_class} and {fraction}."
        )
    if images_per_class is not None and (int(images_per_class) != images_per_class or images_per_class < 1):
        raise ValueError(f"`images_per_class` must be a whole number >= 1, but is {images_per_class}.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"`fraction` is a share of each class and must be in (0, 1], but is {fraction}. 1 % is 0.01.")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0, but is {seed}.")
    labels = _checked_labels(labels)
    counts = np.bincount(labels, minlength=len(class_names or ()))
    if images_per_class is not None:
        _refuse_small_classes(counts, int(images_per_class), class_names)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    chosen = []
    for number, rows in enumerate(by_class):
        if len(rows) == 0:
            continue
        k = int(images_per_class) if fraction is None else max(1, int(fraction * len(rows) + 0.5))
        # RandomState is frozen by numpy: its streams are the same in every version
        order = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, number]))).permutation(len(rows))
        chosen.append(rows[order[:k]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


@dataclass
class ListFileReport:
    """What a list file holds.

    Args:
        path (`str`): The file.
        counts (`dict[str, int]`): Images by class, each name counted once.
        expected (`int`, *optional*): The number in a file name such as `3imgs_class.txt`.
        duplicates (`list[str]`): Names that are there more than once.
    """

    path: str
    counts: dict[str, int]
    expected: int | None
    duplicates: list[str]

    @property
    def smallest(self) -> int:
        return min(self.counts.values())

    @property
    def largest(self) -> int:
        return max(self.counts.values())

    def __str__(self) -> str:
        held = f"{self.smallest}" if self.smallest == self.largest else f"{self.smallest} to {self.largest}"
        text = f"'{self.path}' lists {sum(self.counts.values())} images of {len(self.counts)} classes, {held} a class"
        if self.expected is not None and not self.smallest == self.largest == self.expected:
            text += f", although its name says {self.expected}"
        elif self.smallest != self.largest:
            text += " (uneven)"
        if self.duplicates:
            text += (
                f"; {len(self.duplicates)} names are there more than once ({_first(self.duplicates)}) and count once"
            )
        return text + "."


def read_list_file(path: str | os.PathLike) -> list[str]:
    """Reads a list in the format of the published ImageNet subsets: one file name a line, `<class>_<image>.JPEG`.

    Args:
        path (`str` or `os.PathLike`):
            The list. Empty lines are left out.

    Returns:
        `list[str]`: the names, in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no names in it, or lines in another format (the first five shown).
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The list file '{path}' does not exist (looked from {os.getcwd()}). Check the path.")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The list file '{path}' is no text: {error}. Give a file with one image name a line."
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"The list file '{path}' holds no names; it needs one a line, such as n01440764_10026.JPEG.")
    wrong = [name for name in names if not re.fullmatch(r"[^_\s]+_\S+", _base(name))]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(names)} lines of the list file '{path}' are not <class>_<image>, such as "
            f"n01440764_10026.JPEG: {_first(wrong)}."
        )
    return names


def report_list_file(path: str | os.PathLike) -> ListFileReport:
    """Counts the classes of a list file; see [`ListFileReport`].

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
    """Finds the rows of a data set that a list file names, and says how many images a class it holds.

    Names are compared without folder and extension: first as they are, then without the `_<class>` that the Hub's
    ImageNet rows end in (`n01440764_10026_n01440764.JPEG`). Counts a class are logged; uneven ones, and ones that
    differ from the number in the file's name, as a warning (one published list named for 3 images a class holds 5).

    Args:
        path (`str` or `os.PathLike`):
            The list, see [`read_list_file`].
        file_names (`Sequence[str | None]`):
            File name of each row, from [`~hf_msn.data.image_file_names`].
        class_names (`Sequence[str]`, *optional*):
            Known classes; a class of the list that is not among them is an error.
        allow_missing (`bool`, *optional*, defaults to `False`):
            Leaves out names that no row has, with a warning.

    Returns:
        `numpy.ndarray`: the rows, in the list's order, each once, int64.

    Raises:
        FileNotFoundError: no such list.
        ValueError: names that no row has or that several have, or unknown classes (counted, the first five shown).
    """
    names = list(dict.fromkeys(_stem(name) for name in read_list_file(path)))
    if class_names is not None:
        unknown = sorted({_class(name) for name in names} - set(class_names))
        if unknown:
            raise ValueError(
                f"{len(unknown)} classes of the list file '{path}' are not among the data set's {len(class_names)}: "
                f"{_first(unknown)}. Check that list and data set belong together."
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
        text = f"{len(missing)} of {len(names)} names of the list file '{path}' are in no row: {_first(missing)}"
        if not allow_missing or len(missing) == len(names):
            raise ValueError(f"{text}. Check that list and data set belong together.")
        logger.warning("%s; left out.", text)
    several = [f"{name} (rows {', '.join(map(str, rows[:3]))})" for name, rows in matches.items() if len(rows) > 1]
    if several:
        raise ValueError(
            f"{len(several)} names of the list file '{path}' are in several rows: {_first(several)}. "
            "File names must be unique in the data set."
        )
    _say(report_list_file(path))
    return np.array([rows[0] for rows in matches.values() if rows], dtype=np.int64)


def _say(report: ListFileReport) -> None:
    is_share = re.search(r"percent|%", os.path.basename(report.path).lower())
    uneven = report.smallest != report.largest and not is_share
    differs = report.expected is not None and not report.smallest == report.largest == report.expected
    level = logging.WARNING if uneven or differs or report.duplicates else logging.INFO
    logger.log(level, "%s", report)


def _checked_labels(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    values = np.asarray(labels)
    if values.ndim != 1:
        raise ValueError(f"`labels` must be one number for each row, (N,), but has shape {values.shape}.")
    if len(values) == 0:
        raise ValueError("`labels` is empty: there are no images to draw from. Check the source and the split.")
    if values.dtype.kind == "O":
        row = next((row for row, label in enumerate(values) if label is None), None)
        if row is not None:
            raise ValueError(f"Row {row} has label None; low-shot splits need a class number for each row.")
    if values.dtype.kind not in "iu":
        raise ValueError(f"`labels` must be whole numbers, but are {values.dtype}, such as {values[0]!r}.")
    if values.min() < 0:
        row = int(np.argmax(values < 0))
        raise ValueError(
            f"Row {row} has label {values[row]}, but class numbers are >= 0 (-1 marks unlabelled rows, as in "
            "ImageNet's test split). Use a labelled split."
        )
    return values.astype(np.int64)


def _refuse_small_classes(counts: np.ndarray, images_per_class: int, class_names: Sequence[str] | None) -> None:
    # without names, a number that no row has is no class
    few = [
        number
        for number, count in enumerate(counts)
        if count < images_per_class and (count > 0 or class_names is not None)
    ]
    if few:
        named = [
            f"{class_names[number] if class_names and number < len(class_names) else number} has {counts[number]}"
            for number in few
        ]
        raise ValueError(
            f"{len(few)} classes have fewer than `images_per_class` = {images_per_class} images: {_first(named)}. "
            "Use fewer images a class, or more data."
        )


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _stem(name: str) -> str:
    return PurePosixPath(_base(name)).stem


def _class(name: str) -> str:
    return _base(name).split("_", 1)[0]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
