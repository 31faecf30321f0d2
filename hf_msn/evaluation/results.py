"""The results of a low-shot evaluation: per split, in summary, as a table and as JSON."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..files import public_name, write_text

# the format of the JSON file; the number changes with the meaning of a field
RESULTS_FORMAT = "hf_msn low-shot results 1"

BASELINE_NAMES = {"knn": "nearest neighbours", "untrained": "untrained network", "pixels": "raw pixels"}


@dataclass(frozen=True)
class SplitResult:
    """One probe on one split."""

    seed: int | None  # of a split that was drawn
    list_file: str | None  # of a split that was read
    num_images: int  # labelled images that the probe was fitted on, without skipped ones
    fewest_per_class: int
    most_per_class: int
    num_skipped: int  # images of the split that could not be read
    fit: dict[str, Any]  # `fit_report` of the probe
    top1: float  # accuracy on the test images, in percent
    top5: float | None


@dataclass(frozen=True)
class TaskResult:
    """All splits of one task, such as "5_per_class"."""

    name: str
    num_classes: int
    splits: list[SplitResult]

    @property
    def title(self) -> str:
        """Return "5 images per class" for `5_per_class`."""
        if found := re.fullmatch(r"(\d+)_per_class", self.name):
            return f"{found[1]} image{'' if found[1] == '1' else 's'} per class"
        found = re.fullmatch(r"([\d.]+)_percent", self.name)
        return f"{found[1]} % of the labels" if found else public_name(self.name)

    @property
    def images_per_class(self) -> float:
        """Labelled images per class: the number in the name, else the average over the splits."""
        if found := re.fullmatch(r"(\d+)_per_class", self.name):
            return float(found[1])
        return sum(split.num_images for split in self.splits) / (len(self.splits) * self.num_classes)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean top-1 in percent. Student's may exceed an accuracy's bounds and is clipped."""
        mean, half = self.summary["top1"], self.summary["top1_ci95"]
        return max(0.0, mean - half), min(100.0, mean + half)

    @property
    def summary(self) -> dict[str, float]:
        """Mean, standard deviation (`ddof=1`) and half-width of the 95 % interval over splits, in percent."""
        summary: dict[str, float] = {"num_splits": float(len(self.splits))}
        for name in ("top1", "top5"):
            accuracies = [getattr(split, name) for split in self.splits]
            if None in accuracies:
                continue
            mean, std, half_width = mean_std_ci95(accuracies)
            summary |= {name: mean, f"{name}_std": std, f"{name}_ci95": half_width}
        return summary


@dataclass
class LowShotResults:
    """The numbers of a low-shot evaluation and all that they depend on."""

    name: str  # prefix of the metrics
    primary_metric: str  # to compare models by
    tasks: list[TaskResult]
    model: dict[str, Any] = field(default_factory=dict)  # class, origin and weights hash
    probe: dict[str, Any] = field(default_factory=dict)  # its settings
    data: dict[str, Any] = field(default_factory=dict)  # names, fingerprints and counts of train and test images
    settings: dict[str, Any] = field(default_factory=dict)  # image processor, features, layers, seed
    versions: dict[str, str | None] = field(default_factory=dict)  # of the packages that the numbers depend on
    baselines: dict[str, list[TaskResult]] = field(default_factory=dict)  # on the same splits: knn, untrained, pixels

    @property
    def metrics(self) -> dict[str, float]:
        """Flat, in percent: `low_shot/5_per_class/top1`, `.../top1_std`, `.../untrained_top1`, ..."""
        metrics = {
            f"{self.name}/{task.name}/{key}": value for task in self.tasks for key, value in task.summary.items()
        }
        for baseline, tasks in self.baselines.items():
            metrics |= {f"{self.name}/{task.name}/{baseline}_top1": task.summary["top1"] for task in tasks}
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types, with the `summary` of each task. Paths are reduced to names."""
        result = {"format": RESULTS_FORMAT, "metrics": self.metrics, **asdict(self)}
        every = [*zip(self.tasks, result["tasks"])]
        for name, tasks in self.baselines.items():
            every += zip(tasks, result["baselines"][name])
        for task, plain in every:
            plain["summary"] = task.summary
            for split in plain["splits"]:
                split["list_file"] = split["list_file"] and Path(split["list_file"]).name
        return result

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_dict()` as JSON. An existing file is replaced as a whole.

        Raises:
            ValueError: If a number is not finite.
        """
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def table(self) -> str:
        """Return one aligned line per task: top-1 ± standard deviation, its 95 % interval, top-5, number of splits.

        Below the line of a task are those of its baselines. The interval is clipped to [0, 100]; the metrics keep its
        half-width.
        """
        rows = [("task", "top-1 [%]", "95 % interval", "top-5 [%]", "splits")]
        for number, task in enumerate(self.tasks):
            rows.append((task.name.replace("_", " ") + images_that_were_read(task.splits), *cells(task)))
            rows += [(f"  {BASELINE_NAMES[name]}", *cells(tasks[number])) for name, tasks in self.baselines.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def cells(task: TaskResult) -> tuple[str, str, str, str]:
    """Return top-1 ± standard deviation, its interval, top-5 and the number of splits as texts."""
    summary, several = task.summary, len(task.splits) > 1
    return (
        f"{summary['top1']:.1f}" + (f" ± {summary['top1_std']:.1f}" if several else ""),
        "{:.1f} to {:.1f}".format(*task.interval) if several else "-",
        f"{summary['top5']:.1f}" if "top5" in summary else "-",
        str(len(task.splits)),
    )


def images_that_were_read(splits: list[SplitResult]) -> str:
    """Return " (4 to 5 read per class)" if some labelled images could not be read."""
    if not any(split.num_skipped for split in splits):
        return ""
    fewest, most = min(split.fewest_per_class for split in splits), max(split.most_per_class for split in splits)
    return f" ({fewest} to {most} read per class)"


def mean_std_ci95(values: list[float]) -> tuple[float, float, float]:
    """Return mean, standard deviation (`ddof=1`) and half-width of the 95 % interval of the mean by Student's t.

    With one value the latter two are undefined and returned as 0.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, 0.0, 0.0
    std = float(np.std(values, ddof=1))
    return mean, std, float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package; `None` if it is not installed."""
    return {package: _version(package) for package in packages}


@cache  # a look-up parses the metadata of the package
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
