"""Training arguments that every pretraining method shares."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from .loader_defaults import default_num_workers, uses_accelerator


@dataclass
class PretrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the schedules of pretraining, and with defaults that fit it.

    Learning rate: from `start_learning_rate` in a straight line to `learning_rate` during `warmup_epochs`, then a
    cosine to `final_learning_rate`. Weight decay: a cosine from `weight_decay` to `final_weight_decay`, not on biases,
    norms and other 1-D tensors, nor on prototypes. The fields below are those that `TrainingArguments` lacks or has
    another default for.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate at the end of the warm-up."})
    start_learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate at the first step."})
    final_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate where the cosine ends."})
    warmup_epochs: float = field(
        default=15.0, metadata={"help": "Epochs of warm-up. `warmup_steps`, if not 0, takes its place."}
    )
    warmup_steps: float = field(
        default=0, metadata={"help": "Steps of warm-up, or below 1 their part of all steps. 0: see `warmup_epochs`."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint folder; true: the last whole one of `output_dir`; auto: so if there is one."},
    )
    learning_rate_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "If given, the three learning rates are meant for this many images an update over all ranks and "
            "are scaled in proportion to the real number. The paper's are for 1024."
        },
    )
    weight_decay: float = field(default=0.04, metadata={"help": "Weight decay at the first step."})
    final_weight_decay: float | None = field(
        default=0.4, metadata={"help": "Weight decay where its cosine ends; none: it stays as it is."}
    )
    schedule_stretch: float = field(
        default=1.25,
        metadata={
            "help": "The schedules of learning rate, weight decay and momentum are laid out for this many times the "
            "length of training, so that they never reach their end values. The paper has 1.25; 1 reaches them."
        },
    )
    max_grad_norm: float = field(
        default=3.0, metadata={"help": "Gradients of encoder and head are clipped to this norm; 0: never."}
    )
    num_train_epochs: float = field(default=100.0, metadata={"help": "Passes over the training images."})
    use_lars: bool = field(
        default=False, metadata={"help": "LARS with momentum in place of `optim`: for convnets and large batches."}
    )
    lars_momentum: float = field(default=0.9, metadata={"help": "Momentum of LARS, in [0, 1)."})
    lars_trust_coefficient: float = field(default=0.001, metadata={"help": "Trust coefficient of LARS."})
    compile_encoder: bool = field(
        default=False, metadata={"help": "torch.compile the encoders. (`torch_compile` would take the whole model.)"}
    )
    sync_batch_norm: bool = field(
        default=True,
        metadata={"help": "On several ranks: batch normalisation over all of them."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into an `output_dir` that is not empty, from the start."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Updates between two logs."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a rank in one micro-batch."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller batch of an epoch: all ranks need equal batches."}
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read data, for each rank. By default as many as the rank has cores, less one, at "
            "most 16 where an accelerator trains, and 0 on a CPU, which is busy with the model."
        },
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={"help": "Keep these processes from epoch to epoch. By default wherever there are any."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: batches are made of views."})
    average_tokens_across_devices: bool = field(default=False, metadata={"help": "Has no meaning for images."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All parameters are used."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hides NaN losses from the log if on."})
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluation on a data set gives its loss only."}
    )

    # that read at the same time, and share the default number of workers
    num_loaders: ClassVar[int] = 1

    def __post_init__(self):
        has_accelerator = uses_accelerator(self.use_cpu)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers(has_accelerator, self.num_loaders)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if not has_accelerator:
            self.dataloader_pin_memory = False  # torch would warn of it
        super().__post_init__()
        check_counts(self)
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(
                f"`num_train_epochs` must be > 0, or `max_steps` be given, but is {self.num_train_epochs}: there "
                "would be no update."
            )
        for name in ("learning_rate", "start_learning_rate", "schedule_stretch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be > 0, but is {getattr(self, name)}.")
        for name in ("final_learning_rate", "weight_decay", "warmup_epochs", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be >= 0, but is {getattr(self, name)}.")
        if self.schedule_stretch < 1:
            raise ValueError(
                f"`schedule_stretch` must be >= 1, or the schedules would end before training does, but is "
                f"{self.schedule_stretch}. The paper has 1.25."
            )
        if self.final_weight_decay is not None and self.final_weight_decay < 0:
            raise ValueError(f"`final_weight_decay` must be >= 0, but is {self.final_weight_decay}.")
        if self.learning_rate_batch_size is not None and self.learning_rate_batch_size < 1:
            raise ValueError(f"`learning_rate_batch_size` must be >= 1, but is {self.learning_rate_batch_size}.")
        if not 0 <= self.lars_momentum < 1:
            raise ValueError(f"`lars_momentum` must be in [0, 1), but is {self.lars_momentum}. PAWS has 0.9.")
        if not self.lars_trust_coefficient > 0:
            raise ValueError(
                f"`lars_trust_coefficient` must be > 0, but is {self.lars_trust_coefficient}. PAWS has 0.001."
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the columns of a batch are its views.")
        if self.torch_compile:
            raise ValueError(
                "`torch_compile` would compile the drawing of masks and the collectives of the loss too, which break "
                "the graph. Use `compile_encoder`."
            )


def check_counts(args: TrainingArguments) -> None:
    """Raises a `ValueError` where a number of images, batches or workers, or a seed, cannot be one."""
    for name, lowest in (
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("dataloader_num_workers", 0),
        ("seed", 0),
    ):
        if not getattr(args, name) >= lowest:
            raise ValueError(f"`{name}` must be a whole number >= {lowest}, but is {getattr(args, name)}.")
