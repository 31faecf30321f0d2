"""What codistillation on a Trainer refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ...distributed.collectives import world_size
from ...distributed.replicas.peer_checkpoints import logits_of
from ...models.modeling_msn import MSNForPreTraining
from ...models.modeling_paws import PAWSForPreTraining
from ...models.modeling_suncet import SuNCEtForPreTraining
from .replica_publishing import metric_to_compare

if TYPE_CHECKING:
    from .codistillation import CodistillationCallback


def check_codistillation(callback: CodistillationCallback) -> None:
    """Refuses settings of the callback, or of its trainer, that do not go together.

    Raises:
        ValueError, TypeError: See [`CodistillationCallback`].
    """
    trainer = callback.trainer
    args = trainer.args
    _check_types(callback)
    for name, value, choices in (
        ("initialization", callback.initialization, ("own", "same")),
        ("publish", callback.publish, ("first", "best", "average")),
    ):
        if value not in choices:
            raise ValueError(
                f"`{name}` must be {' or '.join(map(repr, choices))}, but is {value!r}. Give one of them."
            )
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
    _check_groups(callback)
    if callback.settings.get("on_lost_replica", "raise") != "raise":
        raise ValueError(
            "`on_lost_replica` must be 'raise' on a Trainer, which itself gathers over all ranks at each log and "
            f"checkpoint, but is {callback.settings['on_lost_replica']!r}. Resume from the last checkpoint, or write "
            "a loop with `Codistillation`."
        )
    _check_publishing(callback)
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


def check_averageable(model: nn.Module, output: Any) -> None:
    """Refuses what has no mean of probabilities, as far as an output of the training shows it.

    Raises:
        ValueError: If there are no logits `(..., C)` of classes that exclude each other.
    """
    _refuse_other_problems(model)
    logits = logits_of(output)
    if not 2 <= logits.dim() <= 3:
        raise ValueError(
            "`publish='average'` is of logits of shape (B, C) or (B, L, C), whose last dimension are the classes, but "
            f"those of {type(model).__name__} are {tuple(logits.shape)}. Publish the first or the best replica."
        )


def _check_groups(callback: CodistillationCallback) -> None:
    group, inner = (callback.settings.get(name) for name in ("group", "inner_group"))
    if group is None and inner is None:
        return
    if callback.inner_size != 1:
        raise ValueError(
            f"`inner_size` makes the groups and must be left out where they are given, but is {callback.inner_size}. "
            "Give `inner_size`, or `group` and `inner_group`."
        )
    ranks = callback.trainer.args.world_size
    replicas, size = (1 if one is None else world_size(one) for one in (group, inner))
    if replicas * size != ranks:
        raise ValueError(
            "`group` (one rank of each replica) and `inner_group` (those of this replica) must together be all "
            f"{ranks} ranks, but are {replicas} x {size}. Give both dimensions of one `DeviceMesh`."
        )


def _check_types(callback: CodistillationCallback) -> None:
    for name in ("same_batch", "falling_weight_decay", "log_parameter_distance"):
        value = getattr(callback, name)
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False, but is {value!r}. Give one of them.")
    functions = {name: callback.settings.get(name) for name in ("predictions", "forward")}
    for name, value in {"mask": callback.mask, "reinitialize": callback.reinitialize, **functions}.items():
        if value is not None and not callable(value):
            raise ValueError(f"`{name}` must be a function, but is {value!r}. Give one, or leave it out.")


def _check_publishing(callback: CodistillationCallback) -> None:
    trainer, args, publish = callback.trainer, callback.trainer.args, callback.publish
    if publish != "first" and args.load_best_model_at_end:
        raise ValueError(
            f"`publish={publish!r}` is of the replicas as they end, but `load_best_model_at_end` puts the first "
            "replica of an earlier step in place of all. Leave one of them out."
        )
    if publish == "average":
        _check_average(trainer.model)
    if publish != "best":
        return
    if trainer.eval_dataset is None:
        raise ValueError("`publish='best'` needs an `eval_dataset` to compare the replicas on. Give one.")
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else None
    losses = ["eval_loss"] if sets is None else [f"eval_{name}_loss" for name in sets]
    name, _ = metric_to_compare(callback)
    is_loss_only = trainer.compute_metrics is None or args.prediction_loss_only
    if name not in losses and (is_loss_only or name == "eval_loss"):
        without = "" if trainer.compute_metrics else " without `compute_metrics`"
        raise ValueError(
            f"`publish='best'` compares the replicas by `metric_for_best_model`, here '{name}', but an evaluation"
            f"{without} gives {', '.join(losses)}. Set `metric_for_best_model` to one of its metrics."
        )


def _check_average(model: nn.Module) -> None:
    remedy = "Give 'first' or 'best'."
    if isinstance(model, (MSNForPreTraining, PAWSForPreTraining, SuNCEtForPreTraining)):
        raise ValueError(
            "`publish='average'` is of models that return `logits` for classes, but a pretraining by "
            f"{type(model).__name__} ends with a backbone, which has none. {remedy}"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "`publish='average'` saves each replica so that `from_pretrained` loads it, which must be a "
            f"PreTrainedModel, but this is a {type(model).__name__}. {remedy}"
        )
    _refuse_other_problems(model)


def _refuse_other_problems(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None) or (
        "regression" if getattr(config, "num_labels", 2) == 1 else None
    )
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            "`publish='average'` is of probabilities of classes that exclude each other, but this is a "
            f"{problem.replace('_', ' ')} (`problem_type` or one label). Give 'first' or 'best'."
        )
