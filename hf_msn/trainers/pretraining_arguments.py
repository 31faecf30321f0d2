"""Training arguments that every pretraining method shares."""

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from ..checks import check_choice, check_integer, check_number
from ..data.spare_cores import spare_cores
from ..models.sequence_compression import compression_stages
from ..optim.by_name import check_optimizer


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for batches of views. `optim` may name an optimizer of another package."""

    optim_args: str | None = HfArg(
        default=None, help="Its arguments, as in a call: betas=(0.95,0.99),weight_decouple=true."
    )
    logging_steps: float = HfArg(default=50, help="Updates between two logs.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay off: batches are made of views.")
    average_tokens_across_devices: bool = HfArg(default=False, help="Has no meaning for images.")
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="All parameters are used.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hides NaN losses from the log if on.")

    def __post_init__(self):
        named = self.optim if ":" in str(self.optim) else None
        if named is not None:  # while the others are checked, which know no other names
            self.optim = TrainingArguments.default_optim
        super().__post_init__()
        self.optim = named or self.optim
        if self.max_steps != -1:
            remedy = "Left out, `num_train_epochs` is the length of training."
            check_integer("max_steps", self.max_steps, remedy=remedy)
        for event in ("logging", "save"):
            if getattr(self, f"{event}_strategy") == "steps":
                remedy = f"`{event}_strategy` no has none."
                check_number(f"{event}_steps", getattr(self, f"{event}_steps"), above=0, remedy=remedy)
        for name in ("per_device_eval_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
            check_integer(name, getattr(self, name))
        check_integer("dataloader_num_workers", self.dataloader_num_workers, minimum=0)
        check_integer("seed", self.seed, minimum=0)


@dataclass
class PretrainingArguments(ImageTrainingArguments):
    """`transformers.TrainingArguments` with the schedules of pretraining, and with defaults that fit it.

    Learning rate: linear from `start_learning_rate` to `learning_rate` during `warmup_epochs`, then a cosine to
    `final_learning_rate`. As in the authors' codes, the first update of PAWS and SuNCEt has the start value, that of
    MSN is one step into the warm-up; horizons and warm-up are cut to whole steps. Weight decay: a cosine from
    `weight_decay` to `final_weight_decay`, not on biases, norms and other 1-D tensors, nor on prototypes. The fields
    below are those that `TrainingArguments` lacks or has another default for.
    """

    learning_rate: float = HfArg(default=1e-3, help="Learning rate at the end of the warm-up.")
    start_learning_rate: float = HfArg(default=2e-4, help="Learning rate where the warm-up starts.")
    final_learning_rate: float = HfArg(default=1e-6, help="Learning rate at the end of the cosine.")
    warmup_epochs: float = HfArg(default=15.0, help="Epochs of warm-up. `warmup_steps`, if not 0, takes its place.")
    warmup_steps: float = HfArg(
        default=0, help="Steps of warm-up, or below 1 their share of all steps. 0: see `warmup_epochs`."
    )
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="A checkpoint folder; true: the last whole one of `output_dir`; auto: the same, or a new run if there is "
        "none.",
    )
    resume_on_other_data: bool = HfArg(
        default=False, help="Go on from a checkpoint of another data set, which is refused otherwise."
    )
    learning_rate_batch_size: int | None = HfArg(
        default=None,
        help="If given, the three learning rates hold for this many images per update over all ranks and are scaled "
        "in proportion to the actual number. The paper's are for 1024.",
    )
    weight_decay: float = HfArg(default=0.04, help="Weight decay at the first step.")
    final_weight_decay: float | None = HfArg(
        default=0.4, help="Weight decay at the end of its cosine; none: `weight_decay` throughout."
    )
    schedule_stretch: float = HfArg(
        default=1.25,
        help="Length of the schedules of learning rate, weight decay, momentum and sharpening over that of training. "
        "Above 1 they never reach their end values. The paper has 1.25.",
    )
    max_grad_norm: float = HfArg(default=3.0, help="Gradients of encoder and head are clipped to this norm; 0: never.")
    num_train_epochs: float = HfArg(default=100.0, help="Passes over the training images.")
    optim: str = HfArg(
        default=TrainingArguments.default_optim,
        help="adamw_torch_fused or another of transformers; timm:lion, pytorch_optimizer:AdEMAMix, dog:DoG, or any "
        "other package.module:Class. See docs/optimizers.md.",
    )
    use_lars: bool = HfArg(
        default=False, help="LARS with momentum in place of `optim`: for convnets and large batches."
    )
    lars_momentum: float = HfArg(default=0.9, help="Momentum of LARS, in [0, 1).")
    lars_trust_coefficient: float = HfArg(default=0.001, help="Trust coefficient of LARS.")
    on_collapse: str = HfArg(
        default="warn",
        help="When features or assignments no longer depend on the image: warn; stop: warn and end the run with a "
        "checkpoint; ignore.",
    )
    critical_gradients: int = HfArg(
        default=0,
        help="Largest gradients of earlier steps that take part in each update, around any `optim`; 0: none. Each "
        "needs the memory of the parameters.",
    )
    encoder_chunk_size: int | None = HfArg(
        default=None,
        help="Gradient cache: encode this many images at a time, so that a batch needs the memory of one such chunk; "
        "heads and loss see the whole batch. Costs one more forward pass. none: all at once.",
    )
    compression: str | None = HfArg(
        default=None,
        help="Sequence compression: constant:0.5@24, drop half of the patches, of 24 pixels; linear:0.75, fewer and "
        "fewer in 5 stages; or a JSON file of find-compression. See docs/compression.md.",
    )
    compile_encoder: bool = HfArg(
        default=False, help="torch.compile the encoders. (`torch_compile` would take the whole model.)"
    )
    sync_batch_norm: bool = HfArg(default=True, help="With several ranks, normalise batches over all of them.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="Train from scratch into an `output_dir` that is not empty."
    )
    per_device_train_batch_size: int = HfArg(default=64, help="Images per rank in one micro-batch.")
    dataloader_drop_last: bool = HfArg(
        default=True, help="Leave out the last, smaller batch of a training epoch: all ranks need equal batches."
    )
    dataloader_num_workers: int | None = HfArg(
        default=None,
        help="Processes per rank that read data. By default the cores of the rank less one, at most 16, if an "
        "accelerator trains, and 0 on a CPU, whose cores are busy with the model.",
    )
    dataloader_persistent_workers: bool | None = HfArg(
        default=None, help="Keep these processes from epoch to epoch. By default true if there are any."
    )
    prediction_loss_only: bool = HfArg(default=True, help="Evaluation on a data set returns its loss only.")

    first_schedule_step: ClassVar[int] = 1  # steps of the learning rate's schedule before the first update
    num_loaders: ClassVar[int] = 1  # loaders that read at the same time and share the default number of workers

    def __post_init__(self):
        has_accelerator = uses_accelerator(self.use_cpu)
        if self.dataloader_num_workers is None:
            # On a CPU the threads of the model already use every core, and workers would take cores from it.
            self.dataloader_num_workers = spare_cores() // self.num_loaders if has_accelerator else 0
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if not has_accelerator:
            self.dataloader_pin_memory = False  # torch warns if it is on
        super().__post_init__()
        if self.max_steps <= 0:
            remedy = "Without `max_steps` it is the length of training."
            check_number("num_train_epochs", self.num_train_epochs, above=0, remedy=remedy)
        for name in ("learning_rate", "start_learning_rate", "lars_trust_coefficient"):
            check_number(name, getattr(self, name), above=0)
        for name in ("final_learning_rate", "weight_decay", "warmup_epochs", "max_grad_norm"):
            check_number(name, getattr(self, name), minimum=0)
        check_number(
            "schedule_stretch",
            self.schedule_stretch,
            minimum=1,
            remedy="Below 1 the schedules end before training does. The paper has 1.25.",
        )
        if self.final_weight_decay is not None:
            check_number("final_weight_decay", self.final_weight_decay, minimum=0)
        if self.learning_rate_batch_size is not None:
            check_integer("learning_rate_batch_size", self.learning_rate_batch_size)
        check_integer("critical_gradients", self.critical_gradients, minimum=0, remedy="The paper has 5.")
        if self.encoder_chunk_size is not None:
            check_integer("encoder_chunk_size", self.encoder_chunk_size, remedy="Leave it out for one pass.")
        if self.compression is not None:
            compression_stages(self.compression, patch_size=1)  # names a wrong schedule before any data is read
        check_choice("on_collapse", self.on_collapse, ("warn", "stop", "ignore"))
        check_number("lars_momentum", self.lars_momentum, minimum=0, below=1, remedy="PAWS has 0.9.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the columns of a batch are its views.")
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` must be False: it would compile the drawing of masks and the collectives of the loss "
                "too, which break the graph. Use `compile_encoder`."
            )
        check_optimizer(self)


@dataclass
class TargetArguments(PretrainingArguments):
    """[`PretrainingArguments`] with the momentum of a target that is a moving average."""

    ema_momentum: float = HfArg(default=0.996, help="Momentum of the target at the first step, in [0, 1].")
    final_ema_momentum: float = HfArg(
        default=1.0,
        help="Momentum of the target at the end of its schedule, in [0, 1]: MSN's is linear, BYOL's a cosine.",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("ema_momentum", "final_ema_momentum"):
            remedy = "The papers go from 0.996 to 1."
            check_number(name, getattr(self, name), minimum=0, maximum=1, remedy=remedy)


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


def uses_accelerator(use_cpu: bool) -> bool:
    """Return whether training will run on an accelerator such as a GPU."""
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return not use_cpu and not asked_for_cpu and torch.accelerator.is_available()
