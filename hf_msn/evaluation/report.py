"""A low-shot evaluation as one HTML page that loads nothing else."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from sklearn.neighbors import NearestNeighbors

from ..data.columns import undecoded
from ..data.decoding import decode_image
from ..data.splits import low_shot_indices
from ..files import write_text
from .charts import accuracy_chart, environment, map_chart, project, styles, thumbnail
from .features import Features
from .low_shot import LowShotEvaluator, Split
from .metrics import rank_classes
from .results import BASELINE_NAMES, LowShotResults, TaskResult, cells, images_that_were_read

_MOST_CLASSES_IN_MATRIX = 30
_CONFUSIONS = 30  # that are listed for more classes
_IMAGES = 10  # of each kind whose neighbours are shown
_NEIGHBOURS = 5
_MAPPED = 1000  # images, about


@dataclass(frozen=True)
class _FirstSplit:
    """The probe's answers on all test images, learnt from the first split of the main task."""

    task: TaskResult
    split: Split
    labelled: Features
    classes: np.ndarray  # (C,)
    predicted: np.ndarray  # (num_test,)


def save_report(
    evaluator: LowShotEvaluator, features: tuple[Features, Features], path: str | os.PathLike, title: str | None = None
) -> Path:
    """Write the results of an evaluator's last call as one HTML page, which loads nothing from anywhere.

    The page has the table with baselines and 95 % intervals, accuracy against labels, the confusion matrix, the
    nearest labelled images of some test images, a map of the test features by t-SNE, and all settings. Confusions and
    neighbours are those of one split, the first one of the main task.

    Args:
        evaluator ([`LowShotEvaluator`]): It has been called.
        features (`tuple[Features, Features]`): What the call was given: `evaluator.extract(model)`. The images of a
            stream cannot be shown.
        path (`str` or `os.PathLike`): The file. An existing one is replaced as a whole.
        title (`str`, *optional*): Heading of the page; by default the name of the model.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the evaluator was not called, or the features are not those that it was called with.

    Example:

    ```python
    >>> features = evaluator.extract(model)
    >>> evaluator(model, features)
    >>> save_report(evaluator, features, "report.html")
    ```
    """
    results, (train, test) = evaluator.results, features
    if results is None:
        raise ValueError("`evaluator` has no results. Call it first: evaluator(model, features).")
    first = _fit_first_split(evaluator, train, test)
    names = results.data["class_names"] or []
    numbers = np.union1d(first.classes, test.labels).tolist()
    name_of = {number: str(names[number] if number < len(names) else number) for number in numbers}
    model = results.model.get("name_or_path") or results.model.get("class") or "features"
    page = environment().get_template("report.html").render(
        styles=styles("hf_msn.evaluation", "charts.css"),
        title=title or f"Low-shot evaluation of {model}",
        results=results,
        rows=_table_rows(results),
        chart=_curves(results),
        first=first,
        accuracy=first.task.splits[0].top1,
        confusion=_confusion(first, test, name_of),
        examples=_examples(evaluator, first, test, name_of),
        name_of=name_of,
        map=_map(first, test, name_of, evaluator.seed),
        settings=_settings(results),
    )  # fmt: skip
    write_text(path, page)
    return Path(path)


def _fit_first_split(evaluator: LowShotEvaluator, train: Features, test: Features) -> _FirstSplit:
    results = evaluator.results
    task = next(task for task in results.tasks if results.primary_metric == f"{results.name}/{task.name}/top1")
    split = evaluator.splits(train)[task.name][0]
    found = np.isin(train.rows, split.rows)
    labelled = Features(train.features[found], train.labels[found], train.rows[found])
    probe = evaluator.probe.fit(labelled.features, labelled.labels)
    predicted = probe.classes_[rank_classes(probe.predict_scores(test.features), 1)[:, 0]]
    accuracy = 100 * float((predicted == test.labels).mean())
    if abs(accuracy - task.splits[0].top1) > 1e-6:
        raise ValueError(
            f"`features` must be those that the results were measured on, with {task.splits[0].top1:.2f} % on the "
            f"first split of '{task.name}', but have {accuracy:.2f} %. Pass them to the evaluator too: "
            "evaluator(model, features)."
        )
    return _FirstSplit(task, split, labelled, probe.classes_, predicted)


def _table_rows(results: LowShotResults) -> list[tuple[bool, str, tuple[str, ...]]]:
    rows = []
    for number, task in enumerate(results.tasks):
        rows.append((False, task.title + images_that_were_read(task.splits), cells(task)))
        rows += [(True, BASELINE_NAMES[name], cells(tasks[number])) for name, tasks in results.baselines.items()]
    return rows


def _curves(results: LowShotResults) -> str:
    every = {"the model": results.tasks, **{BASELINE_NAMES[name]: tasks for name, tasks in results.baselines.items()}}
    curves = {
        name: [(task.images_per_class, task.summary["top1"], *task.interval) for task in tasks]
        for name, tasks in every.items()
    }
    said = "; ".join(
        f"{name} " + ", ".join(f"{mean:.1f} at {place:g}" for place, mean, *_ in points)
        for name, points in curves.items()
    )
    return accuracy_chart(
        curves, f"Accuracy in percent over labelled images per class: {said}.", "labelled images per class"
    )


def _confusion(first: _FirstSplit, test: Features, name_of: dict[int, str]) -> dict[str, Any]:
    """Return the counts (true, predicted) as rows of a matrix, or of many classes the most frequent confusions."""
    names = [name_of[number] for number in first.classes.tolist()]
    columns, true = np.searchsorted(first.classes, first.predicted), np.searchsorted(first.classes, test.labels)
    of_class = np.bincount(true, minlength=len(names))
    if len(names) <= _MOST_CLASSES_IN_MATRIX:
        counts = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(counts, (true, columns), 1)
        shares = counts / np.maximum(of_class[:, None], 1)
        return {"names": names, "rows": [list(zip(*row)) for row in zip(counts.tolist(), shares.tolist())]}
    wrong = true != columns
    pairs, counts = np.unique(np.stack([true[wrong], columns[wrong]]), axis=1, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_CONFUSIONS]
    return {"pairs": [(names[t], names[p], counts[i], of_class[t]) for i in most for t, p in [pairs[:, i]]]}


def _examples(
    evaluator: LowShotEvaluator, first: _FirstSplit, test: Features, name_of: dict[int, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return test images with their nearest labelled images: the first of each class, and the first wrong ones."""
    if not all(isinstance(data, datasets.Dataset) for data in (evaluator.train_dataset, evaluator.test_dataset)):
        return {}
    firsts = [int(np.flatnonzero(test.labels == number)[0]) for number in np.unique(test.labels)[:_IMAGES]]
    wrong = np.flatnonzero(first.predicted != test.labels)
    wrong = wrong[~np.isin(wrong, firsts)][:_IMAGES]
    labelled_images, test_images = undecoded(evaluator.train_dataset), undecoded(evaluator.test_dataset)
    search = NearestNeighbors(n_neighbors=min(_NEIGHBOURS, len(first.labelled)), metric="cosine", algorithm="brute")
    search.fit(first.labelled.features)

    def shown(rows: Sequence[int]) -> list[dict[str, Any]]:
        if len(rows) == 0:
            return []
        of_rows = []
        for row, distances, nearest in zip(rows, *search.kneighbors(test.features[rows])):
            neighbours = [
                {
                    "image": _picture(labelled_images, first.labelled.rows[place]),
                    "row": int(first.labelled.rows[place]),
                    "label": int(first.labelled.labels[place]),
                    "similarity": 1 - float(distance),
                }
                for distance, place in zip(distances, nearest)
            ]
            own = {"image": _picture(test_images, test.rows[row]), "row": int(test.rows[row])}
            answer = {"label": int(test.labels[row]), "predicted": int(first.predicted[row])}
            of_rows.append({**own, **answer, "neighbours": neighbours})
        return of_rows

    return {
        "The first test image of each class": shown(firsts),
        "Test images that are classified wrongly": shown(wrong),
    }


def _picture(images: datasets.Dataset, row: int) -> str:
    return thumbnail(decode_image(images[int(row)]["image"], row=int(row)))


def _map(first: _FirstSplit, test: Features, name_of: dict[int, str], seed: int) -> dict[str, Any]:
    rows = low_shot_indices(test.labels, fraction=min(1.0, _MAPPED / len(test)), seed=seed)
    points, method = project(test.features[rows], seed)
    labels = test.labels[rows].tolist()
    titles = [
        f"{name_of[label]}, test row {test.rows[row]}"
        + ("" if first.predicted[row] == label else f", classified as {name_of[int(first.predicted[row])]}")
        for row, label in zip(rows, labels)
    ]
    description = f"{method} map of the features of {len(rows)} test images of {len(set(labels))} classes."
    return {
        "method": method,
        "num_images": len(rows),
        "chart": map_chart(points, labels, titles, name_of, description),
    }


def _settings(results: LowShotResults) -> str:
    """Return all that the numbers depend on as JSON text. Names of classes are in the matrix."""
    plain = results.to_dict()
    plain["data"] = {part: plain["data"][part] for part in ("train", "test")}
    return json.dumps({part: plain[part] for part in ("model", "probe", "settings", "data", "versions")}, indent=2)
