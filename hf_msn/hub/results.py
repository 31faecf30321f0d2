"""Read measured results, and check that they are of the weights beside them."""

import math
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..evaluation.backbones import checkpoint_weights_sha256
from ..evaluation.results import RESULTS_FORMAT, LowShotResults, SplitResult, TaskResult
from ..evaluation.weights_hash import file_sha256
from ..files import read_json

FINETUNING_FILE, WEIGHTS_INDEX = "finetune.json", "model.safetensors.index.json"
_TASK_FIELDS = ("tasks", "baselines")
_FINETUNING_FORMAT = "hf_msn fine-tuning 1"


def as_paths(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Return one path or several as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]


def read_results(path: str | os.PathLike) -> LowShotResults:
    """Read a file of `LowShotResults.save`. Means and intervals are computed from its splits."""
    record = _read_record(Path(path), RESULTS_FORMAT)
    try:
        tasks = _tasks(record["tasks"])
        baselines = {name: _tasks(of_baseline) for name, of_baseline in record.get("baselines", {}).items()}
        others = {field.name: record[field.name] for field in fields(LowShotResults) if field.name not in _TASK_FIELDS}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"'{path}' must be complete results, but {error!r} was met. Measure again.") from error
    return LowShotResults(tasks=tasks, baselines=baselines, **others)


def _tasks(plain: list[dict[str, Any]]) -> list[TaskResult]:
    return [
        TaskResult(task["name"], task["num_classes"], [SplitResult(**split) for split in task["splits"]])
        for task in plain
    ]


def read_low_shot(path: str | os.PathLike, checkpoint: str | os.PathLike) -> LowShotResults:
    """Read a file of `LowShotResults.save`, which must have measured the weights of a checkpoint."""
    results = read_results(path)
    measured = results.model.get("weights_sha256")
    features = results.settings.get("features", "backbone")
    try:
        weights = weights_of(checkpoint, features)
    except ValueError as error:
        if features == "backbone":
            raise
        raise ValueError(
            f"'{path}' must have measured what is published, but measured the {features} head. Publish the heads too: "
            f'`what="pretraining"` (`--what pretraining`). {error}'
        ) from error
    if measured != weights:
        raise ValueError(
            f"'{path}' must have measured the weights of this checkpoint, {weights}, but measured {measured}. Measure "
            "these: hf-msn evaluate --model CHECKPOINT --dataset DATASET --output low_shot.json"
        )
    return results


def read_finetuning(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """Read the `finetune.json` of a checkpoint, which must be of the weights beside it; `None` if there is none."""
    path = Path(checkpoint, FINETUNING_FILE)
    if not path.is_file():
        return None
    record = _read_record(path, _FINETUNING_FORMAT)
    hashes = {file.name: file_sha256(file) for file in sorted(path.parent.glob("*.safetensors"))}
    found = (record.get("files"), record.get("weights_sha256"))
    expected = (hashes, weights_of(checkpoint))
    if found != expected:
        raise ValueError(
            f"'{path}' must be of the weights beside it, whose hashes are {expected}, but has {found}. Save the "
            "fine-tuned model again: `result.save(folder)`."
        )
    return record


def weights_of(checkpoint: str | os.PathLike, features: str = "backbone") -> str:
    """Return the hash that the evaluator writes for the weights of a checkpoint folder."""
    return checkpoint_weights_sha256(model_argument(checkpoint), features)


def count_weights(folder: str | os.PathLike) -> dict[str, int]:
    """Return how many numbers each safetensors file of a model holds, by the name of the file."""
    folder, names = Path(folder), ["model.safetensors"]
    if not (folder / names[0]).exists() and (folder / WEIGHTS_INDEX).exists():
        names = sorted({Path(name).name for name in read_json(folder / WEIGHTS_INDEX)["weight_map"].values()})
    counts = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="np") as weights:
                metadata = set(weights.metadata() or {}) - {"format"}
                counts[name] = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"`checkpoint` must have whole weights, but '{name}' of '{folder}' cannot be read: {error}. Save the "
                "model again by `save_pretrained`."
            ) from error
        if metadata:
            raise ValueError(
                f"'{name}' of '{folder}' must have no metadata but its format, but has {sorted(metadata)}. Save the "
                "model again by `save_pretrained`."
            )
    return counts


def model_argument(checkpoint: str | os.PathLike) -> str:
    """Return `--model` of the evaluation for a checkpoint folder: a folder of timm has the prefix "timm:"."""
    config = read_json(Path(checkpoint, "config.json"))
    return f"timm:{checkpoint}" if "model_type" not in config else str(checkpoint)


def _read_record(path: Path, expected: str) -> dict[str, Any]:
    record = read_json(path)
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != expected:
        raise ValueError(f"'{path}' must have the format '{expected}', but has {found!r}. Measure again.")
    return record
