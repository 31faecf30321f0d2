"""Training arguments of PAWS."""

from dataclasses import dataclass

from .pretraining_arguments import SemiSupervisedArguments


@dataclass
class PAWSTrainingArguments(SemiSupervisedArguments):
    """Settings of [`PAWSTrainer`] that change over training. Those that change the forward pass are in [`PAWSConfig`].

    The defaults are those of the authors for ViTs (AdamW, 1024 images per update). For convnets the paper has LARS:
    `use_lars=True`, and with it `learning_rate=6.4`, `start_learning_rate=0.3`, `final_learning_rate=0.064`,
    `weight_decay=1e-6`, `final_weight_decay=None` for 4096 images per update.
    """
