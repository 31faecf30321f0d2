"""What the pretraining trainers do at the events of a Trainer: epochs, target, progress, evaluation."""

from collections.abc import Callable
from contextlib import nullcontext

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from .trainer_seams import bring_to_consensus, evaluation_scope


class DatasetEpochCallback(TrainerCallback):
    """Tells the data set which epoch begins, so that each epoch sees other views.

    accelerate forwards the epoch to the sampler *or* to the data set, and on several ranks never to the data set.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))


class UpdateTargetCallback(TrainerCallback):
    """Moves the target encoder after each optimizer step that was really taken.

    Args:
        momentum (`Callable[[], float]`): Gives the momentum of the update that has just been made.
    """

    def __init__(self, momentum: Callable[[], float]):
        self.momentum = momentum

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            model.update_target(self.momentum())


class ThroughputProgressCallback(ProgressCallback):
    """The progress bar of Trainer, with time left and images per second."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "images_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['images_per_second']:.0f} images/s")


class LowShotCallback(TrainerCallback):
    """Runs a low-shot evaluation every few epochs and after the last, and logs it with what the Trainer logs.

    Ranks that train locally come to consensus before; of replicas each is evaluated by its own ranks.

    Args:
        trainer (`Trainer`): The trainer whose model is evaluated; it also takes the metrics to its reporters.
        evaluator ([`LowShotEvaluator`]): Called with the model; gives a dict of metrics.
        every_epochs (`int`, *optional*, defaults to 1): At least 1.
    """

    def __init__(self, trainer, evaluator: Callable[..., dict[str, float]], every_epochs: int = 1):
        if every_epochs < 1:
            raise ValueError(f"`every_epochs` must be >= 1, but is {every_epochs}.")
        self.trainer, self.evaluator, self.every_epochs = trainer, evaluator, every_epochs
        self._last_step = None

    @property
    def last_step(self) -> int | None:
        """The step whose weights `evaluator.results` are of."""
        return self._last_step

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if round(state.epoch) % self.every_epochs == 0:
            self._evaluate(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._evaluate(state, model)

    def _evaluate(self, state, model):
        if self._last_step != state.global_step:
            self._last_step = state.global_step
            bring_to_consensus(self.trainer)
            with getattr(self.trainer, "clock_stopped", nullcontext)(), evaluation_scope(self.trainer):
                metrics = self.evaluator(model)
            self.trainer.log({f"eval_{name}": value for name, value in metrics.items()})
