"""Checkpoints that are whole or absent: how they are written, and which of a run's are fit to resume from."""

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..evaluation.weights_hash import file_sha256
from ..files import CHECKSUMS_FILE, format_checksums, read_checksums, read_json, write_text
from ..models.pretrained_encoders import own_fields
from ..optim.by_name import names_of_settings

logger = logging.get_logger(__name__)

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
STAGING_FOLDER = ".incomplete"


class CheckpointError(OSError):
    """A checkpoint could not be written or is not fit to resume from."""


@contextmanager
def staging_folder(trainer: Trainer, folder: Path, name: str = "") -> Iterator[Path]:
    """Yield a folder inside `folder` for all ranks to save into. The block moves what it wants to keep out of it.

    If it fails, the [`CheckpointError`] has the cause, the free space and the last whole checkpoint.
    """
    staging = folder / STAGING_FOLDER
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
    trainer.accelerator.wait_for_everyone()
    try:
        yield staging
    except Exception as error:
        present = list_checkpoints(trainer.args.output_dir)
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise CheckpointError(
            f"Saving '{folder / name}' failed: {error}. {free / 2**20:.0f} MiB are free on that disk. "
            + (f"The earlier checkpoint '{present[-1]}' is as it was; " if present else "")
            + "free some space or lower `save_total_limit`, then resume."
        ) from error
    finally:
        if trainer.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)


class WholeCheckpointMixin:
    """Writes each checkpoint of a Trainer beside its place, with the checksums of its files, and then renames it.

    A folder `checkpoint-<step>` is always whole. Put the mixin before the trainer class.
    """

    _staging: Path | None = None

    def add_to_checkpoint(self, folder: Path) -> None:
        """Write further files into a checkpoint. One rank calls it."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with staging_folder(self, run_dir, name) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.add_to_checkpoint(staging / name)
                write_checksums(staging / name)
                shutil.rmtree(run_dir / name, ignore_errors=True)  # of an earlier run, with overwrite_output_dir
                os.replace(staging / name, run_dir / name)
                rotate_checkpoints(
                    output_dir=str(run_dir),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                )
            self.accelerator.wait_for_everyone()


@contextmanager
def own_settings_kept(trainer: Trainer) -> Iterator[None]:
    """Keep the settings of the optimizer and of the learning rate while the block loads the states of a checkpoint.

    The states hold them too, and would silently replace those of this run.
    """
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    names = names_of_settings(type(getattr(optimizer, "optimizer", optimizer))) - {"lr"}
    settings = [{name: group[name] for name in names & set(group)} for group in optimizer.param_groups]
    learning_rates = [*scheduler.base_lrs] if isinstance(scheduler, LambdaLR) else None
    yield
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    if learning_rates is not None:
        scheduler.base_lrs = learning_rates
        for group, initial, factor in zip(optimizer.param_groups, learning_rates, scheduler.lr_lambdas):
            group.update(initial_lr=initial, lr=initial * factor(scheduler.last_epoch))
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # for the log


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders `checkpoint-<step>` of a run, earliest step first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the latest whole checkpoint of a run, if any. Each broken one is skipped with a warning that names it."""
    for abandoned in sorted(Path(output_dir, STAGING_FOLDER).glob("checkpoint-*")):
        logger.warning(f"Skipping '{abandoned}': the run was stopped while it was writing this checkpoint.")
    for path in reversed(list_checkpoints(output_dir)):
        fault = find_fault(path)
        if fault is None:
            return path
        logger.warning(f"Skipping the broken checkpoint '{path}': {fault}.")
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint folder to resume from, or `None` for a new run. See [`PretrainingTrainer.train`]."""
    asked_for = str(resume_from_checkpoint or False).lower()  # also the words of a recipe
    if asked_for == "false":
        return None
    if asked_for in ("true", "auto"):
        last = find_last_checkpoint(output_dir)
        if last is None and asked_for == "true":
            raise CheckpointError(
                f"'{output_dir}' has no whole checkpoint to resume from. Start without `resume_from_checkpoint`."
            )
        return None if last is None else str(last)
    fault = find_fault(resume_from_checkpoint)
    if fault is not None:
        raise CheckpointError(
            f"Cannot resume from '{resume_from_checkpoint}': {fault}. Give another checkpoint, or "
            "`resume_from_checkpoint=True` for the last whole one."
        )
    return str(resume_from_checkpoint)


def check_output_dir(output_dir: str | Path) -> None:
    """Raise a `ValueError` if `output_dir` holds the checkpoints or the model of an earlier run."""
    present = list_checkpoints(output_dir)
    if present or Path(output_dir, "model.safetensors").exists():
        found = f"checkpoints up to '{present[-1].name}'" if present else "a model"
        raise ValueError(
            f"`output_dir` must not hold an earlier run, but '{output_dir}' has {found}. Resume with "
            "`resume_from_checkpoint=True`, start from scratch with `overwrite_output_dir=True`, or choose another."
        )


def write_checksums(checkpoint: str | Path) -> None:
    """Write the SHA-256 of every file of a checkpoint into it."""
    files = sorted(file for file in Path(checkpoint).iterdir() if file.is_file())
    write_text(Path(checkpoint, CHECKSUMS_FILE), format_checksums({file.name: file_sha256(file) for file in files}))


def find_fault(checkpoint: str | Path) -> str | None:
    """Return why a run cannot resume from a folder, or `None` if it can. Reads every file to verify its checksum."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    weights = sorted(checkpoint.glob("*.safetensors"))
    rng_states = sorted(checkpoint.glob("rng_state*.pth"))
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *rng_states]
    if any(checkpoint.glob("sync_state_*.pt")):  # each rank that trained locally has one
        states += [checkpoint / f"sync_state_{rank}.pt" for rank in range(saved_world_size(checkpoint))]
    for file in (checkpoint / "trainer_state.json", checkpoint / "config.json", *states):
        if not file.is_file():
            return f"'{file.name}' is missing"
    if not weights:
        return "'model.safetensors' is missing"
    if not rng_states:
        return "'rng_state.pth' is missing (was it saved with `save_only_model`?)"
    for name, sha256 in read_checksums(checkpoint).items():  # earlier versions have none; a broken line has no name
        file = checkpoint / name
        if not name or (file.is_file() and file_sha256(file) != sha256):
            return f"'{name or CHECKSUMS_FILE}' is damaged (its SHA-256 is not that of '{CHECKSUMS_FILE}')"
    try:
        read_json(checkpoint / "config.json")
        step = read_json(checkpoint / "trainer_state.json")["global_step"]
    except (ValueError, KeyError, TypeError) as error:
        return f"a JSON file is damaged ({error})"
    named = _CHECKPOINT.match(checkpoint.name)
    if named and step != int(named.group(1)):
        return f"'trainer_state.json' is of step {step}"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"'{file.name}' is damaged ({error})"
    for file in states:
        if not zipfile.is_zipfile(file):
            return f"'{file.name}' is damaged (its end is missing)"
    return None


def find_config_differences(folder: str | Path, config: PreTrainedConfig) -> str | None:
    """Return how the configuration in a folder differs from `config`, or `None` if a model of one fits the other."""
    model_type = read_json(Path(folder, "config.json")).get("model_type")
    if model_type != config.model_type:
        return f"model_type {model_type} there, {config.model_type} here"
    there = type(config).from_pretrained(folder)
    names = own_fields(there).keys() & own_fields(config).keys()
    names -= {"nt_xent_tile_size"}  # the same loss
    differing = sorted(name for name in names if getattr(there, name) != getattr(config, name))
    return ", ".join(f"{n} {getattr(there, n)} there, {getattr(config, n)} here" for n in differing[:5]) or None


def saved_world_size(checkpoint: str | Path) -> int:
    """Return the number of ranks that wrote a checkpoint: each saves the state of its random number generators."""
    return max(1, len(list(Path(checkpoint).glob("rng_state_*.pth"))))
