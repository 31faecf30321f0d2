"""Push the model of a run to the Hub while it is trained: the listed files only, in the background."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, hf_hub_download
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ...hub.publish import HubRepository, ListedFile, PublishingError, list_files, list_resume_files
from ..checkpoints import find_config_differences
from .low_shot import LowShotCallback

logger = logging.get_logger(__name__)

_STAGING = ".pushing"


class PushCallback(TrainerCallback):
    """Push the pretraining model to the Hub as [`publish_checkpoint`] does.

    `hub_strategy`: `"end"` pushes when the model is saved at the end; `"every_save"` (the default) also the model of
    each checkpoint; `"checkpoint"` also the files from which a run is resumed, in `last-checkpoint/`;
    `"all_checkpoints"` those of each checkpoint, in `checkpoint-<step>/`.

    Rank 0 pushes. A checkpoint is uploaded in the background. A push that fails does not stop the training: it logs a
    warning, and [`~PushCallback.push_model`] raises at the end if something is still missing on the Hub.

    Args:
        trainer (`Trainer`): The trainer whose model is pushed.
        private (`bool`, *optional*): Visibility of a new repo, by default `hub_private_repo`.
        token (`str`, *optional*): By default `hub_token`.

    Raises:
        ValueError: If `hub_model_id` is not valid.
        PublishingError: If there is no token, the Hub refuses, or the repo holds another model.
    """

    def __init__(self, trainer: Trainer, private: bool | None = None, token: str | None = None):
        args = trainer.args
        self.trainer = trainer
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        self.repository = HubRepository(name, args.hub_revision, private, token or args.hub_token)
        self.repository.open()
        self._check_same_configuration()
        shutil.rmtree(self._staging, ignore_errors=True)  # left by a killed run
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="push_to_hub")
        self._upload: Future | None = None
        self._skipped: Path | None = None
        self._missing: dict[str, str] = {}  # folder of the repo -> the error of its last push

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and args.hub_strategy != HubStrategy.END:
            self._push_checkpoint(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_end(self, args, state, control, **kwargs):
        self._wait()

    def push_model(self, folder: Path, message: str, blocking: bool = True, **card) -> CommitInfo | Future:
        """Push the model that is saved in `folder`. For the arguments see [`PretrainingTrainer.push_to_hub`]."""
        self._wait()
        files = self._list_files(folder, **card)
        self._upload = self._executor.submit(self._push_last, files, message, folder)
        return self._upload.result() if blocking else self._upload

    @property
    def _staging(self) -> Path:
        return Path(self.trainer.args.output_dir, _STAGING)

    def _check_same_configuration(self) -> None:
        """Raise a [`PublishingError`] if the repo holds a model of another configuration."""
        repository = self.repository
        if "config.json" not in repository.files():
            return
        with tempfile.TemporaryDirectory() as folder:
            source = {"revision": repository.revision, "token": repository.api.token, "local_dir": folder}
            hf_hub_download(repository.repo_id, "config.json", **source)
            differences = find_config_differences(folder, self.trainer.model.config)
        if differences:
            raise PublishingError(
                f"'{repository.repo_id}' ({repository.revision}) must be empty or hold a model of this configuration, "
                f"but holds another: {differences}. Give another `hub_model_id` or `hub_revision`. Nothing was sent."
            )

    def _push_checkpoint(self, checkpoint: Path) -> None:
        args = self.trainer.args
        if self._upload is not None and not self._upload.done() and not args.hub_always_push:
            self._skipped = checkpoint  # pushed at the end, unless a later one is
            return
        self._skipped = None
        name = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        folders = ["", name[args.hub_strategy]] if args.hub_strategy in name else [""]
        staging = self._staging / checkpoint.name
        try:
            shutil.copytree(checkpoint, staging, copy_function=_link)  # it may be rotated away before the upload ends
            files = self._list_files(staging)
            for folder in folders[1:]:
                files += list_resume_files(staging, folder)
        except (OSError, ValueError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            self._note_failure(checkpoint, folders, error)
            return
        message = f"Training in progress, {checkpoint.name}"
        self._upload = self._executor.submit(self._push_in_background, files, message, folders, checkpoint, staging)

    def _push_in_background(
        self, files: list[ListedFile], message: str, folders: Sequence[str], checkpoint: Path, staging: Path
    ) -> None:
        try:
            self.repository.commit(files, message, folders)
            for folder in folders:
                self._missing.pop(folder, None)
        except PublishingError as error:
            self._note_failure(checkpoint, folders, error)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _note_failure(self, checkpoint: Path, folders: Sequence[str], error: Exception) -> None:
        self._missing.update(dict.fromkeys(folders, str(error)))
        logger.warning(f"'{checkpoint}' was not pushed, and the training continues: {error}")

    def _push_last(self, files: list[ListedFile], message: str, folder: Path) -> CommitInfo:
        repository = self.repository
        try:
            commit = repository.commit(files, message)
        except PublishingError as error:
            raise PublishingError(
                f"{error} The model is saved. To push it: hf-msn publish --checkpoint {folder} --repo_id "
                f"{repository.repo_id} --revision {repository.revision} --what pretraining --update true"
            ) from None
        self._missing.pop("", None)
        if self._missing:
            missing = "; ".join(f"{name}/: {error}" for name, error in self._missing.items())
            raise PublishingError(
                f"'{repository.repo_id}' holds the model, but not all checkpoints, whose pushes failed during the "
                f"training: {missing}. Send those that are still in `output_dir` by `hf upload`."
            )
        return commit

    def _wait(self) -> None:
        """Wait for the upload, and push the checkpoint that was skipped meanwhile."""
        if self._upload is not None:
            self._upload.exception()
        if self._skipped is not None and self._skipped.is_dir():
            self._upload = None
            self._push_checkpoint(self._skipped)
            self._wait()

    def _list_files(self, folder: Path, **card: Any) -> list[ListedFile]:
        """List the model of a folder, with the results of a low-shot evaluation of the present step."""
        card = {"repo_id": self.repository.repo_id, **card}
        with tempfile.TemporaryDirectory() as place, torch.random.fork_rng(devices=[]):
            results = card.pop("results", None) or list(self._save_results(Path(place)))
            settings = {"what": "pretraining", "without_results": not results, "results": results}
            return list_files(folder, Path(place), **settings, **card)

    def _save_results(self, folder: Path) -> Iterator[Path]:
        for number, callback in enumerate(self.trainer.callback_handler.callbacks):
            is_of_this_step = getattr(callback, "last_step", None) == self.trainer.state.global_step
            if isinstance(callback, LowShotCallback) and is_of_this_step and callback.evaluator.results is not None:
                callback.evaluator.results.save(folder / f"{number}.json")
                yield folder / f"{number}.json"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
