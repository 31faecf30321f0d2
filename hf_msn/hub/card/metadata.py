"""What the Hub reads of a card: tags, origin, and the numbers as `model-index` and as `.eval_results`."""

import re
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from ...evaluation.results import LowShotResults, TaskResult
from ...privacy import public_name
from .facts import CheckpointFacts
from .text import task_title

_TAGS = {"msn": ["msn", "self-supervised-learning"], "paws": ["paws", "semi-supervised-learning"]}
_TAGS["suncet"] = ["suncet", "semi-supervised-learning"]
_TASK = "image-classification"


def metadata(
    facts: CheckpointFacts,
    results: list[LowShotResults],
    weights_sha256: str,
    *,
    model_name: str,
    license: str | None,
    base_model: str | None,
) -> ModelCardData:
    """The card's metadata; what is not known is left out."""
    evaluated = eval_results(facts, results, weights_sha256)
    started = facts.run.get("start") or (facts.run.get("recipe") or {}).get("from_backbone")
    data = [(facts.run.get(name) or {}).get("name") for name in ("data", "labelled")]
    hub_data = list(dict.fromkeys(name for name in data if is_hub_id(name)))
    libraries = {"timm": "timm"} if facts.pretraining_class is None else {facts.model_type: "hf_msn"}
    return ModelCardData(
        model_name=model_name,
        library_name=libraries.get(facts.model_type, "transformers"),
        pipeline_tag=_TASK if facts.is_classifier else "image-feature-extraction",
        tags=["hf_msn", "vision", *_TAGS.get(facts.method, []), "few-shot-learning"],
        license=license,
        base_model=base_model or (started if is_hub_id(started) else None),
        datasets=hub_data or None,
        metrics=["accuracy"] if evaluated else None,
        eval_results=evaluated or None,
    )


def is_hub_id(name: Any) -> bool:
    """Whether a public name is `owner/name`."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def eval_results(facts: CheckpointFacts, results: list[LowShotResults], weights_sha256: str) -> list[EvalResult]:
    """The measured accuracies for `model-index`, in per cent and not rounded."""
    found = []
    for one in results:
        test = one.data["test"]
        for task in one.tasks:
            for name in ("top1", "top5"):
                if name not in task.summary:
                    continue
                found.append(
                    EvalResult(
                        task_type=_TASK,
                        task_name="Low-shot image classification",
                        dataset_type=_dataset_id(test),
                        dataset_name=_dataset_id(test),
                        dataset_split=test.get("split"),
                        metric_type="accuracy",
                        metric_value=task.summary[name],
                        metric_name=f"{_metric(name)}, {task_title(task)}, {_probe(one)}, {_mean_of(task)}",
                        metric_args={
                            "std": task.summary[f"{name}_std"],
                            "ci95": task.summary[f"{name}_ci95"],
                            "num_splits": len(task.splits),
                            "num_test_images": test["num_images"],
                            "weights_sha256": one.model["weights_sha256"],
                        },
                    )
                )
    if facts.finetuning is not None:
        said = facts.finetuning.said
        for space, accuracy in facts.finetuning.test_accuracy.items():
            test = said.get("test_data") or {}
            found.append(
                EvalResult(
                    task_type=_TASK,
                    task_name="Image classification",
                    dataset_type=_dataset_id(test),
                    dataset_name=_dataset_id(test),
                    dataset_split=test.get("split"),
                    metric_type="accuracy",
                    metric_value=accuracy,
                    metric_name=f"top-1 accuracy [%] after fine-tuning ({'classifier' if space == 'top1' else space})",
                    metric_args={"num_test_images": said["num_test_images"], "weights_sha256": weights_sha256},
                )
            )
    return found


def eval_entries(facts: CheckpointFacts, results: list[LowShotResults], weights_sha256: str) -> list[EvalResultEntry]:
    """The same top-1 accuracies for `.eval_results/*.yaml`.

    Data that is no data set of the Hub goes by its bare name, which no benchmark of the Hub has; data without a name
    is left out.
    """
    entries = [
        EvalResultEntry(
            dataset_id=_dataset_id(one.data["test"]),
            task_id=task.name if re.fullmatch(r"[\w.-]+", task.name) else "low_shot",
            value=task.summary["top1"],
            notes=f"low-shot top-1 [%], {task_title(task)}, {_probe(one)}, {_mean_of(task)}, std "
            f"{task.summary['top1_std']:.2f}, 95 % +- {task.summary['top1_ci95']:.2f}, "
            f"{one.data['test']['num_images']} test images, weights {one.model['weights_sha256'][:16]}",
        )
        for one in results
        if one.data["test"].get("name")
        for task in one.tasks
    ]
    if facts.finetuning is not None and (facts.finetuning.said.get("test_data") or {}).get("name"):
        said = facts.finetuning.said
        entries += [
            EvalResultEntry(
                dataset_id=_dataset_id(said.get("test_data") or {}),
                task_id="finetuned" if space == "top1" else f"finetuned_{space}",
                value=accuracy,
                notes=f"top-1 [%] after fine-tuning on {said['num_trained_images']} labelled images, "
                f"{said['num_test_images']} test images, weights {weights_sha256[:16]}",
            )
            for space, accuracy in facts.finetuning.test_accuracy.items()
        ]
    return entries


def _dataset_id(data: dict[str, Any]) -> str:
    """A Hub id, or a bare name."""
    name = public_name(str(data.get("name") or "unnamed"))
    return re.sub(r"[^\w./-]+", "-", name).strip("-") or "unnamed"


def _metric(name: str) -> str:
    return {"top1": "top-1 accuracy [%]", "top5": "top-5 accuracy [%]"}[name]


def _probe(results: LowShotResults) -> str:
    said = f"{results.probe.get('probe', 'unknown')} probe".replace("_", " ")
    return said + (" on projections" if results.settings.get("features") == "projection" else "")


def _mean_of(task: TaskResult) -> str:
    return f"mean of {len(task.splits)} splits" if len(task.splits) > 1 else "1 split"
