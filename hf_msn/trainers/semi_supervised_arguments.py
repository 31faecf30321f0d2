"""Training arguments that the methods with a support set share."""

from dataclasses import dataclass, field
from typing import ClassVar

from .pretraining_arguments import PretrainingArguments


@dataclass
class SemiSupervisedArguments(PretrainingArguments):
    """[`PretrainingArguments`] with the support set of each micro-batch.

    The numbers of the support are **global**: they hold for all ranks together, however many there are.
    """

    num_loaders: ClassVar[int] = 2  # images, and supports beside them

    global_support_classes: int | None = field(
        default=None,
        metadata={"help": "Classes in each support set, over all ranks together. By default all classes."},
    )
    global_support_images_per_class: int = field(
        default=5,
        metadata={"help": "Labelled images of each of these classes in each support set, over all ranks together."},
    )
    support_shard: str = field(
        default="classes",
        metadata={"help": "classes: each rank holds classes of its own. images: all ranks hold the same classes."},
    )
    support_on_small_class: str = field(
        default="repeat",
        metadata={"help": "A class with fewer images than that: repeat them in other views, or raise an error."},
    )
    warmup_epochs: float = field(
        default=10.0, metadata={"help": "Epochs of warm-up. `warmup_steps`, if not 0, takes its place."}
    )
    schedule_stretch: float = field(
        default=1.0, metadata={"help": "Length of the schedules over that of training; 1: they reach their ends."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradients are clipped to this norm; 0: never."})
