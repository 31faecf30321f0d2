"""Training arguments of MSN."""

from dataclasses import dataclass, field

from .pretraining_arguments import PretrainingArguments


@dataclass
class MSNTrainingArguments(PretrainingArguments):
    """What changes over the training of an [`MSNForPreTraining`]. What changes its forward pass is in [`MSNConfig`].

    The defaults are those of the paper (arXiv 2204.07141), for 1024 images an update.
    """

    ema_momentum: float = field(
        default=0.996, metadata={"help": "Momentum of the target encoder at the first step, in [0, 1]."}
    )
    final_ema_momentum: float = field(
        default=1.0, metadata={"help": "Momentum of the target encoder where its straight line ends, in [0, 1]."}
    )
    start_sharpen_temperature: float | None = field(
        default=None,
        metadata={"help": "T of the targets at the first step. By default the model's, 0.25 in the paper."},
    )
    final_sharpen_temperature: float | None = field(
        default=None, metadata={"help": "T of the targets at the last step. By default as at the first."}
    )
    collapse_warning: bool = field(
        default=True, metadata={"help": "Warn when the assignments collapse, with what is seen and what to turn."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("ema_momentum", "final_ema_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"`{name}` must be in [0, 1], but is {getattr(self, name)}. The paper goes from 0.996 to 1."
                )
        for name in ("start_sharpen_temperature", "final_sharpen_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be > 0, but is {value}. The paper has 0.25.")
