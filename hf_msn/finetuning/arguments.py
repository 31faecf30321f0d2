"""Training arguments of fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from ..checks import check_choice, check_integer, check_number
from ..optim.by_name import check_optimizer
from ..trainers.pretraining_arguments import ImageTrainingArguments

START_LAYERS = ("backbone", "fc1")


@dataclass
class FinetuningArguments(ImageTrainingArguments):
    """`transformers.TrainingArguments` with the fields that both heads share.

    The learning rate falls in a cosine from `learning_rate` to `final_learning_rate`. `optim="sgd"` has Nesterov
    momentum. With `save_strategy="epoch"` a stopped run can be resumed, and ends as it would have without the stop.
    """

    learning_rate: float = HfArg(default=0.02, help="Learning rate at the first update.")
    final_learning_rate: float = HfArg(default=0.0, help="Learning rate where the cosine ends.")
    num_train_epochs: float = HfArg(default=50, help="Passes over the labelled images; the best one is kept.")
    optim: str = HfArg(
        default="sgd",
        help="sgd (with Nesterov momentum), adamw_torch or another of transformers; timm:lion, "
        "pytorch_optimizer:AdEMAMix, dog:DoG, or any other package.module:Class. See docs/optimizers.md.",
    )
    momentum: float = HfArg(default=0.9, help="Momentum of sgd and LARS, in [0, 1).")
    use_lars: bool = HfArg(default=False, help="LARS in place of `optim`.")
    lars_trust_coefficient: float = HfArg(default=0.001, help="Trust coefficient of LARS.")
    weight_decay: float = HfArg(default=0.0, help="Weight decay; none on biases and norms.")
    max_grad_norm: float = HfArg(default=0.0, help="Gradients are clipped to this norm; 0: never.")
    freeze_batch_norm: bool = HfArg(
        default=False,
        help="Batch normalisation stays in evaluation mode: it normalises by its running statistics, which stay as "
        "they are. Its scale and shift are trained.",
    )
    freeze_encoder: bool = HfArg(default=False, help="Train the head alone; the encoder does not change by a bit.")
    validation_fraction: float = HfArg(
        default=0.2,
        help="Share of the labelled images of each class, at least one image, held out to choose the best epoch. 0: "
        "none, and the last epoch is kept. Labels that pretraining had look easier than new ones.",
    )
    eval_every_epochs: int = HfArg(default=1, help="Epochs between evaluations.")
    refit: bool = HfArg(
        default=False, help="Then train again on all labelled images, up to the best epoch; the cosine ends there."
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Save into an `output_dir` that is not empty.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Images per rank in an evaluation.")
    save_strategy: str = HfArg(
        default="no", help="epoch: a checkpoint after each, from which a stopped run is resumed. no: none."
    )
    save_total_limit: int | None = HfArg(default=1, help="Checkpoints to keep.")
    resume_from_checkpoint: str | None = HfArg(
        default=None, help="true: the last checkpoint of output_dir. auto: if there is one. Or its folder."
    )

    def __post_init__(self):
        self.lr_scheduler_type = "cosine_with_min_lr"
        self.lr_scheduler_kwargs = {"min_lr": self.final_learning_rate}
        super().__post_init__()
        check_number("learning_rate", self.learning_rate, above=0, remedy="PAWS is fine-tuned at 0.02.")
        for name in ("final_learning_rate", "weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), minimum=0)
        check_number("momentum", self.momentum, minimum=0, below=1, remedy="The papers have 0.9.")
        if self.num_train_epochs < 1 or self.num_train_epochs != int(self.num_train_epochs):
            raise ValueError(
                f"`num_train_epochs` must be an integer >= 1, as the best epoch is one of them, but is "
                f"{self.num_train_epochs}."
            )
        if self.max_steps > 0:
            raise ValueError(
                f"`max_steps` must be left out, but is {self.max_steps}: fine-tuning has whole epochs, the best of "
                "which is kept. Give `num_train_epochs`."
            )
        remedy = "0.2 is usual; 0 holds none out."
        check_number("validation_fraction", self.validation_fraction, minimum=0, below=1, remedy=remedy)
        check_integer("eval_every_epochs", self.eval_every_epochs)
        if self.refit and self.validation_fraction == 0:
            raise ValueError(
                "`refit` trains on all labelled images after some chose the best epoch, but `validation_fraction` 0 "
                "holds none out. Leave out one of the two."
            )
        check_choice("save_strategy", self.save_strategy, ("no", "epoch"), remedy="A checkpoint ends an epoch.")
        check_optimizer(self)


@dataclass
class ClassifierFinetuningArguments(FinetuningArguments):
    """[`FinetuningArguments`] of a linear classifier on the encoder.

    `global_batch_size` counts the images of all ranks, `per_device_train_batch_size` those of one rank; one of them is
    given. The images of an epoch are distributed evenly, so that no batch is much smaller than the others.
    """

    global_batch_size: int | None = HfArg(
        default=None,
        help="Images in one update, at most, over all ranks together. 64 without it and without "
        "per_device_train_batch_size.",
    )
    per_device_train_batch_size: int | None = HfArg(  # type: ignore[assignment]
        default=None, help="Images in one batch of each rank, in place of global_batch_size."
    )
    start_layer: Literal[START_LAYERS] = HfArg(  # type: ignore[valid-type]
        default="backbone",
        help="backbone: the classifier is on the encoder, and plain transformers loads it. fc1: on the first layer of "
        "the projection head of pretraining (linear, batch normalisation, activation), as PAWS is fine-tuned.",
    )
    zero_init_head: bool = HfArg(
        default=True, help="Start the linear head at 0, where all classes are equally likely."
    )
    standardize_features: bool | None = HfArg(
        default=None,
        help="Train the head on features of mean 0 and spread 1, and fold that into its weights at the end. By "
        "default with a frozen encoder only; it helps a pretrained ViT too, at a learning rate of 0.005.",
    )

    def __post_init__(self):
        given, images_per_rank = self.global_batch_size, self.per_device_train_batch_size
        if images_per_rank is not None:
            check_integer("per_device_train_batch_size", images_per_rank, meaning="counts images")
        check_choice("start_layer", self.start_layer, START_LAYERS)
        self.per_device_train_batch_size = images_per_rank or 1  # the base class needs a number
        super().__post_init__()
        parts = self.world_size * self.gradient_accumulation_steps
        if given is None:
            self.global_batch_size = 64 if images_per_rank is None else images_per_rank * parts
        if self.global_batch_size < 1 or self.global_batch_size % parts:
            raise ValueError(
                f"`global_batch_size` must be a multiple of {parts}, for {self.world_size} ranks and "
                f"{self.gradient_accumulation_steps} accumulated batches, but is {self.global_batch_size}."
            )
        self.per_device_train_batch_size = self.global_batch_size // parts
        if images_per_rank not in (None, self.per_device_train_batch_size):
            raise ValueError(
                f"`per_device_train_batch_size` is {images_per_rank}, but `global_batch_size` {given} is "
                f"{self.per_device_train_batch_size} per rank and batch. Leave out one of the two."
            )


@dataclass
class SuNCEtFinetuningArguments(FinetuningArguments):
    """[`FinetuningArguments`] of encoder and projection head by the SuNCEt loss.

    The numbers of a batch are **global**: they count all ranks. An epoch has as many updates as it takes to draw the
    number of labelled images, rounded up.
    """

    learning_rate: float = HfArg(default=0.1, help="Learning rate at the first update.")
    final_learning_rate: float = HfArg(default=0.01, help="Learning rate where the cosine ends.")
    num_train_epochs: float = HfArg(default=30, help="Passes over the labelled images; the best one is kept.")
    use_lars: bool = HfArg(default=True, help="LARS in place of `optim`.")
    global_support_classes: int | None = HfArg(
        default=None, help="Classes in each update, over all ranks together. By default all classes."
    )
    global_support_images_per_class: int = HfArg(
        default=5, help="Labelled images of each of these classes in an update, over all ranks together."
    )
    support_views_per_image: int = HfArg(default=2, help="Views of each labelled image in an update.")
    support_shard: str = HfArg(
        default="classes", help="classes: each rank holds other classes. images: all ranks hold the same classes."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.global_support_images_per_class * self.support_views_per_image < 2:
            raise ValueError(
                "SuNCEt compares each labelled image with others of its class, but an update has 1 image of each in 1 "
                "view. Raise `global_support_images_per_class` or `support_views_per_image` to at least 2."
            )
        if self.global_support_classes is not None:
            check_integer("global_support_classes", self.global_support_classes, 2)
