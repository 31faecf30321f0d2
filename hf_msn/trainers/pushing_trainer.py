"""A Trainer that pushes to the Hub what a user of the model needs, and nothing else of its `output_dir`."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo, RepoFile, hf_hub_download
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..hub.cards import save_model_card
from ..hub.upload.errors import PublishingError, in_plain_words
from ..hub.upload.private_data import PrivateData
from ..hub.upload.repository import HubRepository
from ..hub.upload.staging import PlannedFile, link_or_copy, stage_checkpoint, stage_resumable
from .callbacks.low_shot import LowShotCallback
from .checkpoints import find_config_differences
from .local_update_mixin import LocalUpdateTrainerMixin

logger = logging.get_logger(__name__)

PUSHING_FOLDER = ".pushing"
LAST_CHECKPOINT = "last-checkpoint"


class PushingTrainer(LocalUpdateTrainerMixin, Trainer):
    """With `push_to_hub`, puts the pretraining model on the Hub as [`publish_checkpoint`] does: the listed files only.

    `hub_strategy`: `"end"` pushes when the model is saved at the end; `"every_save"` (the default) each checkpoint's
    model too; `"checkpoint"` also what a run needs to go on from it, in `last-checkpoint/`; `"all_checkpoints"` that
    of each, in `checkpoint-<step>/`. The latter two hold optimizer and generators, never `training_args.bin`.

    Rank 0 pushes. A checkpoint goes up in the background; where that fails training goes on, with a warning. What is
    still not there at the end is an error, once the model is saved.
    """

    push_in_progress: Future | None = None
    _repository: HubRepository | None = None
    _skipped: Path | None = None

    # Before training

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Finds or makes the repo `hub_model_id`, by default named as `output_dir`.

        Raises:
            ValueError: If that is no name of a repo.
            PublishingError: On all ranks: no token, a refusal, or a repo that holds another model.
        """
        outcome: list = [None, None]
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir, PUSHING_FOLDER), ignore_errors=True)  # of a killed run
            try:
                outcome[0] = self._open_repository(token, private).repo_id
            except (ValueError, PublishingError) as error:
                outcome[1] = error
        error = broadcast_object_list(outcome)[1]
        if error is not None:
            raise error
        self.hub_model_id = outcome[0]
        self._missing: dict[str, str] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="push_to_hub")

    def _open_repository(self, token: str | None, private: bool | None) -> HubRepository:
        args = self.args
        repository = HubRepository(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            args.hub_revision,
            args.hub_private_repo if private is None else private,
            token or args.hub_token,
        )
        repository.check_token()
        repository.prepare(lambda present: self._check_repo_fits(repository, present))
        self._repository = repository
        return repository

    def _check_repo_fits(self, repository: HubRepository, present: dict[str, RepoFile]) -> None:
        where = f"'{repository.repo_id}' ({repository.revision})"
        remedy = "Give another `hub_model_id` or `hub_revision`. Nothing was sent."
        if "config.json" not in present:
            raise PublishingError(f"{where} holds other files already, such as {min(present)}. {remedy}")
        with tempfile.TemporaryDirectory() as folder:
            where_from = {"revision": repository.revision, "token": repository.token, "local_dir": folder}
            with in_plain_words(repository.repo_id, repository.api.endpoint):
                hf_hub_download(repository.repo_id, "config.json", **where_from)
            differing = find_config_differences(folder, self.model.config)
        if differing:
            raise PublishingError(f"{where} holds another model already: {differing}. {remedy}")
        logger.warning(
            f"{where} holds a model of this configuration already, which this run replaces; the history keeps it."
        )

    # What goes up

    def create_model_card(self, **kwargs) -> None:
        """Writes the card of the saved model into `output_dir`; `kwargs` are those of [`save_model_card`]."""
        if self.is_world_process_zero():
            settings = {"repo_id": self.hub_model_id, "without_results": not kwargs.get("results"), **kwargs}
            save_model_card(self.args.output_dir, **settings)

    @contextmanager
    def _low_shot_results(self, step: int) -> Iterator[list[Path]]:
        """The result file of an evaluation of the weights of a step, if there was one."""
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for callback in self.callback_handler.callbacks:
                results = getattr(getattr(callback, "evaluator", None), "results", None)
                if isinstance(callback, LowShotCallback) and results is not None and callback.last_step == step:
                    files.append(Path(folder, f"low_shot_{len(files)}.json"))
                    results.save(files[-1])
            yield files

    def _stage(self, saved: Path, staging: Path, step: int, in_repo: str = "", **card) -> list[PlannedFile]:
        """Lays out the model that is saved at a step, and what a run needs to go on, where `in_repo` names a place."""
        repository = self._repository
        private = PrivateData(
            [repository.token, self.args.hub_token],
            [Path(self.args.output_dir), saved],
            namespace=repository.repo_id.split("/")[0],
        )
        settings = {"what": "pretraining", "private": private, "repo_id": repository.repo_id, "link": link_or_copy}
        root = staging / "root"
        with self._low_shot_results(step) as results, generators_kept():
            root.mkdir(parents=True)
            results = card.pop("results", results)
            try:
                files = stage_checkpoint(saved, root, results=results, without_results=not results, **settings, **card)
            except ValueError as error:
                if not results:
                    raise
                logger.warning(f"The card gets no numbers of the evaluation in training: {error}")
                shutil.rmtree(root)
                root.mkdir()
                files = stage_checkpoint(saved, root, without_results=True, **settings, **card)
        if in_repo:
            (staging / "resumable").mkdir()
            files += stage_resumable(saved, staging / "resumable", in_repo, private=private, link=link_or_copy)
        return files

    # Pushes

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        checkpoint = Path(checkpoint_folder)
        in_repo = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(
            self.args.hub_strategy, ""
        )
        if self._is_pushing() and not self.args.hub_always_push:
            self._skipped = checkpoint
            logger.info(f"'{checkpoint}' is not pushed yet, as the push before it goes on.")
            return
        self._skipped = None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        staging = Path(self.args.output_dir, PUSHING_FOLDER, checkpoint.name)
        shutil.rmtree(staging, ignore_errors=True)
        folders = ["", in_repo] if in_repo else [""]
        try:
            files = self._stage(checkpoint, staging, int(checkpoint.name.split("-")[1]), in_repo)
        except Exception as error:  # no push is worth a training
            shutil.rmtree(staging, ignore_errors=True)
            self._note_failure(checkpoint.name, folders, error)
            return
        message = f"Training in progress, {checkpoint.name}"
        self.push_in_progress = self._executor.submit(
            self._push_in_background, files, message, folders, staging, checkpoint.name
        )

    def _push_in_background(self, files, message: str, folders: Sequence[str], staging: Path, name: str) -> None:
        try:
            self._repository.upload(files, message, folders)
        except Exception as error:  # no push is worth a training
            self._note_failure(name, folders, error)
        else:
            for folder in folders:
                self._missing.pop(folder, None)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with suppress(OSError):  # another waits
                staging.parent.rmdir()

    def _note_failure(self, name: str, folders: Sequence[str], error: Exception) -> None:
        self._missing.update(dict.fromkeys(folders, name))
        logger.warning(f"'{name}' could not be pushed to '{self.hub_model_id}', and training goes on: {error}")

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.done()

    def _finish_current_push(self) -> None:
        if self._is_pushing():
            logger.info("Waiting for the push of the last checkpoint to the Hub.")
            self.push_in_progress.result()
        if self._skipped is not None and self._skipped.is_dir():
            self._push_from_checkpoint(str(self._skipped))
            self._finish_current_push()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """Saves the model to `output_dir` and pushes it, with its card.

        Args:
            commit_message (`str`, *optional*): Of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Wait for it; else return a `Future`.
            token (`str`, *optional*), private (`bool`, *optional*): Of a repo that is not open yet.
            revision (`str`, *optional*): Must be `hub_revision`, where it is given.
            kwargs: `results`, `figures`, `license` and `tags` of the card.

        Raises:
            PublishingError: On rank 0, if this push failed, or an earlier one that it does not make good. The model is
                saved.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_whole_model(Path(self.args.output_dir))
        return self.push_saved(Path(self.args.output_dir), commit_message, blocking, revision=revision, **kwargs)

    def save_whole_model(self, output_dir: Path) -> None:
        """Saves the model on all ranks, without a push."""
        self.save_model(str(output_dir), _internal_call=True)

    def push_saved(
        self, folder: Path, commit_message: str | None, blocking: bool = True, revision: str | None = None, **card
    ) -> CommitInfo | Future | None:
        """Pushes the model that is saved in `folder`, from rank 0."""
        if not self.is_world_process_zero():
            return None
        if revision not in (None, self._repository.revision):
            raise ValueError(
                f"`revision` is '{revision}', but this run's `hub_revision` is '{self._repository.revision}'."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        staging = Path(self.args.output_dir, PUSHING_FOLDER, "model")
        shutil.rmtree(staging, ignore_errors=True)
        try:
            files = self._stage(folder, staging, self.state.global_step, **card)
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self.push_in_progress = self._executor.submit(
            self._push_at_the_end, files, commit_message or "Push", staging, folder
        )
        return self.push_in_progress.result() if blocking else self.push_in_progress

    def _push_at_the_end(self, files, message: str, staging: Path, folder: Path) -> CommitInfo:
        try:
            commit = self._repository.upload(files, message)
        except PublishingError as error:
            where = f"--repo_id {self.hub_model_id} --revision {self._repository.revision}"
            raise PublishingError(
                f"{error} The model is saved in '{folder}'. To push it: python scripts/publish.py --checkpoint "
                f"{folder} {where} --what pretraining --update true"
            ) from None
        finally:
            shutil.rmtree(staging.parent, ignore_errors=True)
        self._missing.pop("", None)
        if self._missing:
            listed = ", ".join(f"{folder}/ of '{name}'" for folder, name in self._missing.items())
            raise PublishingError(
                f"The model is in '{self.hub_model_id}', but pushes in the middle of training failed, and {listed} is "
                f"not there. What is still in '{self.args.output_dir}' can be sent by `hf upload`."
            )
        return commit

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        token, self.args.hub_token = self.args.hub_token, None  # training_args.bin would hold it
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves torch's generator as it was: a run that pushes must draw what one that does not draws."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
