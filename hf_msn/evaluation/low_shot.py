"""Low-shot evaluation: the accuracy of frozen features with a few labelled images per class."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..checks import check_choice, check_integer
from ..data.decoding import BrokenImageError
from ..data.labels import check_every_class_is_learnt, check_rows, class_names, class_numbers, numbered_as
from ..data.map_style import AnyDataset, image_dataset
from ..data.sources import image_file_names
from ..data.splits import low_shot_indices, match_list_file
from ..distributed.collectives import rank, world_size
from ..files import public_name
from .backbones import FeatureSpace, describe_image_processor, find_backbone, resolve_image_processor
from .baselines import raw_pixel_features, untrained_like
from .features import Features, extract_features
from .gathering import run_on_every_rank
from .metrics import TopKAccuracy, rank_classes
from .probes import KNNProbe, LogisticProbe, Probe
from .results import BASELINE_NAMES, LowShotResults, SplitResult, TaskResult, package_versions

BASELINES = tuple(BASELINE_NAMES)
_PACKAGES = ("hf_msn", "torch", "transformers", "datasets", "scikit-learn", "numpy", "pillow")

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Split:
    """Rows of one split, ascending: drawn with a seed, read from a list file, or given."""

    rows: np.ndarray
    seed: int | None = None
    list_file: str | None = None


class LowShotEvaluator:
    r"""Fit a probe on a few labelled images per class and measure it on all test images, over several splits.

    A task is a number of images per class, a share of the images, a list file or given rows; each of its splits is one
    draw, list or set of rows. Features are extracted once; for each split only the probe is fitted. Everything is
    seeded: two calls return identical numbers.

    Args:
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Labelled images that splits are drawn from,
            from `load_images`. Other map-style datasets are read as by [`MultiViewDataset`].
        test_dataset (`datasets.Dataset` or `datasets.IterableDataset`): Labelled images that accuracy is measured on.
        image_processor (*optional*): As for `extract_features`; normalise as in training.
        images_per_class (`Sequence[int]`, *optional*, defaults to `(1, 2, 5)`): One task each, named "5_per_class".
        fractions (`Sequence[float]`, *optional*, defaults to `()`): Shares of each class, one task each: 0.01 is named
            "1_percent".
        list_files (`Sequence[path]` or `Mapping[str, Sequence[path]]`, *optional*, defaults to `()`): Files that name
            the labelled images, one per line. Files of one name in different folders are splits of one task, named as
            the files are without suffix; a mapping names the tasks itself.
        rows (`Mapping[str, Sequence[int]]`, *optional*): The labelled images themselves: row numbers of
            `train_dataset` by name of the task, one split each. If this is the only kind of task
            (`images_per_class=()`), no other row of `train_dataset` is read, neither image nor label.
        num_splits (`int`, *optional*, defaults to 3): Seeded splits of each task that is drawn.
        probe ([`Probe`], *optional*, defaults to `LogisticProbe()`): The classifier.
        baselines (`Sequence[str]`, *optional*, defaults to `()`): Measured on the same splits beside the model: "knn",
            the nearest labelled images vote; "untrained", the same network with random weights; "pixels", the images
            at 64 x 64 or less.
        seed (`int`, *optional*, defaults to 0): Split i is drawn with `seed + i`, the untrained network with `seed`.
        batch_size, num_workers, features, num_last_layers, cache_dir, on_broken_image, device, dtype:
            As for `extract_features`.
        name (`str`, *optional*, defaults to `"low_shot"`): Prefix of the metrics.

    Calling it with a model returns flat metrics in percent: `low_shot/5_per_class/top1`, the mean over splits, and
    `.../top1_std`, `.../top1_ci95` (see [`TaskResult`]), `.../num_splits`; with at least 6 classes also of `top5`;
    of each baseline the mean, `.../untrained_top1`.
    `results` holds the last call's [`LowShotResults`]. With `torch.distributed` initialised every rank must call it,
    and all get the same metrics.

    Raises:
        ValueError: When created, if labels are missing, a class has too few images, the classes of train and test do
            not agree, there are no test images, there is no task or `rows` do not fit the train data; when called, as
            `extract_features` and the probe.

    Example:

    ```python
    >>> evaluator = LowShotEvaluator(load_images("digits"), load_images("digits", split="test"))
    >>> evaluator(load_vision_model("runs/demo/model"))[evaluator.primary_metric]
    ```
    """

    def __init__(
        self,
        train_dataset: datasets.Dataset | datasets.IterableDataset,
        test_dataset: datasets.Dataset | datasets.IterableDataset,
        *,
        image_processor: Any = None,
        images_per_class: Sequence[int] = (1, 2, 5),
        fractions: Sequence[float] = (),
        list_files: Sequence[str | os.PathLike] | Mapping[str, Sequence[str | os.PathLike]] = (),
        rows: Mapping[str, Sequence[int]] | None = None,
        num_splits: int = 3,
        probe: Probe | None = None,
        baselines: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int | None = None,
        features: FeatureSpace = "backbone",
        num_last_layers: int = 1,
        cache_dir: str | os.PathLike | None = None,
        on_broken_image: Literal["skip", "raise"] = "skip",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        name: str = "low_shot",
    ):
        check_choice("features", features, get_args(FeatureSpace))
        self.num_splits, self.seed = check_integer("num_splits", num_splits, meaning="counts draws"), seed
        train_dataset, test_dataset = image_dataset(train_dataset), image_dataset(test_dataset)
        test_dataset = numbered_as(train_dataset, test_dataset)
        self.train_dataset, self.test_dataset = train_dataset, test_dataset
        self.image_processor, self.name = image_processor, name
        self.probe = LogisticProbe() if probe is None else probe
        self.baselines = tuple(check_choice("baselines", baseline, BASELINES) for baseline in baselines)
        self.results: LowShotResults | None = None
        self._known_baselines: dict[str, list[TaskResult] | None] = {}  # of earlier calls, by what they depend on
        self._extraction = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "features": features,
            "num_last_layers": num_last_layers,
            "cache_dir": cache_dir,
            "on_broken_image": on_broken_image,
            "device": device,
            "dtype": dtype,
        }
        self._drawn = {f"{count}_per_class": {"images_per_class": count} for count in images_per_class}
        self._drawn |= {f"{100 * share:.6g}_percent": {"fraction": share} for share in fractions}
        self._list_files = _lists_by_task(list_files)
        self._rows = self._check_given_rows(rows or {})
        self._check_tasks()
        fingerprints = [getattr(dataset, "_fingerprint", None) for dataset in (train_dataset, test_dataset)]
        if fingerprints[0] is not None and fingerprints[0] == fingerprints[1]:
            logger.warning("Train and test data are the same: the probe is tested on images that it learnt from.")
        self._class_names = class_names(train_dataset)
        self._splits: dict[str, list[Split]] | None = None
        # if the labelled images are given, no other label is read
        only_given = not (self._drawn or self._list_files)
        candidates = np.unique(np.concatenate(list(self._rows.values()))) if only_given else None
        train_labels = _read_labels(train_dataset, "train data", candidates)
        test_labels = _read_labels(test_dataset, "test data")
        if train_labels is None:
            return
        candidates = np.arange(len(train_labels)) if candidates is None else candidates
        self._splits = self._draw_splits(train_labels, candidates)
        if test_labels is not None:
            for task, given in self._rows.items():
                labels = train_labels[np.isin(candidates, given)]
                check_every_class_is_learnt(labels, test_labels, f"rows of {task!r}", self._class_names)
            check_every_class_is_learnt(train_labels, test_labels, "train data", self._class_names)

    @property
    def primary_metric(self) -> str:
        """Top-1 of the most images per class; else of the largest fraction, the last list or the last of `rows`."""
        for kind in ("images_per_class", "fraction"):
            tasks = {size[kind]: task for task, size in self._drawn.items() if kind in size}
            if tasks:
                return f"{self.name}/{tasks[max(tasks)]}/top1"
        return f"{self.name}/{[*(self._list_files or self._rows)][-1]}/top1"

    def extract(self, model: nn.Module) -> tuple[Features, Features]:
        """Return a model's features of the labelled rows that the splits need, and of all test images."""
        image_processor = resolve_image_processor(model) if self.image_processor is None else self.image_processor
        return self._extract(partial(extract_features, model, image_processor=image_processor, **self._extraction))

    def __call__(self, model: nn.Module, features: tuple[Features, Features] | None = None) -> dict[str, float]:
        """Evaluate a model, one that `extract_features` takes. See the class for the metrics.

        Args:
            model (`nn.Module`): The model.
            features (`tuple[Features, Features]`, *optional*): Those of `extract(model)`, if they are needed elsewhere
                too, as for [`save_report`]. By default they are extracted here.
        """
        train, test = self.extract(model) if features is None else features
        image_processor = resolve_image_processor(model) if self.image_processor is None else self.image_processor
        about = {
            "class": type(model).__name__,
            "backbone": type(find_backbone(model)).__name__,
            "name_or_path": public_name(getattr(model, "name_or_path", "")) or None,
        }
        settings = {
            "image_processor": describe_image_processor(image_processor),
            "features": self._extraction["features"],
            "num_last_layers": self._extraction["num_last_layers"],
            "dtype": str(self._extraction["dtype"] or "that of the weights"),
        }
        metrics = self.evaluate_features(train, test, model=about, settings=settings)
        self.results.baselines = self._measure_baselines(model, image_processor, train, test)
        return {**metrics, **self.results.metrics}

    def _extract(self, extract: Callable[..., Features]) -> tuple[Features, Features]:
        rows = None
        if self._splits is not None:
            rows = np.unique(np.concatenate([split.rows for splits in self._splits.values() for split in splits]))
        return extract(dataset=self.train_dataset, rows=rows), extract(dataset=self.test_dataset)

    def _measure_baselines(
        self, model: nn.Module, image_processor: Any, train: Features, test: Features
    ) -> dict[str, list[TaskResult]]:
        found = {}
        if "knn" in self.baselines and not isinstance(self.probe, KNNProbe):
            found["knn"] = self._measure(train, test, KNNProbe())
        about = describe_image_processor(image_processor)
        for name in ("untrained", "pixels"):
            if name not in self.baselines:
                continue
            key = f"{name} {about}" + (f" {getattr(model, 'config', '')} {model}" if name == "untrained" else "")
            if key not in self._known_baselines:
                extract = self._extraction_of(name, model, image_processor)
                self._known_baselines[key] = None if extract is None else self._measure(*self._extract(extract))
            if self._known_baselines[key] is not None:
                found[name] = self._known_baselines[key]
        return found

    def _extraction_of(self, baseline: str, model: nn.Module, image_processor: Any) -> Callable[..., Features] | None:
        settings = {**self._extraction, "image_processor": image_processor}
        if baseline == "pixels":
            names = ("image_processor", "batch_size", "num_workers", "on_broken_image")
            return partial(raw_pixel_features, **{name: settings[name] for name in names})
        fresh = untrained_like(model, settings["features"], self.seed)
        device = next((parameter.device for parameter in model.parameters()), None)
        settings["device"] = settings["device"] or device
        return None if fresh is None else partial(extract_features, fresh, **settings)

    def evaluate_features(
        self,
        train: Features,
        test: Features,
        *,
        model: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """Evaluate features from another source: `pixel_features`, or a model that `extract_features` cannot read.

        `train` holds at least the rows that the splits need. `model` and `settings` are entries of the results.
        """
        for features, which in ((train, "train"), (test, "test")):
            if features.labels is None:
                raise ValueError(f"The {which} features must have labels, but have none. Use labelled data.")
        self.results = LowShotResults(
            name=self.name,
            primary_metric=self.primary_metric,
            tasks=self._measure(train, test),
            model={**(model or {}), "weights_sha256": train.weights_sha256},
            probe=dict(self.probe.settings),
            data={
                "train": _describe_data(train, self.train_dataset),
                "test": _describe_data(test, self.test_dataset),
                "class_names": self._class_names,
            },
            settings={**(settings or {}), "seed": self.seed, "num_splits": self.num_splits},
            versions=package_versions(_PACKAGES),
        )
        return self.results.metrics

    def splits(self, train: Features) -> dict[str, list[Split]]:
        """Return the splits of each task. Those of a stream are drawn from the labels that came with its features."""
        return self._splits if self._splits is not None else self._draw_splits(train.labels, train.rows)

    def _measure(self, train: Features, test: Features, probe: Probe | None = None) -> list[TaskResult]:
        """Fit the probe on each split, shared among the ranks, and measure it on the test images."""
        splits = self.splits(train)
        jobs = [(task, split) for task, of_task in splits.items() for split in of_task]

        def fit_own_share() -> list[tuple[int, SplitResult, int]]:
            own = range(rank(), len(jobs), world_size())
            return [(job, *self._fit(*jobs[job], train, test, probe or self.probe)) for job in own]

        _, shares = run_on_every_rank(fit_own_share, lambda share: share)
        done = {job: (result, num_classes) for share in shares for job, result, num_classes in share}
        tasks = []
        for task in splits:
            of_task = [done[job] for job in range(len(jobs)) if jobs[job][0] == task]
            tasks.append(TaskResult(task, of_task[0][1], [result for result, _ in of_task]))
        return tasks

    def _check_given_rows(self, rows: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        if not isinstance(rows, Mapping):
            raise ValueError(
                f"`rows` must map names of tasks to row numbers, but is a {type(rows).__name__}. Give a name: "
                "rows={'support': [...]}."
            )
        if (rows or self._list_files) and not isinstance(self.train_dataset, datasets.Dataset):
            raise ValueError(
                "`list_files` and `rows` select rows by number, which a stream does not have. Load the train data "
                "with streaming=False."
            )
        return {task: check_rows(f"rows[{task!r}]", given, len(self.train_dataset)) for task, given in rows.items()}

    def _check_tasks(self) -> None:
        names = [*self._drawn, *self._list_files, *self._rows]
        if not names:
            raise ValueError(
                "Low-shot evaluation needs a task, but `images_per_class`, `fractions`, `list_files` and `rows` are "
                "empty. The paper uses images_per_class=(1, 2, 5) and fractions=(0.01,)."
            )
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Names of tasks must differ, but {repeated} occur twice. Rename them in `rows`.")

    def _draw_splits(self, labels: np.ndarray, rows: np.ndarray) -> dict[str, list[Split]]:
        """Return the splits of each task, from the labels (N,) of the rows (N,) that may be drawn."""
        # names without any image are ignored: a part of a dataset keeps the names of the whole
        names = self._class_names
        names = names if names and len(np.unique(labels)) == len(names) else None
        splits = {
            task: [
                Split(rows[low_shot_indices(labels, **size, seed=seed, class_names=names)], seed=seed)
                for seed in range(self.seed, self.seed + self.num_splits)
            ]
            for task, size in self._drawn.items()
        }
        file_names = image_file_names(self.train_dataset) if self._list_files else []
        for task, paths in self._list_files.items():
            splits[task] = [Split(np.sort(match_list_file(path, file_names)), list_file=path) for path in paths]
        return splits | {task: [Split(given)] for task, given in self._rows.items()}

    def _fit(self, task: str, split: Split, train: Features, test: Features, probe: Probe) -> tuple[SplitResult, int]:
        found = np.isin(train.rows, split.rows)
        missing = len(split.rows) - int(found.sum())
        broken = {error.row for error in train.skipped}
        if missing > len(broken.intersection(split.rows.tolist())):
            raise ValueError(
                f"The train features must hold every row of the splits, but {missing} of {len(split.rows)} rows of a "
                f"split of {task!r} are missing. Extract them from the whole of `train_dataset`."
            )
        labels = train.labels[found]
        where = f"readable images of a split of {task!r}"
        check_every_class_is_learnt(labels, test.labels, where, self._class_names)
        probe = probe.fit(train.features[found], labels)
        scores = probe.predict_scores(test.features)
        columns = np.searchsorted(probe.classes_, test.labels)
        num_classes = len(probe.classes_)
        ks = (1, 5) if num_classes > 5 else (1,)
        ranked, accuracy = rank_classes(scores, max(ks)), TopKAccuracy(keep_in_memory=True)
        values = {
            k: 100 * accuracy.compute(predictions=ranked, references=columns, k=k)[f"top{k}_accuracy"] for k in ks
        }
        counts = np.unique(labels, return_counts=True)[1]
        result = SplitResult(
            seed=split.seed,
            list_file=split.list_file,
            num_images=len(labels),
            fewest_per_class=int(counts.min()),
            most_per_class=int(counts.max()),
            num_skipped=missing,
            fit=dict(probe.fit_report),
            top1=values[1],
            top5=values.get(5),
        )
        return result, num_classes


def _lists_by_task(
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


def _read_labels(dataset: AnyDataset, which: str, rows: np.ndarray | None = None) -> np.ndarray | None:
    """Return the labels of a dataset; `None` for a stream, whose labels come with its features."""
    if isinstance(dataset, datasets.IterableDataset):
        columns = dataset.column_names
        if columns is not None and "label" not in columns:
            raise ValueError(f"The {which} must have a column 'label', but has {columns}. Use a labelled stream.")
        return None
    return class_numbers(dataset, rows, which)


def _describe_data(features: Features, dataset: AnyDataset) -> dict[str, Any]:
    split = getattr(dataset, "split", None)
    labels_and_rows = np.stack([features.rows, features.labels]).astype(np.int64)
    return {
        "name": getattr(getattr(dataset, "info", None), "dataset_name", None),
        "split": None if split is None else str(split),
        "fingerprint": features.data_fingerprint,
        "rows_and_labels_sha256": hashlib.sha256(labels_and_rows.tobytes()).hexdigest(),
        "num_images": len(features),
        "num_skipped": len(features.skipped),
        "skipped": [
            str(BrokenImageError(error.reason, row=error.row, path=error.path and Path(error.path).name))
            for error in features.skipped[:20]
        ],
    }
