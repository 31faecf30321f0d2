"""What changes over fine-tuning: length, batches, optimizer, and how the best epoch is found."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..trainers.pretraining_arguments import check_counts


@dataclass
class FinetuningArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what fine-tuning needs: base of the arguments of both heads.

    The learning rate falls in a cosine from `learning_rate` to `final_learning_rate`. `optim="sgd"` has Nesterov
    momentum. Nothing is saved before the end, so there is nothing to resume from: these runs are short.
    """

    learning_rate: float = field(default=0.02, metadata={"help": "Learning rate at the first update."})
    final_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate where the cosine ends."})
    num_train_epochs: float = field(
        default=50, metadata={"help": "Passes over the labelled images; the best one is kept."}
    )
    optim: str = field(
        default="sgd", metadata={"help": "sgd (with Nesterov momentum), or another of transformers: adamw_torch."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of sgd and LARS, in [0, 1)."})
    use_lars: bool = field(default=False, metadata={"help": "LARS in place of `optim`."})
    lars_trust_coefficient: float = field(default=0.001, metadata={"help": "Trust coefficient of LARS."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay; none on biases and norms."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradients are clipped to this norm; 0: never."})
    freeze_encoder: bool = field(
        default=False, metadata={"help": "Train the head alone; the encoder stays bit for bit what it was."}
    )
    validation_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Share of the labelled images of each class, at least one, that is held out to choose the best "
            "epoch. 0: none is, and the last epoch is kept. Labels that pretraining had already look easier "
            "than new ones would."
        },
    )
    eval_every_epochs: int = field(default=1, metadata={"help": "Measure the accuracy every this many epochs."})
    refit: bool = field(
        default=False,
        metadata={
            "help": "Then train anew on all labelled images, for as many epochs as were best; the cosine ends there."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Save into an `output_dir` that is not empty."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images a rank while measuring."})
    logging_steps: float = field(default=50, metadata={"help": "Updates between two logs."})
    save_strategy: str = field(default="no", metadata={"help": "Must stay no: the best epoch is saved at the end."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: batches are made of views."})
    average_tokens_across_devices: bool = field(default=False, metadata={"help": "Has no meaning for images."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All parameters are used."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hides NaN losses from the log if on."})

    def __post_init__(self):
        self.lr_scheduler_type = "cosine_with_min_lr"
        self.lr_scheduler_kwargs = {"min_lr": self.final_learning_rate}
        super().__post_init__()
        check_counts(self)
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be > 0, but is {self.learning_rate}. PAWS is fine-tuned at 0.02.")
        for name in ("final_learning_rate", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be >= 0, but is {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), but is {self.momentum}. The papers have 0.9.")
        if self.num_train_epochs < 1 or self.num_train_epochs != int(self.num_train_epochs):
            raise ValueError(
                f"`num_train_epochs` must be a whole number >= 1, as the best epoch is one of them, but is "
                f"{self.num_train_epochs}."
            )
        if self.max_steps > 0:
            raise ValueError(
                f"`max_steps` is {self.max_steps}, but the length of fine-tuning is counted in whole epochs, one of "
                "which is kept. Give `num_train_epochs`."
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"`validation_fraction` is the held-out share of the labelled images and must be in [0, 1), but is "
                f"{self.validation_fraction}. 0.2 is usual; 0 holds none out."
            )
        if self.eval_every_epochs < 1:
            raise ValueError(f"`eval_every_epochs` must be >= 1, but is {self.eval_every_epochs}.")
        if self.refit and self.validation_fraction == 0:
            raise ValueError(
                "`refit` trains on all labelled images after some chose the best epoch, but with "
                "`validation_fraction` 0 all are trained on at once. Leave out one of the two."
            )
        if self.save_strategy != "no":
            raise ValueError("`save_strategy` must be 'no': the weights of the best epoch are saved at the end.")


@dataclass
class ClassifierFinetuningArguments(FinetuningArguments):
    """[`FinetuningArguments`] of a linear classifier on the encoder.

    The batch is **global**: its size holds for all ranks together, however many there are. The images of an epoch are
    shared out evenly, so that no batch is much smaller than the others.
    """

    global_batch_size: int = field(
        default=64,
        metadata={"help": "Images in one update, over all ranks together (at most; all batches are alike)."},
    )
    zero_init_head: bool = field(
        default=True, metadata={"help": "Start the linear head at 0, where all classes are equally likely."}
    )
    standardize_features: bool | None = field(
        default=None,
        metadata={
            "help": "Train the head on features less their mean, of spread 1, and fold that into its weights at the "
            "end. By default with a frozen encoder alone; for a pretrained ViT it helps too, at a learning rate of "
            "0.005."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        parts = self.world_size * self.gradient_accumulation_steps
        if self.global_batch_size < 1 or self.global_batch_size % parts:
            raise ValueError(
                f"`global_batch_size` must be >= 1 and shared out evenly, but is {self.global_batch_size} for "
                f"{self.world_size} ranks and {self.gradient_accumulation_steps} accumulated batches. Take a multiple "
                f"of {parts}."
            )
        self.per_device_train_batch_size = self.global_batch_size // parts


@dataclass
class SuNCEtFinetuningArguments(FinetuningArguments):
    """[`FinetuningArguments`] of encoder and projection head by the SuNCEt loss.

    The numbers of a batch are **global**: they hold for all ranks together. An epoch is as many updates as it takes to
    draw as many images as are labelled, rounded up.
    """

    learning_rate: float = field(default=0.1, metadata={"help": "Learning rate at the first update."})
    final_learning_rate: float = field(default=0.01, metadata={"help": "Learning rate where the cosine ends."})
    num_train_epochs: float = field(
        default=30, metadata={"help": "Passes over the labelled images; the best one is kept."}
    )
    use_lars: bool = field(default=True, metadata={"help": "LARS in place of `optim`."})
    global_support_classes: int | None = field(
        default=None, metadata={"help": "Classes in each update, over all ranks together. By default all classes."}
    )
    global_support_images_per_class: int = field(
        default=5, metadata={"help": "Labelled images of each of these classes in an update, over all ranks together."}
    )
    support_views_per_image: int = field(default=2, metadata={"help": "Views of each labelled image in an update."})
    support_shard: str = field(
        default="classes",
        metadata={"help": "classes: each rank holds classes of its own. images: all ranks hold the same classes."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.global_support_images_per_class * self.support_views_per_image < 2:
            raise ValueError(
                "SuNCEt compares each labelled image with others of its class, but an update has 1 image of each in 1 "
                "view. Raise `global_support_images_per_class` or `support_views_per_image` to at least 2."
            )
        if self.global_support_classes == 1:
            raise ValueError(
                "`global_support_classes` must be at least 2, but is 1: SuNCEt tells the classes of an update apart. "
                "Leave it out for all classes."
            )
