"""Base of the trainers whose target is a moving average: MSN and BYOL."""

from ..data.datasets import MultiViewCollator
from ..models.modeling_pretraining import TargetModel
from .callbacks.update_target import UpdateTargetCallback
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
        super().__init__(model, args, data_collator=data_collator or MultiViewCollator(), **kwargs)
        if args.compile_encoder:
            self.model.compile_encoders()
        self.add_callback(UpdateTargetCallback(self.ema_momentum_now))

    def ema_momentum_now(self) -> float:
        """Return the momentum of the target for the next update."""
        raise NotImplementedError

    def check_before_training(self) -> None:
        super().check_before_training()
        self.check_view_sizes()
        if self.model.config.projection_batch_norm and self._train_batch_size < 2:
            raise ValueError(
                f"`per_device_train_batch_size` is {self._train_batch_size}, but batch normalisation "
                "in the projection head needs at least 2 images per batch. Raise it, or set `projection_batch_norm` "
                "to False."
            )
