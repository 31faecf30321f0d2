"""The record of a run, at the events of a Trainer."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ...hub.run_record import describe_training, read_run, write_run
from .local_update import find_per_rank_callback


class RunRecordCallback(TrainerCallback):
    """Keep the recipe, the sync method and the wall time of a training, for `run.json`.

    Args:
        trainer (`Trainer`): It calls [`save`] with the folder of each model that it saves.

    Attributes:
        recipe (`Mapping[str, Any]`, *optional*): The fields of the recipe as they were given.
        sync (`Mapping[str, Any]`, *optional*): `method` and settings of training with little communication.
        checkpoint (`str`, *optional*): The checkpoint from which the next training is resumed. Its time counts.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.recipe: Mapping[str, Any] | None = None
        self.sync: Mapping[str, Any] | None = None
        self.checkpoint: str | None = None
        self._seconds_before: float | None = 0.0
        self._started: float | None = None
        self._is_first_update = True

    @property
    def seconds(self) -> float | None:
        """Wall time of the training over all resumes; `None` if that of an earlier part is not known."""
        if self._seconds_before is None or self._started is None:
            return self._seconds_before
        return self._seconds_before + time.monotonic() - self._started

    def on_train_begin(self, args, state, control, **kwargs):
        saved: Mapping[str, Any] = {"wall_time_seconds": 0.0}
        if self.checkpoint is not None:
            try:
                saved = read_run(self.checkpoint) or {}
            except ValueError:  # a damaged record must not prevent a resume
                saved = {}
        self._seconds_before, self._started = saved.get("wall_time_seconds"), time.monotonic()
        self._is_first_update = True

    def on_step_begin(self, args, state, control, **kwargs):
        if self._is_first_update:  # the sync object is there, and every rank comes here
            callback = find_per_rank_callback(self.trainer)
            self.sync = None if callback is None else callback.record()
            self._is_first_update = False

    def on_train_end(self, args, state, control, **kwargs):
        self._seconds_before, self._started = self.seconds, None

    def save(self, folder: str | Path) -> None:
        """Write `run.json` into the folder of a model."""
        record = describe_training(self.trainer)
        if self.recipe is not None:
            record |= {"arguments": None, "recipe": self.recipe}  # the recipe contains the arguments
        if self.sync is not None:
            record["sync"] = self.sync
            if "replicas" in self.sync:  # each replica makes updates of its own
                record["batch"]["images_per_update"] //= self.sync["replicas"]
        write_run(folder, {**record, "wall_time_seconds": self.seconds})
