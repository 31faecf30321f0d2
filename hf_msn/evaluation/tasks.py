"""What a low-shot evaluation measures: the tasks, and the rows that are the labelled images of each split."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.splits import low_shot_indices, match_list_file


@dataclass(frozen=True)
class Split:
    """Rows of one split, ascending: from a seed, from a list file, or given (then it has neither)."""

    rows: np.ndarray
    seed: int | None = None
    list_file: str | None = None


class LowShotTasks:
    """The tasks of a [`LowShotEvaluator`], which documents the arguments.

    Raises:
        `ValueError`: if there is no task, two have one name, or a setting is out of range.
    """

    def __init__(
        self,
        images_per_class: Sequence[int],
        fractions: Sequence[float],
        list_files: Sequence[str | os.PathLike] | Mapping[str, Sequence[str | os.PathLike]],
        rows: Mapping[str, Sequence[int]] | None,
        num_splits: int,
        seed: int,
    ):
        if num_splits < 1:
            raise ValueError(f"`num_splits` counts draws and must be >= 1, but is {num_splits}. The paper uses 3.")
        self.num_splits, self.seed = num_splits, seed
        self.drawn = {f"{count}_per_class": {"images_per_class": count} for count in images_per_class}
        self.drawn |= {f"{100 * share:.6g}_percent": {"fraction": share} for share in fractions}
        self.list_files = _by_task(list_files)
        self.rows = _checked_rows(rows)
        if not (self.drawn or self.list_files or self.rows):
            raise ValueError(
                "Low-shot evaluation needs a task, but `images_per_class`, `fractions`, `list_files` and `rows` are "
                "empty. The paper uses images_per_class=(1, 2, 5) and fractions=(0.01,)."
            )
        names = [*self.drawn, *self.list_files, *self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"Each task needs a name of its own, but {twice} are there twice. Give `list_files` as a mapping and "
                "`rows` other names."
            )

    @property
    def primary(self) -> str:
        """The most images a class; without such a task the largest fraction, the last list, the last of `rows`."""
        for kind in ("images_per_class", "fraction"):
            sizes = {size[kind]: task for task, size in self.drawn.items() if kind in size}
            if sizes:
                return sizes[max(sizes)]
        return [*(self.list_files or self.rows)][-1]

    @property
    def all_rows(self) -> np.ndarray | None:
        """Every row that some task may take, ascending; `None` if tasks are drawn from all of them."""
        if self.drawn or self.list_files:
            return None
        return np.unique(np.concatenate(list(self.rows.values())))

    def check_rows_fit(self, num_rows: int | None) -> None:
        """Raises a `ValueError` if lists or rows are given for a stream (`None`), or a row is beyond the data."""
        if num_rows is None and (self.list_files or self.rows):
            raise ValueError(
                "`list_files` and `rows` name rows, which a stream does not have. Load the train data with "
                "streaming=False."
            )
        for task, rows in self.rows.items():
            if rows[-1] >= num_rows:
                raise ValueError(
                    f"`rows` of {task!r} must be below {num_rows}, the number of rows of the train data, but one is "
                    f"{rows[-1]}. Count the rows of the very data set that is given as `train_dataset`."
                )

    def draw(
        self,
        labels: np.ndarray,
        rows: np.ndarray,
        class_names: list[str] | None,
        file_names: Callable[[], Sequence[str | None]],
    ) -> dict[str, list[Split]]:
        """The splits of each task.

        Args:
            labels (`np.ndarray` of shape `(N,)`): Of the rows that may be drawn.
            rows (`np.ndarray` of shape `(N,)`): Their numbers in the data set.
            class_names (`list[str]`, *optional*): By class number.
            file_names (`Callable`): Gives the file name of each row of the data set; called only for list files.
        """
        # a class of the names that no image has is left out: a part of a data set keeps the names of the whole
        names = class_names if class_names and len(np.unique(labels)) == len(class_names) else None
        seeds = [self.seed + index for index in range(self.num_splits)]
        splits = {
            task: [
                Split(rows[low_shot_indices(labels, **size, seed=seed, class_names=names)], seed=seed)
                for seed in seeds
            ]
            for task, size in self.drawn.items()
        }
        if self.list_files:
            of_data = file_names()
            for task, paths in self.list_files.items():
                splits[task] = [Split(np.sort(match_list_file(path, of_data)), list_file=path) for path in paths]
        return splits | {task: [Split(given)] for task, given in self.rows.items()}


def _by_task(
    list_files: Sequence[str | os.PathLike] | Mapping[str, Sequence[str | os.PathLike]],
) -> dict[str, list[str]]:
    if isinstance(list_files, (str, os.PathLike)):
        list_files = [list_files]
    if isinstance(list_files, Mapping):
        return {task: [str(path) for path in paths] for task, paths in list_files.items()}
    tasks: dict[str, list[str]] = {}
    for path in list_files:
        tasks.setdefault(Path(path).stem, []).append(str(path))
    return tasks


def _checked_rows(rows: Mapping[str, Sequence[int]] | None) -> dict[str, np.ndarray]:
    if rows is not None and not isinstance(rows, Mapping):
        raise ValueError(
            f"`rows` must map names of tasks to row numbers, but is {type(rows).__name__}. Give a name: "
            "rows={'support': [...]}."
        )
    checked = {}
    for task, given in (rows or {}).items():
        given = np.asarray(given)
        # numpy makes floats of an empty list, and a mask would pass for rows 0 and 1
        if given.ndim != 1 or len(given) == 0 or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"`rows` of {task!r} must be a list of at least one row number, but has shape {given.shape} and type "
                f"{given.dtype}. Of a mask take `np.flatnonzero(mask)`."
            )
        numbers, counts = np.unique(given.astype(np.int64), return_counts=True)
        if numbers[0] < 0 or counts.max() > 1:
            wrong = f"holds {numbers[0]}" if numbers[0] < 0 else f"holds {numbers[counts.argmax()]} more than once"
            raise ValueError(f"`rows` of {task!r} must be different numbers from 0 on, but {wrong}.")
        checked[task] = numbers
    return checked
