"""With what a codistillation on a Trainer ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sync_checkpoints import settings_of

if TYPE_CHECKING:
    from .codistillation import CodistillationCallback

PUBLISHED_FILE = "codistillation.json"


def publish(callback: CodistillationCallback) -> None:
    """Makes all ranks the replica that is published, and says which one it is in `codistillation.json`."""
    args, state = callback.trainer.args, callback.trainer.state
    said: dict[str, Any] = {"replicas": callback.num_replicas, "published": 0, "publish": callback.publish}
    if callback.publish == "best" and callback.num_replicas > 1:
        said |= _best(callback)
    if callback.num_replicas > 1:
        callback.sync.take_replica(said["published"])
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        said["checkpoint"] = state.best_model_checkpoint
    if state.is_world_process_zero:
        shown = {name: value for name, value in settings_of(callback.sync).items() if value != "None"}
        _write(Path(args.output_dir), {**said, "step": state.global_step, "settings": shown})


def metric_to_compare(args: Any) -> tuple[str, bool]:
    """The metric that says which replica is the best, and whether more of it is better."""
    name = args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    return name, not name.endswith("loss") if args.greater_is_better is None else args.greater_is_better


def _best(callback: CodistillationCallback) -> dict[str, Any]:
    name, is_greater_better = metric_to_compare(callback.trainer.args)
    values = [metrics[name] for metrics in callback.evaluation.now()]
    best = (max if is_greater_better else min)(range(len(values)), key=values.__getitem__)
    return {"published": best, "metric": name, "values": values}


def _write(folder: Path, said: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{PUBLISHED_FILE}.partial"
    beside.write_text(json.dumps(said, indent=2) + "\n")
    beside.replace(folder / PUBLISHED_FILE)
