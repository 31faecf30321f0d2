"""The moving average of the target encoder, at the events of a Trainer."""

from collections.abc import Callable

from transformers import TrainerCallback


class UpdateTargetCallback(TrainerCallback):
    """Update the target encoder after each optimizer step. A step that a gradient scaler skips changes nothing.

    Args:
        momentum (`Callable[[], float]`): Returns the momentum of the update that has just been made.
    """

    def __init__(self, momentum: Callable[[], float]):
        self.momentum = momentum

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            model.update_target(self.momentum())
