"""Low-shot evaluation: how well do frozen features classify with a few labelled images a class?"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import nn

from ..data.sources import image_file_names
from ..distributed.collectives import rank, world_size
from .backbones import check_features_setting, describe_image_processor, find_backbone, resolve_image_processor
from .features import Features, extract_features
from .gathering import run_on_every_rank
from .labels import check_every_class_is_learnt, common_class_names, read_labels
from .metrics import TopKAccuracy, rank_classes
from .probes import LogisticProbe, Probe
from .results import LowShotResults, SplitResult, TaskResult
from .tasks import LowShotTasks, Split

_PACKAGES = ("hf_msn", "torch", "transformers", "datasets", "scikit-learn", "numpy", "pillow")

logger = logging.getLogger(__name__)


class LowShotEvaluator:
    r"""Fits a probe on a few labelled images of each class and measures it on all test images, over several splits.

    A task is a number of images a class, a share of the images, a list file or given rows; each of its splits is one
    draw, list or set of rows. Features are extracted once, of the images that some split needs and of the test images;
    splits only fit the probe again. Everything is seeded: two calls give identical numbers.

    Args:
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Labelled images that splits are drawn from, as `load_images` gives them. Of a stream all are extracted.
        test_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Labelled images that accuracy is measured on.
        image_processor (*optional*):
            As for `extract_features`; normalise as in training. By default what is saved with the model.
        images_per_class (`Sequence[int]`, *optional*, defaults to `(1, 2, 5)`):
            One task each, named "5_per_class".
        fractions (`Sequence[float]`, *optional*, defaults to `()`):
            Shares of each class, one task each: 0.01 is named "1_percent".
        list_files (`Sequence[path]` or `Mapping[str, Sequence[path]]`, *optional*, defaults to `()`):
            Files that name the labelled images, one a line. Files of one name in different folders are splits of one
            task, named as the files are without suffix; a mapping names the tasks itself.
        rows (`Mapping[str, Sequence[int]]`, *optional*):
            The labelled images themselves: row numbers of `train_dataset` by name of the task, one split each. With
            the rows that PAWS was trained with it is measured with just these labels. Where this is the only kind of
            task (`images_per_class=()`), no other row of `train_dataset` is read, neither image nor label.
        num_splits (`int`, *optional*, defaults to 3):
            Seeded splits of each task that is drawn.
        probe ([`Probe`], *optional*, defaults to `LogisticProbe()`):
            What is fitted.
        seed (`int`, *optional*, defaults to 0):
            Split i is drawn with `seed + i`.
        batch_size, num_workers, features, num_last_layers, cache_dir, on_broken_image, device, dtype:
            As for `extract_features`.
        name (`str`, *optional*, defaults to `"low_shot"`):
            Prefix of the metrics.

    Calling it with a model returns flat metrics in per cent: `low_shot/5_per_class/top1` (mean over splits),
    `.../top1_std` (`ddof=1`; 0 for one split), `.../top1_ci95` (half-width by Student's t; 0 for one split),
    `.../num_splits`, and `.../top5`, `.../top5_std`, `.../top5_ci95` where there are at least 6 classes.
    `primary_metric` names the top-1 of the largest number of images a class. `results` holds the last call's
    [`LowShotResults`]: every split, what the numbers depend on, `table()` and `save(path)`.

    With `torch.distributed` initialised every rank must call it; ranks share the extraction and the fits, and all get
    the same metrics.

    Raises:
        `ValueError`: when made, if labels are missing, a class has too few images, the classes of train and test do
            not agree, there are no test images, there is no task or `rows` do not fit the train data; when called, as
            `extract_features` and the probe.

    Example:

    ```python
    >>> from hf_msn import LowShotEvaluator, load_images, load_vision_model

    >>> evaluator = LowShotEvaluator(load_images("digits"), load_images("digits", split="test"))
    >>> metrics = evaluator(load_vision_model("runs/demo/model"))
    >>> metrics[evaluator.primary_metric]
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
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int | None = None,
        features: Literal["backbone", "projection"] = "backbone",
        num_last_layers: int = 1,
        cache_dir: str | os.PathLike | None = None,
        on_broken_image: Literal["skip", "raise"] = "skip",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        name: str = "low_shot",
    ):
        check_features_setting(features)
        self._tasks = LowShotTasks(images_per_class, fractions, list_files, rows, num_splits, seed)
        self.train_dataset, self.test_dataset = train_dataset, test_dataset
        self.image_processor, self.name = image_processor, name
        self.probe = LogisticProbe() if probe is None else probe
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
        fingerprints = [getattr(dataset, "_fingerprint", None) for dataset in (train_dataset, test_dataset)]
        if fingerprints[0] is not None and fingerprints[0] == fingerprints[1]:
            logger.warning("Train and test data are the same: images that the probe learnt from are tested too.")
        self.results: LowShotResults | None = None
        self._class_names = common_class_names(train_dataset, test_dataset)
        self._splits: dict[str, list[Split]] | None = None
        in_memory = isinstance(train_dataset, datasets.Dataset)
        self._tasks.check_rows_fit(len(train_dataset) if in_memory else None)
        # where the labelled images are given, no other label is read
        candidates = self._tasks.all_rows
        train_labels = read_labels(train_dataset, "train", candidates)
        test_labels = read_labels(test_dataset, "test")
        if train_labels is None:
            return
        candidates = np.arange(len(train_labels)) if candidates is None else candidates
        self._splits = self._draw_splits(train_labels, candidates)
        if test_labels is not None:
            for task, of_task in self._tasks.rows.items():
                self._check_seen(train_labels[np.isin(candidates, of_task)], test_labels, f"rows of {task!r}")
            self._check_seen(train_labels, test_labels, "train data")

    @property
    def primary_metric(self) -> str:
        """Top-1 of the most images a class; without such a task of the largest fraction, the last list or `rows`."""
        return f"{self.name}/{self._tasks.primary}/top1"

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Evaluates a model; see the class for the metrics.

        Args:
            model (`nn.Module`):
                A pretraining model of hf_msn (its `evaluation_encoder` is used), a vision model of transformers or a
                timm model.
        """
        image_processor = resolve_image_processor(model) if self.image_processor is None else self.image_processor
        rows = None
        if self._splits is not None:
            rows = np.unique(np.concatenate([split.rows for splits in self._splits.values() for split in splits]))
        train = extract_features(model, self.train_dataset, image_processor, rows=rows, **self._extraction)
        test = extract_features(model, self.test_dataset, image_processor, **self._extraction)
        origin = getattr(model, "name_or_path", "") or None
        about = {
            "class": type(model).__name__,
            "backbone": type(find_backbone(model)).__name__,
            "name_or_path": origin,
        }
        settings = {
            "image_processor": _readable(describe_image_processor(image_processor)),
            "features": self._extraction["features"],
            "num_last_layers": self._extraction["num_last_layers"],
            "dtype": str(self._extraction["dtype"] or "that of the weights"),
        }
        return self.evaluate_features(train, test, model=about, settings=settings)

    def evaluate_features(
        self,
        train: Features,
        test: Features,
        *,
        model: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """The same splits, probe and metrics on features from elsewhere: `pixel_features`, or a model not known here.

        Args:
            train ([`Features`]): Of `train_dataset`, at least the rows that the splits need.
            test ([`Features`]): Of `test_dataset`.
            model (`dict`, *optional*): What `results.model` says besides the weights hash.
            settings (`dict`, *optional*): What `results.settings` says besides seed and number of splits.
        """
        for features, which in ((train, "train"), (test, "test")):
            if features.labels is None:
                raise ValueError(f"The {which} features have no labels, but accuracy needs one for each image.")
        splits = self._splits if self._splits is not None else self._draw_splits(train.labels, train.rows)
        jobs = [(task, split) for task, of_task in splits.items() for split in of_task]

        def fit_own_share() -> list[tuple[int, SplitResult, int]]:
            own = range(rank(), len(jobs), world_size())
            return [(job, *self._fit(jobs[job][0], jobs[job][1], train, test)) for job in own]

        _, shares = run_on_every_rank(fit_own_share, lambda share: share)
        done = {job: (result, num_classes) for share in shares for job, result, num_classes in share}
        tasks = []
        for task in splits:
            of_task = [done[job] for job in range(len(jobs)) if jobs[job][0] == task]
            tasks.append(TaskResult(task, of_task[0][1], [result for result, _ in of_task]))
        self.results = LowShotResults(
            name=self.name,
            primary_metric=self.primary_metric,
            tasks=tasks,
            model={**(model or {}), "weights_sha256": train.weights_sha256},
            probe=dict(self.probe.settings),
            data={
                "train": _about_data(train, self.train_dataset),
                "test": _about_data(test, self.test_dataset),
                "class_names": self._class_names,
            },
            settings={**(settings or {}), "seed": self._tasks.seed, "num_splits": self._tasks.num_splits},
            versions={package: _version(package) for package in _PACKAGES},
        )
        return self.results.metrics

    def _draw_splits(self, labels: np.ndarray, rows: np.ndarray) -> dict[str, list[Split]]:
        return self._tasks.draw(labels, rows, self._class_names, lambda: image_file_names(self.train_dataset))

    def _check_seen(self, train_labels: np.ndarray, test_labels: np.ndarray, where: str) -> None:
        check_every_class_is_learnt(train_labels, test_labels, where, self._class_names)

    def _fit(self, task: str, split: Split, train: Features, test: Features) -> tuple[SplitResult, int]:
        found = np.isin(train.rows, split.rows)
        missing = len(split.rows) - int(found.sum())
        broken = {error.row for error in train.skipped}
        if missing > len(broken.intersection(split.rows.tolist())):
            raise ValueError(
                f"The train features must hold every row of the splits, but {missing} of {len(split.rows)} rows of a "
                f"split of {task!r} are missing. Extract them from the whole of `train_dataset`."
            )
        labels = train.labels[found]
        self._check_seen(labels, test.labels, f"readable images of a split of {task!r}")
        probe = self.probe.fit(train.features[found], labels)
        scores = probe.predict_scores(test.features)
        columns = np.searchsorted(probe.classes_, test.labels)
        num_classes = len(probe.classes_)
        ks = (1, 5) if num_classes > 5 else (1,)
        ranked, accuracy = rank_classes(scores, max(ks)), TopKAccuracy()
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


def _about_data(features: Features, dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, Any]:
    split = getattr(dataset, "split", None)
    labels_and_rows = np.stack([features.rows, features.labels]).astype(np.int64)
    return {
        "name": getattr(getattr(dataset, "info", None), "dataset_name", None),
        "split": None if split is None else str(split),
        "fingerprint": features.data_fingerprint,
        "rows_and_labels_sha256": hashlib.sha256(labels_and_rows.tobytes()).hexdigest(),
        "num_images": len(features),
        "num_skipped": len(features.skipped),
        "skipped": [str(error) for error in features.skipped[:20]],
    }


def _readable(image_processor: str) -> Any:
    """The settings as JSON holds them best: an object, or a string where they have no such form."""
    try:
        return json.loads(image_processor)
    except json.JSONDecodeError:
        return image_processor


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
