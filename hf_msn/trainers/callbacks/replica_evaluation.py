"""What the replicas of a codistillation are worth: each one on all rows, and the average of their predictions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Subset
from transformers import Trainer
from transformers.utils import logging

from ...distributed.collectives import world_size
from ...distributed.replicas.batch_digest import batch_digest
from ...models.prediction_average import probabilities_of, with_average
from .replica_data import nothing_gathered, replaced

if TYPE_CHECKING:
    from .codistillation import CodistillationCallback

logger = logging.get_logger(__name__)


class ReplicaEvaluation:
    """Evaluates each replica where the trainer evaluates its model, and remembers what the last time found.

    Args:
        callback ([`CodistillationCallback`]): Of the trainer.

    Attributes:
        step (`int`, *optional*): The update that the metrics are of.
        metrics (`list[dict[str, float]]`): Each replica's, of all sets that were evaluated there.
    """

    def __init__(self, callback: CodistillationCallback):
        self._callback = callback
        self._is_of_average = False
        self.step: int | None = None
        self.metrics: list[dict[str, float]] = []

    def of_each(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The trainer's evaluation, with the metrics of all replicas on all ranks, so that all decide alike."""
        callback = self._callback
        if callback.num_replicas == 1:
            output = original(*args, **kwargs)
            if not self._is_of_average:
                self._remember([output.metrics])
            return output
        with nothing_gathered(callback.trainer):
            output = original(*args, **kwargs)
        if self._is_of_average:  # the same on all ranks
            return output
        gathered: list = [None] * world_size()
        dist.all_gather_object(gathered, (callback.replica, output.metrics))
        by_replica: dict[int, dict[str, float]] = {}
        for place, metrics in gathered:
            by_replica.setdefault(place, metrics)
        metrics = dict(by_replica[0])
        for place in range(1, callback.num_replicas):
            metrics |= {f"{name}_replica_{place}": value for name, value in by_replica[place].items()}
        self._remember([by_replica[place] for place in range(callback.num_replicas)])
        return output._replace(metrics=metrics)

    def now(self) -> list[dict[str, float]]:
        """Each replica's metrics after the update that was the last, evaluated now if they were not."""
        if self.step != self._callback.trainer.state.global_step:
            self._callback.trainer.evaluate()
        return self.metrics

    def of_average(self) -> dict[str, float]:
        """The metrics of the mean of the replicas' probabilities, in one more pass."""
        trainer = self._callback.trainer
        self._is_of_average = True
        try:
            with self._averaged_forward() as has_own_loss:
                metrics = metrics_of(trainer, trainer.eval_dataset)
        finally:
            self._is_of_average = False
        return {name: value for name, value in metrics.items() if not (has_own_loss and name.endswith("_loss"))}

    @contextmanager
    def _averaged_forward(self) -> Iterator[list]:
        """The model predicts the average. The list is not empty where a loss is the replica's own nevertheless."""
        model, average, own = self._callback.trainer.model, self._callback.sync.average_predictions, []

        def answer(_, positional: tuple, named: dict[str, Any], output: Any) -> Any:
            self._require_same(named)
            before = getattr(output, "loss", None)
            output = with_average(model, output, average(probabilities_of(output)), named.get("labels"))
            if before is not None and getattr(output, "loss", None) is None:
                output["loss"] = before  # the trainer asks for one
                own.append(True)
            return output

        hook = model.register_forward_hook(answer, with_kwargs=True)
        try:
            yield own
        finally:
            hook.remove()

    def _require_same(self, inputs: dict[str, Any]) -> None:
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        number = int(batch_digest(tensors, torch.device("cpu")).sum()) % 2**52  # what a float64 holds
        if len(set(self._callback.sync.values_of_replicas(float(number)))) > 1:
            raise ValueError(
                "An average of predictions is of the same rows in the same order, but the replicas' evaluation "
                "batches differ. Give an `eval_dataset` and a sampler that do not draw at random. The replicas are "
                "saved: `PredictionAverage.from_pretrained` takes a list of their folders."
            )

    def _remember(self, metrics: list[dict[str, float]]) -> None:
        step = self._callback.trainer.state.global_step
        metrics = [{n: v for n, v in own.items() if not n.endswith("_preparation_time")} for own in metrics]
        # Several sets are evaluated one after the other.
        before = self.metrics if self.step == step else [{} for _ in metrics]
        self.step, self.metrics = step, [{**old, **new} for old, new in zip(before, metrics)]


def metrics_of(trainer: Trainer, dataset: Any, prefix: str = "eval") -> dict[str, float]:
    """The metrics of a set, or of each set of a dict, which no callback is told of."""
    if isinstance(dataset, dict):
        found = {}
        for name, one in dataset.items():
            found |= metrics_of(trainer, one, f"{prefix}_{name}")
        return found
    with replaced(trainer, _eval_dataloaders={}):
        loader = trainer.get_eval_dataloader(dataset)
    # Progress bars are closed by the event of an evaluation, which this is not.
    with replaced(trainer.callback_handler, on_prediction_step=lambda args, state, control: control):
        output = trainer.evaluation_loop(
            loader,
            description="Evaluation",
            prediction_loss_only=True if trainer.compute_metrics is None else None,
            metric_key_prefix=prefix,
        )
    return {name: value for name, value in output.metrics.items() if not name.endswith("_preparation_time")}


def names_of_metrics(trainer: Trainer) -> set[str] | None:
    """The metrics that an evaluation gives, learnt from the first rows; `None` if that does not say.

    Leaves random generators as they are. All ranks must call it, where the ranks do not hold replicas yet.
    """
    rows = _first_rows(trainer.eval_dataset, trainer.args.eval_batch_size)
    if rows is None:
        return None
    before = random.getstate(), np.random.get_state()
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            return set(metrics_of(trainer, rows))
    except ValueError as error:  # some metrics need more than a few rows
        logger.warning(
            f"The evaluation of the first rows failed ({error}), so whether the metric that `publish` needs will be "
            "there at the end is not known."
        )
        return None
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _first_rows(dataset: Any, count: int) -> Any:
    if isinstance(dataset, dict):
        found = {name: _first_rows(one, count) for name, one in dataset.items()}
        return None if None in found.values() else found
    if hasattr(dataset, "select") and hasattr(dataset, "__len__"):
        return dataset.select(range(min(count, len(dataset))))
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return Subset(dataset, range(min(count, len(dataset))))
    return None
