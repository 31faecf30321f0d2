"""The Trainer of Masked Siamese Networks (arXiv 2204.07141)."""

import torch

from ..data.datasets import MultiViewCollator
from ..distributed.collectives import all_reduce_sum
from ..models.modeling_msn import MSNForPreTraining, MSNForPreTrainingOutput
from ..schedules import linear
from .callbacks.update_target import UpdateTargetCallback
from .msn_arguments import MSNTrainingArguments
from .pretraining_trainer import PretrainingTrainer


class MSNTrainer(PretrainingTrainer):
    """Train an [`MSNForPreTraining`] with the schedules, decay and clip groups, moving average and log of the paper.

    With gradient accumulation, mean-entropy maximisation and Sinkhorn see one micro-batch of all ranks at a time.

    Args:
        model ([`MSNForPreTraining`]): The model to train.
        args ([`MSNTrainingArguments`]): The settings that change over training.
        train_dataset (`torch.utils.data.Dataset`): Items are dicts of views, as [`MultiViewDataset`] returns them.
        data_collator (`Callable`, *optional*): By default [`MultiViewCollator`].
        kwargs: As in `transformers.Trainer`. A `processing_class` (the evaluation image processor) is saved with each
            checkpoint.
    """

    arguments_class = MSNTrainingArguments
    model_class = MSNForPreTraining

    def __init__(self, model: MSNForPreTraining, args: MSNTrainingArguments, data_collator=None, **kwargs):
        super().__init__(model, args, data_collator=data_collator or MultiViewCollator(), **kwargs)
        self.model.seed_masks(args.seed)
        if args.compile_encoder:
            self.model.compile_encoders()
        self.add_callback(UpdateTargetCallback(self.ema_momentum_now))
        self._prototypes_used = torch.zeros(model.config.num_prototypes, dtype=torch.bool, device=args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "sharpen_temperature": self.sharpen_temperature_now()}
        return super().compute_loss(model, inputs, return_outputs)

    def values_to_log(self, outputs: MSNForPreTrainingOutput) -> dict[str, torch.Tensor]:
        target = outputs.target_probabilities
        self._prototypes_used[target.argmax(dim=-1)] = True
        return {**super().values_to_log(outputs), "mean_max_target_probability": target.amax(dim=-1).mean()}

    def ema_momentum_now(self) -> float:
        """Return the momentum of the target encoder for the next update: linear over the stretched horizon."""
        return linear(self.stretched_progress(), self.args.ema_momentum, self.args.final_ema_momentum)

    def sharpen_temperature_now(self) -> float:
        """Return T of the targets for the next update: linear over the stretched horizon."""
        start, end = self.args.start_sharpen_temperature, self.args.final_sharpen_temperature
        start = self.model.config.sharpen_temperature if start is None else start
        return linear(self.stretched_progress(), start, start if end is None else end)

    def extra_logs(self) -> dict[str, float]:
        used = int((all_reduce_sum(self._prototypes_used.float()) > 0).sum())
        self._prototypes_used.zero_()
        return {
            **super().extra_logs(),
            "prototypes_in_use": used,
            "ema_momentum": self.ema_momentum_now(),
            "sharpen_temperature": self.sharpen_temperature_now(),
        }

    def check_before_training(self) -> None:
        super().check_before_training()
        self.check_view_sizes()
        self.check_batch_norm()
