"""What codistillation on a Trainer refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from .sync import refuse_unsupported

if TYPE_CHECKING:
    from .codistillation import CodistillationCallback


def check_codistillation(callback: CodistillationCallback) -> None:
    """Refuses settings of the callback, or of its trainer, that do not go together.

    Raises:
        ValueError, TypeError: See [`CodistillationCallback`].
    """
    trainer, args = callback.trainer, callback.trainer.args
    refuse_unsupported(trainer)
    for name, value, choices in (
        ("initialization", callback.initialization, ("own", "same")),
        ("publish", callback.publish, ("first", "best")),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, but is {value!r}.")
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` must be None with codistillation, which would not know the labels that it hides "
            f"from the model, but is {trainer.compute_loss_func!r}. Override `compute_loss`, and call the model "
            "with all that it is given."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            "`label_smoothing_factor` must be 0 with codistillation: the Trainer hides the labels from the model "
            f"for it, but it is {args.label_smoothing_factor}. Smooth the labels inside of the model's loss."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Each rank must have one GPU, but this one has {args.n_gpu} (DataParallel). Launch a process for each "
            "by `torchrun`."
        )
    ranks, size = args.world_size, callback.inner_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or ranks % size:
        raise ValueError(
            f"`inner_size` is the number of ranks of a replica and must be an integer >= 1 that divides all "
            f"{ranks} ranks, but is {size!r}. Give 1 for a replica on each rank."
        )
    if callback.settings.get("on_lost_replica", "raise") != "raise":
        raise ValueError(
            "`on_lost_replica` must be 'raise' on a Trainer, which itself gathers over all ranks at each log and "
            f"checkpoint, but is {callback.settings['on_lost_replica']!r}. Resume from the last checkpoint, or write "
            "a loop with `Codistillation`."
        )
    if callback.publish == "best" and args.load_best_model_at_end:
        raise ValueError(
            "`publish='best'` compares the replicas as they end, but `load_best_model_at_end` puts the first "
            "replica of an earlier step in place of all. Leave one of them out."
        )
    if callback.publish == "best" and trainer.eval_dataset is None:
        raise ValueError("`publish='best'` needs an `eval_dataset` to compare the replicas on. Give one.")
    own_schedule = getattr(args, "final_weight_decay", None) is not None
    if own_schedule and (callback.falling_weight_decay or callback.settings.get("weight_decay_schedule") is not None):
        raise ValueError(
            "The weight decay takes one schedule, but there are two: this callback's and `final_weight_decay` "
            f"{args.final_weight_decay} of the trainer's. Set `final_weight_decay` to None."
        )
    is_known = callback.reinitialize is not None or isinstance(trainer.model, PreTrainedModel)
    if ranks > size and callback.initialization == "own" and not is_known:
        raise ValueError(
            "Replicas must begin with different parameters, but how to initialise a "
            f"{type(trainer.model).__name__}, which is no `PreTrainedModel`, is not known. Give `reinitialize`, a "
            "function that does it to a model in place, or `initialization='same'`."
        )
