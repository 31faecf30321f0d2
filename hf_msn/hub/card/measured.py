"""What the evaluator and fine-tuning measured, read back from their files and checked: the only numbers of a card."""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...evaluation.backbones import checkpoint_weights_sha256
from ...evaluation.results import RESULTS_FORMAT, LowShotResults, SplitResult, TaskResult
from ...evaluation.weights_hash import file_sha256

FINETUNING_FILE = "finetune.json"
_FINETUNING_FORMAT = "hf_msn fine-tuning 1"
_MEASURE = "scripts/evaluate_low_shot.py"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FinetuningNumbers:
    """What `finetune.json` says of the model beside it."""

    said: dict[str, Any]

    @property
    def test_accuracy(self) -> dict[str, float]:
        """Per cent by space ("top1" of a classifier), on images that chose nothing; empty if never measured."""
        return self.said["test_accuracy"] or {}


def read_low_shot(path: str | Path, checkpoint: str | Path) -> LowShotResults:
    """The results in a file, as [`read_results`] reads them, if they are of the weights in `checkpoint`.

    Raises:
        ValueError: As [`read_results`], or results of other weights. The message has the command that measures.
    """
    command = _command(checkpoint, None)
    results = read_results(path, command)
    weights = results.model["weights_sha256"]
    if weights is None:
        raise ValueError(
            f"'{path}' measured features without weights, such as raw pixels, which no checkpoint has. {command}"
        )
    _check_weights(path, weights, checkpoint, results)
    return results


def read_results(
    path: str | Path, command: str = f"python {_MEASURE} --model MODEL --dataset DATASET --output low_shot.json"
) -> LowShotResults:
    """The results in a file of [`~LowShotResults.save`], if they are whole.

    Args:
        path (`str` or `Path`): The file.
        command (`str`, *optional*): How to measure, for the errors.

    Raises:
        ValueError: No such file, not JSON, another kind of file, an entry that is missing or not finite, or a summary
            that is not that of its splits.
    """
    path = Path(path)
    said = _read_json(path, command)
    kind = said.get("format", RESULTS_FORMAT) if isinstance(said, dict) else None
    if kind != RESULTS_FORMAT or "tasks" not in said or "metrics" not in said:
        raise ValueError(
            f"'{path}' must be results of a low-shot evaluation ('format': '{RESULTS_FORMAT}'), but "
            f"{_what_it_is(said)}. Write one by: {command}"
        )
    try:
        tasks = [_task(plain) for plain in said["tasks"]]
        results = LowShotResults(
            tasks=tasks, **{f.name: said[f.name] for f in fields(LowShotResults) if f.name != "tasks"}
        )
        num_test = int(results.data["test"]["num_images"])
        int(results.data["train"]["num_images"])
        summaries = {task.name: plain["summary"] for task, plain in zip(tasks, said["tasks"])}
        settings = dict(results.settings), dict(results.probe), dict(results.versions)
        results.model["weights_sha256"]
        if not (tasks and all(settings) and isinstance(results.name, str) and len(summaries) == len(tasks)):
            raise TypeError("tasks, settings, probe, versions or the name are empty, or two tasks have one name")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has an entry that cannot be: {error}"
        raise ValueError(f"'{path}' must be whole results of a low-shot evaluation, but {what}. {command}") from error
    _check_numbers(path, results, summaries, said["metrics"], num_test, command)
    return results


def read_finetuning(checkpoint: str | Path) -> FinetuningNumbers | None:
    """`finetune.json` of a checkpoint, or `None` if it has none.

    Raises:
        ValueError: Not JSON, of another version, with an entry that is missing or not finite, or of other weights than
            those in the folder.
    """
    checkpoint = Path(checkpoint)
    path = checkpoint / FINETUNING_FILE
    if not path.is_file():
        return None
    remedy = "Save the fine-tuned model again: `result.save(folder)`, or scripts/finetune.py."
    said = _read_json(path, remedy)
    if not isinstance(said, dict) or said.get("format") != _FINETUNING_FORMAT:
        raise ValueError(
            f"'{path}' must be of a fine-tuning ('format': '{_FINETUNING_FORMAT}'), but {_what_it_is(said)}. {remedy}"
        )
    try:
        by_epoch = said["accuracy_by_epoch"]
        accuracies = [value for values in by_epoch.values() for value in values.values()]
        accuracies += [*(said["test_accuracy"] or {}).values()]
        chosen = by_epoch.get(str(said["best_epoch"]))
        validation, expected = said["validation_accuracy"], None if chosen is None else next(iter(chosen.values()))
        counts = [said[name] for name in ("num_trained_images", "num_held_out_images", "num_labelled_images")]
        if not all(isinstance(count, int) for count in counts) or (
            said["test_accuracy"] and not said["num_test_images"]
        ):
            raise TypeError("a number of images is none")
        if not all(_is_accuracy(value) for value in accuracies):
            raise TypeError("an accuracy is not between 0 and 100")
        files, weights = dict(said["files"]), said["weights_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has an entry that cannot be: {error}"
        raise ValueError(f"'{path}' must be a whole fine-tuning result, but {what}. {remedy}") from error
    if validation != expected:
        raise ValueError(
            f"'{path}' says a validation accuracy of {validation}, but its best epoch {said['best_epoch']} has "
            f"{expected}: it was changed by hand. {remedy}"
        )
    here = {file.name: file_sha256(file) for file in sorted(checkpoint.glob("*.safetensors"))}
    if files != here:
        raise ValueError(
            f"'{path}' is of other weights than those beside it: it says {files or 'no file'}, the folder has "
            f"{here or 'no file'}. {remedy}"
        )
    if not isinstance(weights, str) or not _SHA256.fullmatch(weights):
        raise ValueError(f"'{path}' must have a `weights_sha256`, but has {weights!r}. {remedy}")
    return FinetuningNumbers(said)


def weights_of(checkpoint: str | Path, features: str = "backbone") -> str:
    """The hash of the weights of a checkpoint folder, also of one that timm saved."""
    return checkpoint_weights_sha256(model_argument(checkpoint), features)


def model_argument(checkpoint: str | Path) -> str:
    """What `--model` of the evaluation is for a checkpoint folder."""
    config = Path(checkpoint, "config.json")
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"The checkpoint must be a folder of `save_pretrained`, but '{checkpoint}' has no config.json. Give the "
            "folder that training, export or conversion wrote."
        ) from None
    except ValueError as error:
        raise ValueError(f"'{config}' must be JSON, but is not: {error}. Save the model again.") from error
    of_timm = isinstance(said, dict) and "architecture" in said and "model_type" not in said
    return f"timm:{checkpoint}" if of_timm else str(checkpoint)


def _task(plain: dict[str, Any]) -> TaskResult:
    splits = [SplitResult(**{f.name: split[f.name] for f in fields(SplitResult)}) for split in plain["splits"]]
    if not splits:
        raise ValueError(f"task {plain['name']} has no splits")
    for split in splits:
        for value in (split.top1, split.top5):
            if not (_is_accuracy(value) or (value is None and value is split.top5)):
                raise ValueError(f"an accuracy of {value!r}, which is not between 0 and 100 per cent")
        if not all(isinstance(n, int) for n in (split.num_images, split.fewest_per_class, split.most_per_class)):
            raise ValueError("a number of images that is none")
        dict(split.fit)
    return TaskResult(str(plain["name"]), int(plain["num_classes"]), splits)


def _check_numbers(path, results: LowShotResults, summaries, metrics, num_test: int, command: str) -> None:
    changed = f"The file was changed by hand; numbers come from measurements only: {command}"
    for task in results.tasks:
        for split in task.splits:
            right = split.top1 * num_test / 100
            if abs(right - round(right)) > 1e-6 * num_test:
                raise ValueError(
                    f"'{path}' says {split.top1} % in a split of '{task.name}', which is no number of right ones "
                    f"among {num_test} test images. {changed}"
                )
        _compare(path, f"the summary of '{task.name}'", summaries[task.name], task.summary, changed)
    _compare(path, "the metrics", metrics, results.metrics, changed)
    if results.primary_metric not in results.metrics:
        raise ValueError(f"'{path}' has no '{results.primary_metric}', its `primary_metric`. {changed}")


def _compare(path, what: str, said: Any, computed: dict[str, float], changed: str) -> None:
    said = said if isinstance(said, dict) else {}
    for name in {**computed, **said}:
        there, here = said.get(name), computed.get(name)
        if not (_is_number(there) and _is_number(here) and math.isclose(there, here, rel_tol=1e-9, abs_tol=1e-9)):
            raise ValueError(f"'{path}': {what} has {name} {there}, but its splits give {here}. {changed}")


def _check_weights(path, measured: str, checkpoint, results: LowShotResults) -> None:
    features = results.settings.get("features", "backbone")
    here = weights_of(checkpoint, features)
    if measured != here:
        source = results.data["test"].get("name")
        raise ValueError(
            f"'{path}' measured other weights: {measured}, those of '{checkpoint}' are {here}. A card has the numbers "
            f"of its own checkpoint only. Measure this one: {_command(checkpoint, source)}"
        )


def _command(checkpoint: str | Path, dataset: str | None) -> str:
    # the name of a local folder is not where it is
    data = dataset if dataset is not None and (dataset == "digits" or "/" in dataset) else "DATASET"
    try:
        model = model_argument(checkpoint)
    except ValueError:
        model = str(checkpoint)
    return f"python {_MEASURE} --model {model} --dataset {data} --output low_shot.json"


def _read_json(path: Path, remedy: str) -> Any:
    if not path.is_file():
        raise ValueError(f"There is no file of results '{path}'. {remedy}")

    def refuse(name: str) -> None:
        raise ValueError(f"it has a number that is {name}")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"'{path}' must be whole JSON with finite numbers, but is not: {error}. {remedy}") from error


def _what_it_is(said: Any) -> str:
    if not isinstance(said, dict):
        return f"holds a {type(said).__name__}"
    if "format" in said:
        return f"says {said['format']!r}"
    return f"has {', '.join(repr(str(name)[:30]) for name in [*said][:4]) or 'no entry'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_accuracy(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100
