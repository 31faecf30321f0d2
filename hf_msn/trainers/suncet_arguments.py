"""Training arguments of SimCLR + SuNCEt."""

from dataclasses import dataclass, field

from .semi_supervised_arguments import SemiSupervisedArguments


@dataclass
class SuNCEtTrainingArguments(SemiSupervisedArguments):
    """What changes over the training of a [`SuNCEtForPreTraining`]. What changes its forward pass: [`SuNCEtConfig`].

    For convnets the paper (arXiv 2006.10803) has LARS: `use_lars=True` with `learning_rate=4.8`,
    `start_learning_rate=0.6`, `final_learning_rate=0.048`, `weight_decay=1e-6`, `final_weight_decay=None`.
    """

    supervised_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs with the SuNCEt term, and labelled images; then SimCLR alone. By default all."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.supervised_epochs is not None and not self.supervised_epochs >= 0:
            raise ValueError(
                f"`supervised_epochs` must be >= 0, but is {self.supervised_epochs}. 0 is SimCLR; leave it out to "
                "train with labels to the end."
            )
