"""Base of the trainers whose target is a moving average: MSN and BYOL."""

from transformers import TrainerCallback

from ..models.modeling_pretraining import TargetModel
from .pretraining_arguments import TargetArguments
from .pretraining_trainer import PretrainingTrainer


class TargetTrainer(PretrainingTrainer):
    """Base of [`MSNTrainer`] and [`BYOLTrainer`]: a target that moves after each update, and masks.

    Args:
        model ([`TargetModel`]): The model to train.
        args ([`TargetArguments`]): The settings that change over training.
        train_dataset (`torch.utils.data.Dataset`): Items are dicts of views, as [`MultiViewDataset`] returns them.
        data_collator (`Callable`, *optional*): By default [`MultiViewCollator`].
        kwargs: As in `transformers.Trainer`. A `processing_class` (the evaluation image processor) is saved with each
            checkpoint.
    """

    def __init__(self, model: TargetModel, args: TargetArguments, data_collator=None, **kwargs):
        super().__init__(model, args, data_collator, **kwargs)
        self.add_callback(_UpdateTarget(self))

    def ema_momentum_now(self) -> float:
        """Return the momentum of the target for the next update."""
        raise NotImplementedError

    def check_before_training(self) -> None:
        super().check_before_training()
        if self.model.config.projection_batch_norm and self._train_batch_size < 2:
            raise ValueError(
                f"`per_device_train_batch_size` is {self._train_batch_size}, but batch normalisation "
                "in the projection head needs at least 2 images per batch. Raise it, or set `projection_batch_norm` "
                "to False."
            )


class _UpdateTarget(TrainerCallback):
    """Move the target after each optimizer step. A step that a gradient scaler skips changes nothing."""

    def __init__(self, trainer: TargetTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not optimizer.step_was_skipped:
            model.update_target(self.trainer.ema_momentum_now())
