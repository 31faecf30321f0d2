"""Training arguments of SimCLR + SuNCEt."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..checks import check_number
from .pretraining_arguments import SemiSupervisedArguments


@dataclass
class SuNCEtTrainingArguments(SemiSupervisedArguments):
    """Settings of [`SuNCEtTrainer`] that change over training. Those of the forward pass are in [`SuNCEtConfig`].

    For convnets the paper (arXiv 2006.10803) has LARS: `use_lars=True` with `learning_rate=4.8`,
    `start_learning_rate=0.6`, `final_learning_rate=0.048`, `weight_decay=1e-6`, `final_weight_decay=None`.
    """

    supervised_epochs: float | None = HfArg(
        default=None,
        help="Epochs with the SuNCEt term in the loss; after them labelled images only take part in the batch "
        "statistics. 0: SimCLR alone, without labelled images. By default all.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.supervised_epochs is not None:
            remedy = "0 is SimCLR; leave it out to train with labels to the end."
            check_number("supervised_epochs", self.supervised_epochs, minimum=0, remedy=remedy)
