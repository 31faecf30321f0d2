"""What the replicas of a codistillation compare, by the kind of model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...distributed.replicas.peer_checkpoints import call_model, logits_of
from ...models.modeling_msn import MSNForPreTraining
from ...models.modeling_paws import PAWSForPreTraining
from ...models.modeling_suncet import SuNCEtForPreTraining
from ...models.prediction_average import predicts_next_token


def predictions_for(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    """output -> predictions of a model.

    Assignments of MSN's anchors to the prototypes, PAWS' predictions of classes for its anchors, as logarithms; of all
    others the output's `logits`.

    Raises:
        ValueError: For a model that predicts nothing.
    """
    if isinstance(model, SuNCEtForPreTraining):
        raise ValueError(
            "Replicas learn from one another's predictions, but `SuNCEtForPreTraining` makes none. Give "
            "`predictions`, a function of the output, or train by another method."
        )
    return log_assignments_of if isinstance(model, (MSNForPreTraining, PAWSForPreTraining)) else logits_of


def log_assignments_of(output: Any) -> torch.Tensor:
    """log p of the anchors, `(V*B, C)`."""
    p = output["anchor_probabilities"]
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def forward_for(model: nn.Module) -> Callable[[nn.Module, Any], Any]:
    """(copy, batch) -> output: as the model was called. A copy of MSN masks the patches that the model has masked."""
    if not isinstance(model, MSNForPreTraining):
        return call_model

    def forward(copy: nn.Module, batch: Any) -> Any:
        if model._mask_draw is not None:
            seed, drawn = model._mask_draw  # the model has moved on by one
            copy._mask_draw = (seed, drawn - 1)
        return call_model(copy, batch)

    return forward


def mask_for(model: nn.Module, batch: Any, predictions: torch.Tensor) -> torch.Tensor | None:
    """The positions that count, `(B, L)`, of predictions `(B, L, C)` with a label for each; `None`: all.

    A causal language model predicts the next token at each position, all others that of the position itself.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if predictions.dim() != 3 or not torch.is_tensor(labels) or labels.shape != predictions.shape[:-1]:
        return None
    counts = labels != -100
    if predicts_next_token(model):
        counts = nn.functional.pad(counts[:, 1:], (0, 1))
    return counts


def origin_of(model: nn.Module) -> str:
    """The checkpoint that a model's weights, or those of its trunk, are known to come from; empty if there is none."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "trunk_from", None) or ""


@torch.no_grad()
def initialize_anew(model: PreTrainedModel) -> None:
    """Gives the trainable parameters of a `PreTrainedModel` other random values, as its class draws them."""
    fresh = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(fresh[name])
    if isinstance(model, MSNForPreTraining):
        model.update_target(0.0)
