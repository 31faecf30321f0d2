"""What replicas compare and how they are initialised, by the kind of model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...distributed.codistillation import call_model, logits_of
from ...models.modeling_byol import BYOLForPreTraining
from ...models.modeling_msn import MSNForPreTraining
from ...models.modeling_paws import PAWSForPreTraining
from ...models.modeling_pretraining import TargetModel
from ...models.modeling_suncet import SuNCEtForPreTraining


def predictions_for(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    """Return the function output -> predictions of a model. SuNCEt and BYOL, which predict no class, are refused.

    For MSN the log-assignments of the anchors to the prototypes, for PAWS the log-probabilities of the classes of the
    anchors, for other models the `logits`.
    """
    if isinstance(model, (BYOLForPreTraining, SuNCEtForPreTraining)):
        raise ValueError(
            f"Codistillation compares predictions of classes, but {type(model).__name__} makes none. Pass "
            "`predictions`, a function of the output."
        )
    return log_assignments_of if isinstance(model, (MSNForPreTraining, PAWSForPreTraining)) else logits_of


def log_assignments_of(output: Any) -> torch.Tensor:
    """Return log p of the anchors, `(V*B, C)`."""
    p = output["anchor_probabilities"]
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def forward_for(model: nn.Module) -> Callable[[nn.Module, Any], Any]:
    """Return the function (copy, batch) -> output. A copy of MSN drops the patches that the model has dropped."""
    if not isinstance(model, TargetModel):
        return call_model

    def forward(copy: nn.Module, batch: Any) -> Any:
        if model._mask_draw is not None:
            seed, drawn = model._mask_draw  # counted by the forward pass of the model
            copy._mask_draw = (seed, drawn - 1)
        return call_model(copy, batch)

    return forward


def mask_for(model: nn.Module, batch: Any, predictions: torch.Tensor) -> torch.Tensor | None:
    """Return the positions with a label, `(B, L)`, of predictions `(B, L, C)`; `None` for other predictions."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if predictions.dim() != 3 or not torch.is_tensor(labels) or labels.shape != predictions.shape[:-1]:
        return None
    counts = labels != -100
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # predicts the next label
        counts = nn.functional.pad(counts[:, 1:], (0, 1))
    return counts


def origin_of(model: nn.Module) -> str:
    """Return the checkpoint that the weights, or those of the trunk, come from; an empty string if there is none."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "trunk_from", None) or ""


@torch.no_grad()
def reinitialize(model: PreTrainedModel) -> None:
    """Draw the trainable parameters again, as the class of the model does."""
    fresh = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(fresh[name])
    if isinstance(model, TargetModel):
        model.update_target(0.0)
