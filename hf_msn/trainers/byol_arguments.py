"""Training arguments of BYOL and SimSiam."""

from dataclasses import dataclass
from typing import ClassVar

from transformers.hf_argparser import HfArg

from .pretraining_arguments import TargetArguments


@dataclass
class BYOLTrainingArguments(TargetArguments):
    """Settings of [`BYOLTrainer`] that change over training. Those that change the forward pass are in [`BYOLConfig`].

    The defaults are for ViTs and AdamW. For convnets the paper (arXiv 2006.07733) has LARS: `use_lars=True` with
    `learning_rate=3.2`, `start_learning_rate=1e-6`, `final_learning_rate=0`, `weight_decay=1.5e-6`,
    `final_weight_decay=None` for 4096 images per update and 1000 epochs.
    """

    first_schedule_step: ClassVar[int] = 0

    warmup_epochs: float = HfArg(default=10.0, help="Epochs of warm-up. `warmup_steps`, if not 0, takes its place.")
    schedule_stretch: float = HfArg(
        default=1.0, help="Length of the schedules over that of training; 1: they reach their ends."
    )
    max_grad_norm: float = HfArg(default=0.0, help="Gradients are clipped to this norm; 0: never.")
