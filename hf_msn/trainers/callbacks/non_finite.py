"""A stop when the loss or a weight is NaN or infinite."""

import math

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from ..checkpoints import find_last_checkpoint


class NonFiniteLossError(ArithmeticError):
    """The loss or a weight became NaN or infinite. The message names the step and the last whole checkpoint."""


class NonFiniteLossCallback(TrainerCallback):
    """Stop the training when a loss or a weight is NaN or infinite, before such weights are saved.

    All ranks stop together, at the next log of the loss or before the next checkpoint. A single rank on a CPU stops at
    once; elsewhere reading each loss would make it wait for the device or for the other ranks.

    Args:
        trainer (`Trainer`): It calls [`observe`] with each loss, and [`check`] before it saves.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._first_step = torch.tensor(math.inf, device=trainer.args.device)

    def observe(self, loss: torch.Tensor) -> None:
        """Note the step of a loss that is not finite, without reading it from the device."""
        step = torch.where(torch.isfinite(loss), math.inf, float(self.trainer.state.global_step + 1))
        self._first_step = torch.minimum(self._first_step, step)
        if loss.device.type == "cpu" and self.trainer.args.world_size == 1:
            self.check()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.check()

    def check(self, weights: bool = False) -> None:
        """Raise a [`NonFiniteLossError`] if a loss of any rank, or a weight, is not finite. All ranks must call it."""
        bad_weights = weights and not all(torch.isfinite(p).all() for p in self.trainer.model.parameters())
        found = torch.stack([self._first_step, torch.full_like(self._first_step, 0.0 if bad_weights else math.inf)])
        if dist.is_initialized():
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
        step, bad_weights = found.tolist()
        if math.isfinite(step):
            self._stop(f"The loss became NaN or infinite at step {step:.0f}.")
        if math.isfinite(bad_weights):
            self._stop(f"A weight is NaN or infinite after step {self.trainer.state.global_step}.")

    def _stop(self, found: str) -> None:
        last = find_last_checkpoint(self.trainer.args.output_dir)
        advice = "Lower `learning_rate`, lengthen the warm-up, or use bf16 instead of fp16."
        if hasattr(self.trainer.model.config, "mask_ratio"):
            advice += " For a large model raise `mask_ratio`: the paper's L/16 gave NaN at 0.15 and 0.3, not at 0.5."
        raise NonFiniteLossError(
            f"{found} Training stops; "
            + (f"the last good checkpoint is '{last}'. " if last else "no checkpoint has been saved yet. ")
            + advice
        )
