"""The mixin that gives a callback for local training its part in the methods of a Trainer."""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from .callbacks.local_update import PerRankCallback, bring_to_consensus, find_per_rank_callback


class LocalUpdateTrainerMixin:
    """Calls a callback for local training where the events of a Trainer come too late.

    Put it before the trainer class; without such a callback it changes nothing.

    ```python
    class LocalTrainer(LocalUpdateTrainerMixin, Trainer):
        pass
    ```

    - `evaluate`, `predict` and every checkpoint begin with consensus, also if they are called directly.
    - A checkpoint has the states of the ranks before it is renamed, pushed or counted by `save_total_limit`.
    - A run is resumed from the checkpoint that was given to `train`, in any folder.
    - An error in the training stops the sync object.
    - [`CodistillationCallback`] takes part in the loss, the data loaders and the evaluation. A trainer that overrides
      one of these methods must call `super()`, or come after this mixin.
    """

    @property
    def per_rank_callback(self) -> PerRankCallback | None:
        """The callback for local training on this trainer, or `None`."""
        return find_per_rank_callback(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        callback = self.per_rank_callback
        if callback is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        callback.checkpoint = resume_from_checkpoint or None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException as error:
            callback.finish(error)
            raise

    # Consensus, and the state of each rank in a checkpoint

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        bring_to_consensus(self)
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any):
        bring_to_consensus(self)
        return super().predict(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        bring_to_consensus(self)
        super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str | Path) -> None:
        # Every rank calls it, with the folder in which the checkpoint is staged.
        super()._save_rng_state(output_dir)
        if (callback := self.per_rank_callback) is not None:
            callback.save(output_dir)

    # Replicas

    def compute_loss(self, *args: Any, **kwargs: Any):
        return self._around("compute_loss", super().compute_loss, *args, **kwargs)

    def get_train_dataloader(self):
        return self._around("get_train_dataloader", super().get_train_dataloader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any):
        return self._around("get_eval_dataloader", super().get_eval_dataloader, *args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any):
        return self._around("get_eval_dataloader", super().get_test_dataloader, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        return self._around("evaluation_loop", super().evaluation_loop, *args, **kwargs)

    def images_per_update(self) -> int:
        """Return the images that one optimizer step sees, over all ranks that share the data and micro-batches."""
        args = self.args
        # `auto_find_batch_size` may have lowered the batch of the arguments.
        images = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self._around("images_per_update", lambda: images)

    def support_ranks(self) -> tuple[int, int]:
        """Return the place of this rank among those that share a support, and their number."""
        return self._around("support_ranks", lambda: (self.args.process_index, self.args.world_size))

    def _around(self, name: str, original, *args: Any, **kwargs: Any):
        callback = self.per_rank_callback
        if callback is None:
            return original(*args, **kwargs)
        return getattr(callback, name)(original, *args, **kwargs)
