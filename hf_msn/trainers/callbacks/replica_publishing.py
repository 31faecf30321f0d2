"""With what a codistillation on a Trainer ends: one of its replicas, or all of them for the average."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.prediction_average import PUBLISHED_FILE
from .replica_evaluation import names_of_metrics

if TYPE_CHECKING:
    from ...distributed.codistillation import Codistillation
    from .codistillation import CodistillationCallback


def publish(callback: CodistillationCallback) -> None:
    """Makes all ranks the replica that is published, and says in `codistillation.json` what is."""
    args, state = callback.trainer.args, callback.trainer.state
    said: dict[str, Any] = {"replicas": callback.num_replicas, "published": 0, "publish": callback.publish}
    if callback.publish == "best" and callback.num_replicas > 1:
        said |= _best(callback)
    if callback.publish == "average":
        said |= _average(callback)
    if callback.num_replicas > 1:
        callback.sync.take_replica(said["published"] if callback.publish == "best" else 0)
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        said["checkpoint"] = state.best_model_checkpoint
    if state.is_world_process_zero:
        said |= {"step": state.global_step, "settings": _readable(callback.sync)}
        _write(Path(args.output_dir), said)
    callback.trainer.accelerator.wait_for_everyone()  # any rank may load it next


def metric_to_compare(callback: CodistillationCallback) -> tuple[str, bool]:
    """The metric that says which replica is the best, and whether more of it is better."""
    args = callback.trainer.args
    name = args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    return name, not name.endswith("loss") if args.greater_is_better is None else args.greater_is_better


def check_metric(callback: CodistillationCallback) -> None:
    """Refuses, before the training, a metric that the evaluation at its end would not give. All ranks must call it.

    Raises:
        ValueError: With the metrics that there are.
    """
    if callback.publish != "best" or callback.num_replicas == 1:
        return
    name, _ = metric_to_compare(callback)
    names = names_of_metrics(callback.trainer)
    if names is not None and name not in names:
        raise ValueError(
            f"`publish='best'` compares the replicas by `metric_for_best_model`, here '{name}', but an evaluation "
            f"gives {', '.join(sorted(names)) or 'nothing'}. Set `metric_for_best_model` to one of them."
        )


def _best(callback: CodistillationCallback) -> dict[str, Any]:
    name, is_greater_better = metric_to_compare(callback)
    values = [metrics[name] for metrics in callback.evaluation.now()]
    best = (max if is_greater_better else min)(range(len(values)), key=values.__getitem__)
    return {"published": best, "metric": name, "values": values}


def _average(callback: CodistillationCallback) -> dict[str, Any]:
    trainer = callback.trainer
    if trainer.args.should_save:
        Path(trainer.args.output_dir, PUBLISHED_FILE).unlink(missing_ok=True)  # of the folders of an earlier run
    folders = [_save_replica(callback, place) for place in range(callback.num_replicas)]
    said = {"published": "average", "folders": folders}
    if trainer.eval_dataset is None or trainer.compute_metrics is None:
        return said
    replicas, average = callback.evaluation.now(), callback.evaluation.of_average()
    trainer.log({f"{name}_average": value for name, value in average.items()})
    names = dict.fromkeys([*replicas[0], *average])
    metrics = {n: {"replicas": [own.get(n) for own in replicas], "average": average.get(n)} for n in names}
    return {**said, "metrics": metrics}


@torch.no_grad()
def _save_replica(callback: CodistillationCallback, place: int) -> str:
    """Writes a replica's model into a folder of its own, by the rank that writes for the trainer; the folder's name.

    It takes the place of that rank's own for as long: the others may not reach its disk.
    """
    trainer, name = callback.trainer, f"replica_{place}"
    final = Path(trainer.args.output_dir, name)
    beside = final.with_name(f"{name}.partial")
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    own = [tensor.to("cpu", copy=True) for tensor in tensors]
    try:
        if callback.num_replicas > 1:
            callback.sync.take_replica(place)
        if trainer.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        trainer.save_model(str(beside), _internal_call=True)
        if trainer.args.should_save:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
    finally:
        for tensor, value in zip(tensors, own):
            tensor.copy_(value)
    return name


def _readable(sync: Codistillation) -> dict[str, Any]:
    """The settings that were given a value, as JSON holds them."""
    settings = {"method": type(sync).__name__, **dataclasses.asdict(sync.settings), **vars(sync.distance)}
    given = {name: value for name, value in settings.items() if value is not None}
    return {n: v if isinstance(v, (str, int, float)) else repr(v) for n, v in given.items()}


def _write(folder: Path, said: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{PUBLISHED_FILE}.partial"
    beside.write_text(json.dumps(said, indent=2) + "\n")
    beside.replace(folder / PUBLISHED_FILE)
