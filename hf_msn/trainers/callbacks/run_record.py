"""The record of a run, at the events of a Trainer."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ...hub.run_record import describe_training, find_differences, public_run, read_run, write_run
from ..checkpoints import CheckpointError
from .local_update import find_per_rank_callback

logger = logging.get_logger(__name__)


class RunRecordCallback(TrainerCallback):
    """Keep the recipe, the sync method and the wall time of a training, for `run.json`.

    Args:
        trainer (`Trainer`): It calls [`save`] with the folder of each model that it saves.

    Attributes:
        recipe (`Mapping[str, Any]`, *optional*): The fields of the recipe as they were given.
        sync (`Mapping[str, Any]`, *optional*): `method` and settings of training with little communication.
        num_broken (`Mapping[str, int]`): The images found broken on all ranks, by the names of the log.
        saved (`Mapping[str, Any]`): The record of the checkpoint that the training goes on from.
        resumes (`list`): Each earlier resume with other settings: its step, and the settings before and after.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.recipe: Mapping[str, Any] | None = None
        self.sync: Mapping[str, Any] | None = None
        self.num_broken: Mapping[str, int] = {}
        self.resumes: list[dict[str, Any]] = []
        self.saved: Mapping[str, Any] = {}
        self._seconds_before: float | None = 0.0
        self._started: float | None = None
        self._warning = ""

    @property
    def seconds(self) -> float | None:
        """Wall time of the training over all resumes; `None` if that of an earlier part is not known."""
        if self._seconds_before is None or self._started is None:
            return self._seconds_before
        return self._seconds_before + time.monotonic() - self._started

    def begin(self, checkpoint: str | None) -> None:
        """Prepare for a training, and compare its settings with the record of the checkpoint that it goes on from.

        Raises:
            CheckpointError: If the checkpoint is of another data set, unless `resume_on_other_data` is set.
        """
        self.resumes, self.saved, self._seconds_before, self._warning = [], {}, 0.0, ""
        here = public_run(describe_training(self.trainer))
        if checkpoint is None:
            return
        with suppress(ValueError):  # a damaged record must not prevent a resume
            self.saved = read_run(checkpoint) or {}
        saved = self.saved
        self.resumes, self._seconds_before = [*saved.get("resumes", ())], saved.get("wall_time_seconds")
        differing = self._compare_data(checkpoint, saved, here)
        if "settings" in saved:
            differing |= find_differences(saved["settings"], here["settings"])
            if self.trainer.args.auto_find_batch_size:  # a resume takes that of the checkpoint
                differing.pop("per_device_train_batch_size", None)
        method = saved.get("sync", {}).get("method")
        if method not in (None, "DistributedDataParallel") and find_per_rank_callback(self.trainer) is None:
            differing["sync"] = {"before": method, "after": None}  # its callback compares the settings of another one
        if not differing:
            return
        self.resumes.append({"step": saved.get("steps"), "settings": differing})
        if self.trainer.is_world_process_zero():
            shown = [f"{name} {pair['before']} there, {pair['after']} here" for name, pair in differing.items()]
            self._warning = (
                f"'{checkpoint}' was trained with other settings: {', '.join(shown)}. The run goes on with those here."
            )

    def _compare_data(self, checkpoint: str, saved: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
        there, here = _identify_data(saved), _identify_data(record)
        differing = find_differences(there, here)
        if "num_shards" not in there:  # in records of earlier versions
            differing.pop("num_shards", None)
        has_samples = "data_sample_sha256" in there and "data_sample_sha256" in here
        # The same images are the same data set, which may have been moved or renamed.
        decisive = differing.keys() - ({"dataset", "split"} if has_samples else {"data_sample_sha256"})
        if "data" not in saved or not decisive:
            return {}
        if not self.trainer.args.resume_on_other_data:
            raise CheckpointError(
                f"'{checkpoint}' was trained on another data set: {_describe(there)} there, {_describe(here)} here. "
                "Give the same data, set `resume_on_other_data` to go on with this one, or start a new run in another "
                "`output_dir`."
            )
        return differing

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self.sync = time.monotonic(), None

    def on_step_begin(self, args, state, control, **kwargs):
        self._warn()
        # Only now the sync object is there.
        if self.sync is None and (callback := find_per_rank_callback(self.trainer)) is not None:
            self.sync = callback.record()

    def on_train_end(self, args, state, control, **kwargs):
        self._warn()
        self._seconds_before, self._started = self.seconds, None

    def _warn(self) -> None:
        """Log that settings differ. Not in `begin`: the checkpoint can be refused as long as no step is taken."""
        if self._warning:
            logger.warning(self._warning)
            self._warning = ""

    def save(self, folder: str | Path) -> None:
        """Write `run.json` into the folder of a model."""
        record = describe_training(self.trainer)
        if self.recipe is not None:
            record |= {"arguments": None, "recipe": self.recipe}  # the recipe contains the arguments
        if self.sync is not None:
            record["sync"] = self.sync
            if "replicas" in self.sync:  # each replica makes updates of its own
                record["batch"]["images_per_update"] //= self.sync["replicas"]
        for part, name in (("data", "broken_images"), ("labelled", "broken_labelled_images")):
            if self.num_broken.get(name):
                record[part]["num_broken"] = self.num_broken[name]
        record["resumes"] = self.resumes or None
        write_run(folder, {**record, "wall_time_seconds": self.seconds})


def _identify_data(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record knows of the training set."""
    names = {"dataset": "name", "split": "split", "num_images": "num_images", "num_shards": "num_shards"}
    found = {name: record.get("data", {}).get(field) for name, field in names.items()}
    found["data_sample_sha256"] = record.get("data_sample_sha256")
    return {name: value for name, value in found.items() if value is not None}


def _describe(data: Mapping[str, Any]) -> str:
    name, split, images, shards = (data.get(key) for key in ("dataset", "split", "num_images", "num_shards"))
    size = f"({images} images)" if images else f"({shards} shards)" if shards else ""
    return " ".join(filter(None, [f"'{name}'" if name else "", split, size])) or "another one"
