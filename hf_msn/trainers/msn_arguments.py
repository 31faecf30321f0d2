"""Training arguments of MSN."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..checks import check_number
from .pretraining_arguments import TargetArguments


@dataclass
class MSNTrainingArguments(TargetArguments):
    """Settings of [`MSNTrainer`] that change over training. Those that change the forward pass are in [`MSNConfig`].

    The defaults are those of the paper (arXiv 2204.07141), for 1024 images per update.
    """

    start_sharpen_temperature: float | None = HfArg(
        default=None, help="T of the targets at the first step. By default the model's, 0.25 in the paper."
    )
    final_sharpen_temperature: float | None = HfArg(
        default=None, help="T of the targets at the end of its linear schedule. By default that of the first."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("start_sharpen_temperature", "final_sharpen_temperature"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, remedy="The paper has 0.25.")
