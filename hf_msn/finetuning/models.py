"""Models to fine-tune: an encoder from anywhere, under a linear head or a projection head."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTMSNForImageClassification,
)

from ..checks import did_you_mean
from ..hub.export import load_under_head
from ..models.configuration_pretraining import PretrainingConfig
from ..models.configuration_suncet import SuNCEtConfig
from ..models.modeling_head_classifier import HeadClassifierConfig, HeadForImageClassification
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_pretraining import SemiSupervisedModel
from ..models.modeling_suncet import SuNCEtForPreTraining
from ..models.paws_resnets import PAWS_NETWORKS
from ..models.pretrained_encoders import copy_encoder, load_encoder, own_fields, read_source, select_fields

Start = str | Path | PreTrainedConfig | PreTrainedModel
_LOSS_FIELDS = {"temperature": 0.1, "label_smoothing": 0.0}  # belong to pretraining, not to the weights


def load_for_suncet(start: Start, seed: int, **config_fields) -> SuNCEtForPreTraining:
    """Load the encoder of `start` under a projection head and, if `start` has one, a prediction head.

    Heads that PAWS or SuNCEt trained are kept where `config_fields` do not change their shape.

    `start` and `config_fields` are those of [`finetune_classifier`]; fresh weights depend on `seed` alone.

    Raises:
        ValueError: If the checkpoint is of another kind, or a field does not fit its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(start, PreTrainedConfig):
            fields = select_fields(SuNCEtConfig, own_fields(start), start.model_type)
            return SuNCEtForPreTraining(SuNCEtConfig(**{**fields, **config_fields}))
        source, encoder, fields, name = _source(start)
        heads = source if isinstance(source, SemiSupervisedModel) else None
        fields = {**select_fields(SuNCEtConfig, fields, name), **_LOSS_FIELDS}
        fields["prediction_head"] = getattr(heads, "prediction_head", None) is not None
        model = SuNCEtForPreTraining(SuNCEtConfig(**{**fields, **config_fields}))
    copy_encoder(encoder, model.encoder, model.config, fields, name)
    for head in ("projection_head", "prediction_head"):
        trained, fresh = getattr(heads, head, None), getattr(model, head)
        if trained is not None and fresh is not None and _shapes(trained) == _shapes(fresh):
            fresh.load_state_dict(trained.state_dict())
    return model


def load_for_classification(
    start: Start,
    classes: np.ndarray,
    class_names: list[str] | None,
    seed: int,
    zero_init_head: bool = True,
    start_layer: str = "backbone",
    **config_fields,
) -> ViTMSNForImageClassification | TimmWrapperForImageClassification | HeadForImageClassification:
    """Load the encoder of `start` under a linear head, as a model of plain transformers.

    Output j is class `classes[j]`, ascending; `class_names` are by class number. With `start_layer="fc1"` the first
    layer of the projection head of `start` is between them, in a [`HeadForImageClassification`].

    Raises:
        ValueError: As for [`load_for_suncet`], if plain transformers has no such network, or `start` has no head.
    """
    names = [str(number) if class_names is None else class_names[number] for number in classes.tolist()]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: column for column, name in enumerate(names)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if start_layer == "fc1":
            model = _head_classifier(start, labels, config_fields)
        elif (source := load_for_suncet(start, seed, **config_fields)).config.timm_model is None:
            config = source.config.to_vit_msn_config()
            config.id2label, config.label2id = labels["id2label"], labels["label2id"]
            model = ViTMSNForImageClassification(config)
            model.vit.load_state_dict(source.encoder.state_dict())
        else:
            model = _timm_classifier(source, labels)
    if zero_init_head:
        head = linear_head(model)
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model


def _head_classifier(start: Start, labels: dict, config_fields: dict) -> HeadForImageClassification:
    source, encoder, fields, name = (None, None, {}, "") if isinstance(start, PreTrainedConfig) else _source(start)
    is_msn = isinstance(source, MSNForPreTraining)
    head = source.target_projection_head if is_msn else getattr(source, "projection_head", None)
    if head is None:
        raise _no_head(name)
    standard = HeadClassifierConfig()
    for field in config_fields:
        if not hasattr(standard, field):
            hint = did_you_mean(field, vars(standard)) or "Leave it out."
            raise ValueError(f"`{field}` must be a field of the encoder or of its head, but neither has it. {hint}")
    fields = select_fields(HeadClassifierConfig, fields, name)
    if is_msn:
        fields["projection_activation"] = "gelu"
    model = HeadForImageClassification(HeadClassifierConfig(**{**fields, **config_fields, **labels}))
    copy_encoder(encoder, model.encoder, model.config, fields, name)
    trained = {key: value for key, value in head.state_dict().items() if key.startswith(("fc1.", "bn1."))}
    if _shapes(model.projection_head) != {key: value.shape for key, value in trained.items()}:
        for field in ("projection_batch_norm", "projection_hidden_dim"):
            if getattr(model.config, field) != getattr(source.config, field):
                raise ValueError(
                    f"`{field}` must be {getattr(source.config, field)}, as in the projection head of '{name}' that "
                    f"`start_layer` 'fc1' keeps, but is {getattr(model.config, field)}. Leave it out."
                )
    model.projection_head.load_state_dict(trained)
    return model


def unshared_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict, cloned: in a file of a network of timm no two names may share a tensor."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_start(name: str | None, start_layer: str) -> None:
    """Raise a `ValueError` if there is no such model, or none with a head for `start_layer`. Read no weights."""
    config = None if name is None else read_source(name)
    if start_layer == "fc1" and not isinstance(config, PretrainingConfig):
        raise _no_head(name)


def _no_head(name: str | None) -> ValueError:
    return ValueError(
        "`start_layer` 'fc1' is the first layer of the projection head of a pretraining model, but "
        f"{f'{name!r} has no such head' if name else 'there is no checkpoint to start from'}. Give such a checkpoint "
        "as the model, or `start_layer` 'backbone'."
    )


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """Return the last layer of a model of [`load_for_classification`]."""
    timm_model = getattr(model, "timm_model", None)
    return model.classifier if timm_model is None else timm_model.get_classifier()


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def _timm_classifier(source: SuNCEtForPreTraining, labels: dict) -> TimmWrapperForImageClassification:
    name = source.config.timm_model
    if source.config.small_image_stem or name in PAWS_NETWORKS:
        raise ValueError(
            f"A classifier must be a network that plain transformers can build, but '{name}' has parts that timm "
            "lacks. Fine-tune it with `head` suncet or `start_layer` fc1, or start from another network."
        )
    config = TimmWrapperConfig(architecture=name, model_args=source.config.timm_options or None, **labels)
    model = TimmWrapperForImageClassification(config)
    load_under_head(model.timm_model, source.encoder, name)
    return model


def _source(start: str | Path | PreTrainedModel) -> tuple[PreTrainedModel | None, nn.Module, dict, str]:
    """Return the model that `start` names, if it has heads; its encoder; its fields; and its name."""
    if not isinstance(start, PreTrainedModel):
        return *load_encoder(start), str(start)
    encoder = getattr(start, "evaluation_encoder", start if start.config.model_type == "vit_msn" else None)
    if encoder is None:
        raise ValueError(
            f"The model to fine-tune is a {type(start).__name__}, but must be a pretraining model of hf_msn or a "
            "ViTMSNModel."
        )
    return start, getattr(encoder, "vit", encoder), own_fields(start.config), type(start).__name__
