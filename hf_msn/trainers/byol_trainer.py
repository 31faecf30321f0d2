"""The Trainer of BYOL (arXiv 2006.07733) and SimSiam (arXiv 2011.10566)."""

from ..models.modeling_byol import BYOLForPreTraining
from ..schedules import cosine
from .byol_arguments import BYOLTrainingArguments
from .target_trainer import TargetTrainer


class BYOLTrainer(TargetTrainer):
    """Train a [`BYOLForPreTraining`] with the schedules, moving average and log of the paper.

    After each update the target moves on, and the predictors "direct_pred" and "direct_copy" are set. The log has the
    eigenvalues of the predictor's input and, for a linear predictor, how well its eigenvectors are aligned with those
    of its input: see [`~hf_msn.models.direct_predictor.InputCorrelation.spectrum`].

    The arguments are those of [`TargetTrainer`].
    """

    args: BYOLTrainingArguments
    arguments_class = BYOLTrainingArguments
    model_class = BYOLForPreTraining

    def ema_momentum_now(self) -> float:
        """Return the momentum of the target for the next update: a cosine over the stretched horizon."""
        return cosine(self.stretched_progress(), self.args.ema_momentum, self.args.final_ema_momentum)

    def extra_logs(self) -> dict[str, float]:
        model = self.model
        momentum = {"ema_momentum": self.ema_momentum_now()} if model.config.ema else {}
        return {**super().extra_logs(), **momentum, **model.input_correlation.spectrum(model.prediction_head)}

    def check_before_training(self) -> None:
        super().check_before_training()
        self.check_two_global_views()
