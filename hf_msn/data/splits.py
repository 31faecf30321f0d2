"""Stratified splits with few labels, and the lists of the published ImageNet subsets."""

import itertools
import logging as levels
import numbers
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
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
        labels (`Sequence[int]` or `numpy.ndarray`): Class number of each row, (N,).
        images_per_class (`int`, *optional*): Images per class, k >= 1. Either this or `fraction`.
        fraction (`float`, *optional*): Share of each class in (0, 1], rounded to whole images, at least one.
        seed (`int`): Seed of the split, >= 0.
        class_names (`Sequence[str]`, *optional*): Names by class number; each of these classes must have images.

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
        chosen.append(rows[random_stream(seed, number).permutation(len(rows))[:k]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def random_stream(*numbers: int) -> np.random.RandomState:
    """Return the stream of random numbers of some integers. numpy has frozen it: it is the same in every version."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([int(number) for number in numbers])))


def check_labels(
    labels: Sequence[int] | np.ndarray, rows: np.ndarray | None = None, which: str = "labelled data"
) -> np.ndarray:
    """Return class numbers as an int64 array (N,): integers >= 0, not necessarily 0 to n - 1.

    `rows` and `which` name the rows and the data in errors.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"Labels of the {which} must be one or more numbers, (N,), but have shape {values.shape}. Check the split "
            "and the labelled rows."
        )
    is_integer = values.dtype.kind in "iu"
    is_wrong = values < 0 if is_integer else np.array([not _is_class_number(label) for label in values])
    if is_wrong.any():
        place = int(is_wrong.argmax())
        label = values[place].item() if isinstance(values[place], np.generic) else values[place]
        raise ValueError(
            f"Labels of the {which} must be class numbers >= 0, but row {place if rows is None else rows[place]} has "
            f"label {label!r} (None and -1 mark unlabelled rows; {int(is_wrong.sum())} of {len(values)} are wrong). "
            "Use labelled rows only, and number named classes (`load_images` does)."
        )
    return values.astype(np.int64)


def read_list_file(path: str | os.PathLike) -> list[str]:
    """Read a list of labelled images: one name per line, such as `n01440764_10026.JPEG` or `cat/000 (1).jpg`."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The list file '{path}' must be text, one image name per line, but is not: {error}."
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    wrong = [name for name in names if not re.search(r"[^_\s]_\S|[/\\]|\.\w+$", name)]
    if wrong or not names:
        raise ValueError(
            f"The list file '{path}' must have one image per line, such as n01440764_10026.JPEG or cat/000.jpg, but "
            f"{len(wrong)} of {len(names)} lines are not: {first_few(wrong)}."
        )
    return names


def match_list_file(path: str | os.PathLike, file_names: Sequence[str | None]) -> np.ndarray:
    """Return the rows of a dataset that a list file names, in its order, and log how many images per class it holds.

    Extensions do not matter, unless files differ in nothing else. A name in the list is the end of a file's path
    (`cat/000.jpg`), its name alone where that is unique in the dataset, the name before the `_<class>` that the Hub's
    ImageNet rows end in (`n01440764_10026_n01440764.JPEG`), or `<class>_<name>` of a file in a class folder. Folders
    in the list may be others than the dataset's if the name begins with its class, as those of the published lists do.
    Uneven counts, and counts that differ from the number in the file's name, are logged as a warning (one published
    list named for 3 images per class holds 5).

    Raises:
        FileNotFoundError: If the list does not exist.
        ValueError: If names have no row or several (counted, the first five shown).
    """
    lines = [_as_path(line) for line in read_list_file(path)]
    files = {row: _as_path(name) for row, name in enumerate(file_names) if name is not None}
    folders = {file.parent.name for file in files.values()}
    exact, shortened, in_folder = defaultdict(list), defaultdict(list), defaultdict(list)
    for row, file in files.items():
        exact[file.stem].append(row)
        if file.parent.name:
            in_folder[f"{file.parent.name}_{file.stem}"].append(row)
        suffix = f"_{file.stem.split('_', 1)[0]}"
        if file.stem.endswith(suffix):
            shortened[file.stem.removesuffix(suffix)].append(row)

    def may_be(line: PurePosixPath, file: PurePosixPath) -> bool:
        # a file in another folder is another one, unless folders mean nothing and its name begins with the class
        if not line.parent.name or not file.parent.name:
            return True
        is_class = line.stem.startswith((f"{line.parent.name}_", f"{file.parent.name}_"))
        return line.parent.name not in folders and is_class

    def find(line: PurePosixPath) -> list[int]:
        for table in (exact, shortened, in_folder):
            common = {row: _common_end(line.parent.parts, files[row].parent.parts) for row in table.get(line.stem, ())}
            if found := [row for row in common if common[row] or may_be(line, files[row])]:
                found = [row for row in found if common[row] == max(common.values())]
                # where files differ in their extension alone, that of the list decides
                return [row for row in found if files[row].name == line.name] or found
        return []

    matches = {line: find(line) for line in dict.fromkeys(lines)}
    if missing := [line.with_suffix("") for line, rows in matches.items() if not rows]:
        raise ValueError(
            f"Names of the list file '{path}' must be file names of the dataset, but {len(missing)} of {len(matches)} "
            f"are not: {first_few(missing)}. Check that list and dataset belong together."
        )
    several = [
        f"{line.with_suffix('')} (rows {', '.join(map(str, rows[:3]))})"
        for line, rows in matches.items()
        if len(rows) > 1
    ]
    if several:
        raise ValueError(
            f"File names must be unique in the dataset, but {len(several)} names of the list file '{path}' have "
            f"several rows: {first_few(several)}. Give their folders too: <class>/<name>."
        )
    listed: dict[int, list[PurePosixPath]] = {}
    for line in lines:
        listed.setdefault(matches[line][0], []).append(line)
    classes = [_class_of(same[0], files[row]) for row, same in listed.items()]
    _log_counts(path, classes, [same[0].with_suffix("") for same in listed.values() if len(same) > 1])
    return np.array(list(listed), dtype=np.int64)


def _log_counts(path: str | os.PathLike, classes: list[str], repeated: list[PurePosixPath]) -> None:
    counts = Counter(classes).values()
    smallest, largest = min(counts), max(counts)
    file_name = Path(path).name.lower()
    expected = re.search(r"(\d+)[ _-]*im(?:g|age)", file_name)
    differs = expected is not None and not smallest == largest == int(expected[1])
    uneven = smallest != largest and not re.search(r"percent|%", file_name)
    sizes = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    text = f"'{path}' lists {len(classes)} images of {len(counts)} classes, {sizes} per class"
    text += f", although its name says {expected[1]}" if differs else ""
    text += f"; {len(repeated)} names occur more than once ({first_few(repeated)}) and count once" if repeated else ""
    logger.log(levels.WARNING if uneven or differs or repeated else levels.INFO, "%s.", text)


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


def _as_path(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))


def _common_end(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    pairs = zip(reversed(first), reversed(second))
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _class_of(line: PurePosixPath, file: PurePosixPath) -> str:
    """Return the class of a listed image: its folder in the list, else the beginning of its name, else its folder."""
    folder = line.parent.name or ("" if "_" in line.stem else file.parent.name)
    return folder or line.stem.split("_", 1)[0]
