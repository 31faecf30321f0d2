"""Training arguments that the methods with a support set share."""

from dataclasses import dataclass
from typing import ClassVar

from transformers.hf_argparser import HfArg

from .pretraining_arguments import PretrainingArguments


@dataclass
class SemiSupervisedArguments(PretrainingArguments):
    """[`PretrainingArguments`] with the support set of each micro-batch.

    The numbers of the support are **global**: they hold for all ranks together, however many there are.
    """

    first_schedule_step: ClassVar[int] = 0
    num_loaders: ClassVar[int] = 2  # images, and supports beside them

    global_support_classes: int | None = HfArg(
        default=None, help="Classes in each support set, over all ranks together. By default all classes."
    )
    global_support_images_per_class: int = HfArg(
        default=5, help="Labelled images of each of these classes in each support set, over all ranks together."
    )
    support_shard: str = HfArg(
        default="classes", help="classes: each rank holds classes of its own. images: all ranks hold the same classes."
    )
    support_on_small_class: str = HfArg(
        default="repeat", help="A class with fewer images than that: repeat them in other views, or raise an error."
    )
    warmup_epochs: float = HfArg(default=10.0, help="Epochs of warm-up. `warmup_steps`, if not 0, takes its place.")
    schedule_stretch: float = HfArg(
        default=1.0, help="Length of the schedules over that of training; 1: they reach their ends."
    )
    adapt_shortcut_scales: bool = HfArg(
        default=False,
        help="Weight decay and LARS's scaling for the batch-norm scales of ResNets' shortcuts (downsample.1.weight) "
        "too, as in the authors' code, which excludes tensors by name. By default no 1-D tensor has them.",
    )
    max_grad_norm: float = HfArg(default=0.0, help="Gradients are clipped to this norm; 0: never.")
