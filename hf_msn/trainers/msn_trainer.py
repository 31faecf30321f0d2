"""The Trainer of Masked Siamese Networks (arXiv 2204.07141)."""

import torch

from ..distributed.collectives import all_reduce_sum
from ..models.modeling_msn import MSNForPreTraining, MSNForPreTrainingOutput
from ..schedules import linear
from .msn_arguments import MSNTrainingArguments
from .target_trainer import TargetTrainer


class MSNTrainer(TargetTrainer):
    """Train an [`MSNForPreTraining`] with the schedules, decay and clip groups, moving average and log of the paper.

    With gradient accumulation, mean-entropy maximisation and Sinkhorn see one micro-batch of all ranks at a time.

    The arguments are those of [`TargetTrainer`].
    """

    arguments_class = MSNTrainingArguments
    model_class = MSNForPreTraining

    def __init__(self, model: MSNForPreTraining, args: MSNTrainingArguments, data_collator=None, **kwargs):
        super().__init__(model, args, data_collator, **kwargs)
        self._prototypes_used = torch.zeros(len(self.model.prototypes), dtype=torch.bool, device=args.device)

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
