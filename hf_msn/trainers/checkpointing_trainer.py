"""A Trainer whose checkpoints are whole or not there, and that goes on from exactly what it was."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..hub.cards import save_model_card
from .callbacks.push import PushCallback
from .checkpoints import (
    STAGING_FOLDER,
    CheckpointError,
    find_config_differences,
    find_fault,
    find_last_checkpoint,
    list_checkpoints,
    saved_world_size,
    staging_folder,
)
from .local_update_mixin import LocalUpdateTrainerMixin

logger = logging.get_logger(__name__)


class CheckpointingTrainer(LocalUpdateTrainerMixin, Trainer):
    """Writes each checkpoint beside and then renames it, so that a folder `checkpoint-<step>` is always whole.

    Resuming finds the last whole checkpoint, names the broken ones, and refuses one of another configuration.
    """

    _staging = False

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Around what must not count as training time."""
        yield

    def check_before_saving(self) -> None:
        """Raises where what would be saved is not worth going on from."""

    def _check_output_dir(self) -> None:
        present = list_checkpoints(self.args.output_dir)
        if present or Path(self.args.output_dir, "model.safetensors").exists():
            what = (
                f"checkpoints of an earlier run, the last of them '{present[-1].name}'"
                if present
                else ("the model of an earlier run")
            )
            raise ValueError(
                f"`output_dir` '{self.args.output_dir}' has {what}. Go on from a checkpoint with "
                "`resume_from_checkpoint=True`, start anew with `overwrite_output_dir=True`, or choose another "
                "`output_dir`."
            )

    def _forget_earlier_replicas(self) -> None:
        """Remove what an earlier run recorded about its replicas: another model takes its place."""
        if self.args.should_save:
            Path(self.args.output_dir, "codistillation.json").unlink(missing_ok=True)

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_FOLDER) if self._staging else run_dir

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Open the repo `hub_model_id`, to which [`PushCallback`] then pushes."""
        if self.is_world_process_zero():
            self.push = PushCallback(self, private, token)
            self.add_callback(self.push)
            self.hub_model_id = self.push.repository.repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: [`PushCallback`] pushes a checkpoint when it is whole."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        private: bool | None = None,
        **card,
    ) -> CommitInfo | Future | None:
        """Save the model to `output_dir` and push it with its card. All ranks must call it.

        Args:
            commit_message (`str`, *optional*): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Wait for the upload; else return a `Future`.
            token (`str`, *optional*), private (`bool`, *optional*): For a repo that is not open yet.
            card: `results`, `figures`, `license` and `tags` of the card.

        Raises:
            PublishingError: On rank 0, if the push failed. The model is saved.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_whole_model(Path(self.args.output_dir))
        if self.is_world_process_zero():
            return self.push.push_model(Path(self.args.output_dir), commit_message, blocking, **card)

    def create_model_card(self, **card) -> None:
        """Write the card of the saved model into `output_dir`. The arguments are those of [`save_model_card`]."""
        if self.is_world_process_zero():
            save_model_card(self.args.output_dir, **{"without_results": not card.get("results"), **card})

    def _save_checkpoint(self, model, trial) -> None:
        with self.clock_stopped():
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model, trial) -> None:
        self.check_before_saving()
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        try:
            with staging_folder(self, run_dir, name) as staging:
                self._staging = True
                super()._save_checkpoint(model, trial)
                self._correct_best_checkpoint(run_dir, staging, name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    shutil.rmtree(run_dir / name, ignore_errors=True)  # of an earlier run, with overwrite_output_dir
                    os.replace(staging / name, run_dir / name)
        finally:
            self._staging = False
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, but each file appears whole or not at all."""
        if _internal_call:  # a checkpoint, which is renamed as a whole
            return super().save_model(output_dir, _internal_call=True)
        final = Path(output_dir or self.args.output_dir)
        self.save_whole_model(final)
        if self.args.push_to_hub and self.is_world_process_zero():
            self.push.push_model(final, "Model save")

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        token, self.args.hub_token = self.args.hub_token, None  # it would be in training_args.bin
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def save_whole_model(self, final: Path) -> None:
        with staging_folder(self, final) as staging:
            super().save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                for file in staging.iterdir():
                    os.replace(file, final / file.name)

    def _correct_best_checkpoint(self, run_dir: Path, staging: Path, name: str) -> None:
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))

    def _resolve_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if resume_from_checkpoint is None:
            return None
        if resume_from_checkpoint in (True, "auto"):
            checkpoint = find_last_checkpoint(self.args.output_dir)
            if checkpoint is None and resume_from_checkpoint == "auto":
                return None
            if checkpoint is None:
                raise CheckpointError(
                    f"'{self.args.output_dir}' has no whole checkpoint to resume from. Start without "
                    "`resume_from_checkpoint`."
                )
        else:
            checkpoint = resume_from_checkpoint
            fault = find_fault(checkpoint)
            if fault is not None:
                raise CheckpointError(
                    f"Cannot resume from '{checkpoint}': {fault}. Give another checkpoint, or "
                    "`resume_from_checkpoint=True` for the last whole one."
                )
        saved, now = saved_world_size(checkpoint), self.args.world_size
        if saved != now:
            logger.warning(
                f"'{checkpoint}' was saved by {saved} ranks and goes on with {now}: one update now has "
                f"{self.images_per_update()} images, and the order of the images and the masks differ from those of "
                "the first run. Adapt `per_device_train_batch_size` or `gradient_accumulation_steps` to keep the "
                "batch."
            )
        logger.info(f"Resuming from '{checkpoint}'.")
        return str(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer would load what fits by name and only warn of the rest.
        model = self.model if model is None else model
        differing = find_config_differences(resume_from_checkpoint, model.config)
        if differing:
            raise CheckpointError(
                f"'{resume_from_checkpoint}' is a checkpoint of another configuration: {differing}. Give the same "
                "configuration, or start a new run in another `output_dir`."
            )
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best model from {self.state.best_model_checkpoint}.")
        self._load_from_checkpoint(self.state.best_model_checkpoint)
