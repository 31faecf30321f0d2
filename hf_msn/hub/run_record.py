"""`run.json`: how a model was trained, for its card. The trainers write it beside the model."""

import dataclasses
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..evaluation.results import package_versions
from ..files import public_name, read_json, write_json
from ..optim.by_name import name_of_optimizer

RUN_FILE = "run.json"
_FORMAT = "hf_msn run 1"
_PACKAGES = ("hf_msn", "torch", "transformers", "accelerate", "datasets", "timm")

# The only fields of run.json.
_FIELDS = (
    *("method", "data", "data_sample_sha256", "labelled", "start", "hardware", "steps", "planned_steps", "epochs"),
    *("batch", "precision", "optimizer", "seed", "arguments", "recipe", "sync", "settings", "resumes", "versions"),
    "wall_time_seconds",
)
# In these fields, such as a recipe, numbers have any name, and text only one of these names.
_SETTINGS = ("arguments", "recipe", "settings", "resumes")
_TEXT_SETTINGS = {
    *("method", "head", "start_layer", "model", "from_backbone", "timm_model", "hidden_act", "projection_activation"),
    *("predictor", "data_sample_sha256", "split", "transform"),
    *("dataset", "dataset_config", "dataset_revision", "train_split", "test_split", "image_column", "label_column"),
    *("labelled_dataset", "labelled_split", "labelled_list_file", "labelled_rows_file", "on_broken_image"),
    *("interpolation", "attn_implementation", "support_shard", "support_on_small_class"),
    *("optim", "optim_args", "lr_scheduler_type", "metric_for_best_model"),
    *("save_strategy", "eval_strategy", "logging_strategy", "low_shot_baselines"),
    *("low_shot_train_split", "low_shot_test_split", "low_shot_test_dataset", "low_shot_probe", "low_shot_features"),
    *("sync", "sync_base", "sync_base_buffers", "sync_topology", "sync_wire_dtype", "async_method"),
    *("codistillation_exchange", "codistillation_distance", "codistillation_initialization", "codistillation_publish"),
    *("codistillation_copies_dtype", "on_collapse"),
}
# The arguments of transformers.TrainingArguments that concern the training; those of hf_msn all do.
_TRAINING_FIELDS = {
    *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "data_seed", "use_cpu", "bf16", "fp16", "tf32", "seed"),
    *("gradient_checkpointing", "torch_compile", "average_tokens_across_devices", "label_smoothing_factor"),
    "optim_args",
}
# Settings with fields of their own: what precedes their names among the differences of two records.
_VIEWS = {"views": "", "support_views": "support_"}
_NOT_SETTINGS = ("hub_", "push_to_hub", "overwrite_", "resume_")
# The fields of a record that settle, beside the arguments above, what a training does.
_BATCH_FIELDS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")


def describe_training(trainer: Trainer) -> dict[str, Any]:
    """Describe the run of a Trainer: data, hardware, steps, batch, changed arguments."""
    args, state, model = trainer.args, trainer.state, trainer.accelerator.unwrap_model(trainer.model)
    support = getattr(trainer, "support_dataset", None)
    images, accumulated = trainer._train_batch_size, args.gradient_accumulation_steps  # of this process
    described: dict[str, Any] = {
        "method": getattr(getattr(model, "config", None), "model_type", None),
        "data": describe_data(trainer.train_dataset),
        "data_sample_sha256": getattr(trainer.train_dataset, "sample_sha256", None),
        "labelled": None if support is None else {**describe_data(support), "num_images": len(support.rows)},
        "start": getattr(model, "trunk_from", None),
        "hardware": describe_hardware(args),
        "steps": state.global_step,
        "planned_steps": state.max_steps or None,
        "epochs": None if state.epoch is None else round(state.epoch, 3),
        "batch": {
            "per_device": images // max(args.n_gpu, 1),
            "gradient_accumulation_steps": accumulated,
            "ranks": args.world_size,
            "images_per_update": images * accumulated * args.world_size,
        },
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "optimizer": None if trainer.optimizer is None else name_of_optimizer(trainer.optimizer),
        "seed": args.seed,
        "arguments": changed_arguments(args),
        "settings": describe_settings(trainer),
    }
    sharded = getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False)
    if args.world_size > 1 and not sharded:
        described["sync"] = {"method": "DistributedDataParallel"}
    return described


def describe_data(dataset: Any) -> dict[str, Any]:
    """Return name, split and number of images or shards of a data set; `None` for each that is not known."""
    split = getattr(dataset, "split", None)
    try:
        count = len(dataset)
    except TypeError:  # a stream
        count = None
    return {
        "name": getattr(getattr(dataset, "info", None), "dataset_name", None),
        "split": None if split is None else str(split),
        "num_images": count,
        "num_shards": getattr(dataset, "num_shards", None),
    }


def describe_hardware(args: TrainingArguments) -> dict[str, Any]:
    """Return the device of this rank, the number of ranks and the number of CPU cores of this machine."""
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": device.type, "device_name": name, "ranks": args.world_size, "cpu_count": os.cpu_count()}


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that concern the training and differ from their defaults."""
    defaults = {field.name: field.default for field in _training_fields(args)}
    values = {name: getattr(args, name) for name in defaults}
    return {name: value for name, value in values.items() if value is not None and value != defaults[name]}


def describe_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the arguments that concern the training, defaults among them, and the fields of the views."""
    args = trainer.args
    names = [*(field.name for field in _training_fields(args)), *_BATCH_FIELDS]
    settings = {name: getattr(args, name) for name in names}
    # `auto_find_batch_size` may have lowered that of the arguments.
    settings["per_device_train_batch_size"] = trainer._train_batch_size // max(args.n_gpu, 1)
    settings["views"] = _describe_views(trainer.train_dataset)
    settings["support_views"] = _describe_views(getattr(trainer, "support_dataset", None))
    return settings


def _describe_views(dataset: Any) -> dict[str, Any]:
    """Return the class of the transform of a data set, its fields, and what else decides about the views."""
    transform = getattr(dataset, "transform", None)
    if transform is None:
        return {}
    fields = dataclasses.fields(transform) if dataclasses.is_dataclass(transform) else ()
    return {
        "transform": type(transform).__name__,
        **{field.name: getattr(transform, field.name) for field in fields},
        "views_per_image": getattr(dataset, "views_per_image", None),
        "view_seed": getattr(dataset, "seed", None),
        "shuffle_buffer": getattr(dataset, "shuffle_buffer", None),
    }


def find_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that differ between two records, each as `before` and `after`.

    Of views, only what both have is compared: records of earlier versions have less.
    """
    pairs = {name: (there.get(name), here.get(name)) for name in sorted((there.keys() | here.keys()) - _VIEWS.keys())}
    for part, prefix in _VIEWS.items():
        before, after = there.get(part, {}), here.get(part, {})
        pairs |= {f"{prefix}{name}": (before[name], after[name]) for name in before if name in after}
    return {name: {"before": old, "after": new} for name, (old, new) in pairs.items() if old != new}


def _training_fields(args: TrainingArguments) -> list[dataclasses.Field]:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - _TRAINING_FIELDS
    return [field for field in dataclasses.fields(args) if field.name not in inherited]


def write_run(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write the known fields of a record as `run.json`; see [`public_run`]."""
    record = {**record, "versions": package_versions(_PACKAGES)}
    write_json(Path(folder, RUN_FILE), {"format": _FORMAT, **public_run(record)})


def read_run(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return the `run.json` of a folder, reduced by [`public_run`], or `None` if there is none."""
    path = Path(folder, RUN_FILE)
    if not path.is_file():
        return None
    record = read_json(path)
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != _FORMAT:
        raise ValueError(
            f"'{path}' must have the format '{_FORMAT}', but has {found!r}. Remove it, or save the model again."
        )
    return public_run(record)


def public_run(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that may be published.

    Only known fields remain, with numbers and with text that is reduced by `public_name`. In a recipe and in arguments
    text remains only under a known name: no token, user name or output folder can be among them.
    """
    reduced = {name: _public(record.get(name), name not in _SETTINGS) for name in _FIELDS}
    return {name: value for name, value in reduced.items() if value not in (None, {})}


def _public(value: Any, keeps_text: bool) -> Any:
    """Return the part of a value that may be published; `None` if there is none."""
    value = getattr(value, "value", value)  # an enum of transformers
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, os.PathLike)):
        return public_name(value) if keeps_text else None
    if isinstance(value, (list, tuple)):
        return [item for item in (_public(item, keeps_text) for item in value) if item is not None]
    if isinstance(value, Mapping):
        items = {name: _public(item, keeps_text or name in _TEXT_SETTINGS) for name, item in value.items()}
        return {n: item for n, item in items.items() if item is not None and not n.startswith(_NOT_SETTINGS)}
    return None


def cpu_name() -> str | None:
    """Return the model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or None
