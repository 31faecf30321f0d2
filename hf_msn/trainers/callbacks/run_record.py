"""The record of a run, at the events of a Trainer."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ...hub.run_record import (
    describe_training,
    find_differences,
    public_run,
    read_run,
    write_run,
)
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
        resumes (`list`): Each earlier resume with other settings: its step, and the settings before and after.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.recipe: Mapping[str, Any] | None = None
        self.sync: Mapping[str, Any] | None = None
        self.num_broken: Mapping[str, int] = {}
        self.resumes: list[dict[str, Any]] = []
        self._saved: Mapping[str, Any] = {"wall_time_seconds": 0.0}
        self._seconds_before: float | None = 0.0
        self._started: float | None = None
        self._is_first_update = True

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
        self._saved, self.resumes = {"wall_time_seconds": 0.0}, []
        here = public_run(describe_training(self.trainer))
        if checkpoint is None:
            return
        try:
            self._saved = read_run(checkpoint) or {}
        except ValueError:  # a damaged record must not prevent a resume
            self._saved = {}
        self.resumes = [*self._saved.get("resumes", ())]
        differing = self._compare_data(checkpoint, here)
        if "settings" in self._saved:
            differing |= find_differences(self._saved["settings"], here["settings"])
            if self.trainer.args.auto_find_batch_size:  # a resume takes that of the checkpoint
                differing.pop("per_device_train_batch_size", None)
        method = self._saved.get("sync", {}).get("method")
        if method not in (None, "DistributedDataParallel") and find_per_rank_callback(self.trainer) is None:
            differing["sync"] = {"before": method, "after": None}  # its callback compares the settings of another one
        if not differing:
            return
        self.resumes.append({"step": self._saved.get("steps"), "settings": differing})
        if self.trainer.is_world_process_zero():
            shown = [f"{name} {pair['before']} there, {pair['after']} here" for name, pair in differing.items()]
            logger.warning(
                f"'{checkpoint}' was trained with other settings: {', '.join(shown)}. The run goes on with those here."
            )

    def _compare_data(self, checkpoint: str, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        saved = self._saved
        there, here = saved.get("data", {}), record.get("data", {})
        if "data_sample_sha256" in saved and "data_sample_sha256" in record:
            # the name may be another: a data set may have been moved or renamed
            is_same = saved["data_sample_sha256"] == record["data_sample_sha256"]
        else:
            is_same = all(there.get(name) == here.get(name) for name in ("name", "split"))
        is_same &= there.get("num_images") == here.get("num_images")
        is_same &= there.get("num_shards") in (None, here.get("num_shards"))  # earlier versions have none
        if not there or is_same:
            return {}
        if not self.trainer.args.resume_on_other_data:
            raise CheckpointError(
                f"'{checkpoint}' was trained on another data set: {_describe(there)} there, {_describe(here)} here. "
                "Give the same data, set `resume_on_other_data` to go on with this one, or start a new run in another "
                "`output_dir`."
            )
        pairs = {
            "dataset": (there.get("name"), here.get("name")),
            "split": (there.get("split"), here.get("split")),
            "num_images": (there.get("num_images"), here.get("num_images")),
            "num_shards": (there.get("num_shards"), here.get("num_shards")),
            "data_sample_sha256": (saved.get("data_sample_sha256"), record.get("data_sample_sha256")),
        }
        return {name: {"before": old, "after": new} for name, (old, new) in pairs.items() if old != new}

    def on_train_begin(self, args, state, control, **kwargs):
        self._seconds_before, self._started = self._saved.get("wall_time_seconds"), time.monotonic()
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
        for part, name in (("data", "broken_images"), ("labelled", "broken_labelled_images")):
            if self.num_broken.get(name):
                record[part]["num_broken"] = self.num_broken[name]
        record["resumes"] = self.resumes or None
        write_run(folder, {**record, "wall_time_seconds": self.seconds})


def _describe(data: Mapping[str, Any]) -> str:
    name, split, images, shards = (data.get(key) for key in ("name", "split", "num_images", "num_shards"))
    size = f"({images} images)" if images else f"({shards} shards)" if shards else ""
    return " ".join(filter(None, [f"'{name}'" if name else "", split, size])) or "another one"
