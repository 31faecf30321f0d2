"""Low-shot evaluation while a Trainer trains."""

from collections.abc import Callable
from contextlib import nullcontext

from transformers import Trainer, TrainerCallback

from ...checks import check_integer
from .local_update import bring_to_consensus, check_trainer, evaluation_scope


class LowShotCallback(TrainerCallback):
    """Run a low-shot evaluation every few epochs and at the end, and log it with the other values of the Trainer.

    Ranks that train locally come to consensus before it. Each replica of a codistillation is evaluated by its own
    ranks.

    Args:
        trainer (`Trainer`): The trainer whose model is evaluated. It also sends the metrics to its reporters.
        evaluator ([`LowShotEvaluator`]): Called with the model, returns a dict of metrics.
        every_epochs (`int`, *optional*, defaults to 1): Epochs between two evaluations.

    Attributes:
        last_step (`int`, *optional*): The step whose weights `evaluator.results` belongs to.

    Raises:
        ValueError: If `every_epochs` is not an integer >= 1.
        TypeError: If `trainer` is no Trainer, or `evaluator` cannot be called.
    """

    def __init__(self, trainer: Trainer, evaluator: Callable[..., dict[str, float]], every_epochs: int = 1):
        check_integer("every_epochs", every_epochs, meaning="counts epochs between two evaluations")
        check_trainer(self, trainer)
        if not callable(evaluator):
            raise TypeError(
                f"`evaluator` of LowShotCallback must be callable, as a LowShotEvaluator is, but is {evaluator!r:.80}"
                ". Pass one that takes a model and returns a dict of metrics."
            )
        self.trainer, self.evaluator, self.every_epochs = trainer, evaluator, every_epochs
        self.last_step: int | None = None

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if round(state.epoch) % self.every_epochs == 0:
            self._evaluate(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._evaluate(state, model)

    def _evaluate(self, state, model):
        if self.last_step != state.global_step:
            self.last_step = state.global_step
            bring_to_consensus(self.trainer)
            with getattr(self.trainer, "clock_stopped", nullcontext)(), evaluation_scope(self.trainer):
                metrics = self.evaluator(model)
            self.trainer.log({f"eval_{name}": value for name, value in metrics.items()})
