"""Training arguments of MSN."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..checks import check_number
from .pretraining_arguments import PretrainingArguments


@dataclass
class MSNTrainingArguments(PretrainingArguments):
    """Settings of [`MSNTrainer`] that change over training. Those that change the forward pass are in [`MSNConfig`].

    The defaults are those of the paper (arXiv 2204.07141), for 1024 images per update.
    """

    ema_momentum: float = HfArg(default=0.996, help="Momentum of the target encoder at the first step, in [0, 1].")
    final_ema_momentum: float = HfArg(
        default=1.0, help="Momentum of the target encoder at the end of its linear schedule, in [0, 1]."
    )
    start_sharpen_temperature: float | None = HfArg(
        default=None, help="T of the targets at the first step. By default the model's, 0.25 in the paper."
    )
    final_sharpen_temperature: float | None = HfArg(
        default=None, help="T of the targets at the end of its linear schedule. By default that of the first."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("ema_momentum", "final_ema_momentum"):
            remedy = "The paper goes from 0.996 to 1."
            check_number(name, getattr(self, name), minimum=0, maximum=1, remedy=remedy)
        for name in ("start_sharpen_temperature", "final_sharpen_temperature"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, remedy="The paper has 0.25.")
