"""The Trainer of Masked Siamese Networks (arXiv 2204.07141)."""

import math

import torch
from transformers.utils import logging

from ..data.datasets import MultiViewCollator
from ..distributed.collectives import all_reduce_sum
from ..models.modeling_msn import MSNForPreTraining
from ..schedules import linear
from .callbacks.update_target import UpdateTargetCallback
from .msn_arguments import MSNTrainingArguments
from .pretraining_trainer import PretrainingTrainer

logger = logging.get_logger(__name__)


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
        self._num_targets = 0
        self._prototypes_used = torch.zeros(model.config.num_prototypes, dtype=torch.bool, device=args.device)
        self._warned_of_collapse = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "sharpen_temperature": self.sharpen_temperature_now()}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.model.training:
            target = outputs.target_probabilities
            self._prototypes_used[target.argmax(dim=-1)] = True
            self._num_targets += len(target) * self.args.world_size
            self.record(
                cross_entropy=outputs.cross_entropy,
                me_max=outputs.me_max,
                entropy=outputs.entropy,
                mean_max_target_probability=target.amax(dim=-1).mean(),
            )
        return (loss, outputs) if return_outputs else loss

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "prototypes_in_use" in logs and self.args.collapse_warning and not self._warned_of_collapse:
            warning = describe_collapse(logs, self.model.config.num_prototypes, self._num_targets)
            self._num_targets = 0
            if warning and self.args.should_log:
                logger.warning(f"At step {self.state.global_step}: {warning}")
                self._warned_of_collapse = True

    def check_before_training(self) -> None:
        super().check_before_training()
        self.check_view_sizes()
        if self.model.config.projection_batch_norm and self._train_batch_size < 2:
            raise ValueError(
                f"`per_device_train_batch_size` is {self._train_batch_size}, but batch normalisation "
                "in the projection head needs at least 2 images per batch. Raise it, or set `projection_batch_norm` "
                "to False."
            )


def describe_collapse(logs: dict[str, float], num_prototypes: int, num_targets: int) -> str | None:
    """Return the symptom and the remedy if the assignments have collapsed, else `None`."""
    if num_prototypes == 1 or num_targets < 32:  # few images cannot use many prototypes
        return None
    used, confidence = logs["prototypes_in_use"], logs["mean_max_target_probability"]
    if used <= max(1, min(num_prototypes, num_targets) // 100):
        return (
            f"only {used:.0f} of {num_prototypes} prototypes are the target of any image (me_max {logs['me_max']:.3f} "
            f"of at most {math.log(num_prototypes):.3f}): the images collapse onto few prototypes. Use Sinkhorn "
            "(`use_sinkhorn`), raise `me_max_weight` (the paper has 5 without Sinkhorn), or enlarge the batch."
        )
    if confidence < 1.5 / num_prototypes:
        return (
            f"the largest target probability is {confidence:.2e} on average, hardly more than 1 / {num_prototypes}: "
            "all images get the same flat assignment. Lower `sharpen_temperature` or `temperature`, lower "
            "`learning_rate`, or lower `ema_momentum` if the run is short."
        )
    return None
