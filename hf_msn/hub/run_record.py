"""`run.json`: how a model was trained, written beside it by our trainers, for its card; nothing private is in it."""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..privacy import public_name, without_private

RUN_FILE = "run.json"
_FORMAT = "hf_msn run 1"
_PACKAGES = ("hf_msn", "torch", "transformers", "accelerate", "datasets", "timm")
# what the Trainer does beside the training, or what the record says elsewhere
_NOT_TRAINING = (
    *("save_", "logging_", "eval_", "do_", "disable_tqdm", "dataloader_", "ddp_", "load_best_model", "skip_memory"),
    *("max_steps", "num_train_epochs", "per_device_", "gradient_accumulation", "label_names", "remove_unused"),
    *("include_", "local_rank", "metric_for", "greater_is", "full_determinism", "debug", "accelerator_config"),
)


class RunRecorder:
    """Keeps of one training what nobody knows afterwards, and writes `run.json`.

    Attributes:
        recipe (`Mapping[str, Any]`, *optional*): The fields of the recipe as they were given.
        sync (`Mapping[str, Any]`, *optional*): `method` and settings of training with little communication.
    """

    def __init__(self):
        self.recipe: Mapping[str, Any] | None = None
        self.sync: Mapping[str, Any] | None = None
        self._before: float | None = 0.0
        self._started: float | None = None

    def begin(self, checkpoint: str | Path | None = None) -> None:
        """Starts the clock: at 0, or at the wall time of the checkpoint that the run goes on from."""
        saved = {"wall_time_seconds": 0.0}
        if checkpoint is not None:
            try:
                saved = read_run(checkpoint) or {}
            except ValueError:  # it says how a model was trained; a run goes on without
                saved = {}
        self._before, self._started = saved.get("wall_time_seconds"), time.monotonic()

    def end(self) -> None:
        """Stops the clock."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float | None:
        """Wall time of the training over all resumes; `None` where that of an earlier part is not known."""
        if self._before is None or self._started is None:
            return self._before
        return self._before + time.monotonic() - self._started

    def save(self, trainer: Trainer, folder: str | os.PathLike) -> None:
        """Writes what is known of a trainer's run into the folder of its model."""
        said = describe_training(trainer)
        if self.recipe is not None:
            said.pop("arguments")  # the recipe has them, and what is in no argument
            said["recipe"] = dict(self.recipe)
        if self.sync is not None:
            said["sync"] = dict(self.sync)
            if "replicas" in self.sync:  # each makes updates of its own
                said["batch"]["images_per_update"] //= self.sync["replicas"]
        write_run(folder, {**said, "wall_time_seconds": self.seconds})


def describe_training(trainer: Trainer) -> dict[str, Any]:
    """What a Trainer knows of its run: data, hardware, steps, batch, settings that are not the defaults, versions."""
    args, state, model = trainer.args, trainer.state, trainer.accelerator.unwrap_model(trainer.model)
    support = getattr(trainer, "support_dataset", None)
    per_device, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    described: dict[str, Any] = {
        "method": getattr(getattr(model, "config", None), "model_type", None),
        "data": describe_data(trainer.train_dataset),
        "labelled": None if support is None else {**describe_data(support), "num_images": len(support.rows)},
        "start": getattr(model, "trunk_from", None),
        "hardware": describe_hardware(args),
        "steps": state.global_step,
        "planned_steps": state.max_steps or None,
        "epochs": None if state.epoch is None else round(state.epoch, 3),
        "batch": {
            "per_device": per_device,
            "gradient_accumulation_steps": accumulated,
            "ranks": args.world_size,
            "images_per_update": per_device * accumulated * args.world_size,
        },
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
        "arguments": changed_arguments(args),
    }
    sharded = getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False)
    if args.world_size > 1 and not sharded:
        described["sync"] = {"method": "DistributedDataParallel"}
    return described


def describe_data(dataset: Any) -> dict[str, Any]:
    """Name, split and number of images of a data set, as far as they are known."""
    info, split = getattr(dataset, "info", None), getattr(dataset, "split", None)
    name = getattr(info, "dataset_name", None)
    try:
        count = len(dataset)
    except TypeError:  # a stream
        count = None
    return {
        "name": None if name is None else public_name(name),
        "split": None if split is None else str(split),
        "num_images": count,
    }


def describe_hardware(args: TrainingArguments) -> dict[str, Any]:
    """The device of this rank, the number of ranks and the CPU cores of this machine."""
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": device.type, "device_name": name, "ranks": args.world_size, "cpu_count": os.cpu_count()}


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that are not the defaults, less those that do not concern the training."""
    changed = {}
    for f in dataclasses.fields(args):
        if not f.init or f.name.startswith(_NOT_TRAINING):
            continue
        default = (
            f.default_factory() if f.default is dataclasses.MISSING and callable(f.default_factory) else f.default
        )
        value = getattr(args, f.name)
        if value is not None and default is not dataclasses.MISSING and value != default:
            changed[f.name] = value
    return changed


def write_run(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes a record as `run.json`: beside, then renamed. What is private, unknown or empty is left out."""
    versions = {package: _version(package) for package in _PACKAGES}
    whole = {"format": _FORMAT, **without_private(record), "versions": {n: v for n, v in versions.items() if v}}
    text = json.dumps(_known(whole), indent=2, allow_nan=False) + "\n"
    beside = Path(folder, f".{RUN_FILE}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, Path(folder, RUN_FILE))
    finally:
        beside.unlink(missing_ok=True)


def read_run(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The `run.json` of a folder, or `None` if there is none.

    Raises:
        ValueError: It is not JSON, not a record, or of another version.
    """
    path = Path(folder, RUN_FILE)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' must be JSON, but is not: {error}. Remove it, or save the model again.") from error
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != _FORMAT:
        raise ValueError(
            f"'{path}' must be the record of a run ('format': '{_FORMAT}'), but says {found!r}. Remove it, or save "
            "the model again with this version."
        )
    # a file that came with a model was not written here
    return without_private(record)


def _known(value: Any) -> Any:
    """Without the entries of mappings that are `None` or empty."""
    if isinstance(value, dict):
        known = {key: _known(item) for key, item in value.items()}
        return {key: item for key, item in known.items() if item is not None and item != {}}
    return [_known(item) for item in value] if isinstance(value, list) else value


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
