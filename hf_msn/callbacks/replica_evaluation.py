"""What the replicas of a codistillation are worth: each one's own evaluation on all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ..distributed.collectives import world_size
from .replica_data import nothing_gathered

if TYPE_CHECKING:
    from .codistillation import CodistillationCallback


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
        self.step: int | None = None
        self.metrics: list[dict[str, float]] = []

    def of_each(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The trainer's evaluation, with the metrics of all replicas on all ranks, so that all decide alike."""
        callback = self._callback
        with nothing_gathered(callback.trainer):
            output = original(*args, **kwargs)
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

    def _remember(self, metrics: list[dict[str, float]]) -> None:
        step = self._callback.trainer.state.global_step
        # Several sets are evaluated one after the other.
        before = self.metrics if self.step == step else [{} for _ in metrics]
        self.step, self.metrics = step, [{**old, **new} for old, new in zip(before, metrics)]
