"""Encoders to start from: a ViTMSN or a network of timm, new or with the weights of a checkpoint."""

from pathlib import Path

import timm
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperModel,
    ViTMSNModel,
)

from ..checks import did_you_mean
from .configuration_pretraining import VIT_FIELDS, AnyEncoderConfig, PretrainingConfig
from .encoder import PatchDroppingViTMSNModel


def build_encoder(config: AnyEncoderConfig) -> tuple[nn.Module, int]:
    """Return a new encoder as `config` describes it, and the width of its features."""
    if config.timm_model is None:
        return PatchDroppingViTMSNModel(config), config.hidden_size
    options = dict(config.timm_options or {})
    _check_name("`timm_model`", config.timm_model)
    try:
        encoder = _create_network(config.timm_model, options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # each network checks in its own way
        raise ValueError(
            f"`timm_options` {options} do not fit '{config.timm_model}': {error}. Correct or leave out that option."
        ) from error
    if config.small_image_stem:
        _make_stem_small(encoder, config.timm_model)
    return encoder, getattr(encoder, "head_hidden_size", None) or encoder.num_features


def read_source(name_or_path: str | Path) -> PreTrainedConfig | None:
    """Return the configuration of a checkpoint to start from; `None` for "timm:ARCHITECTURE". Reads no weights.

    Raises:
        ValueError: If there is no such checkpoint or architecture, or no encoder can be taken from it.
    """
    name = str(name_or_path)
    if name.startswith("timm:"):
        architecture = name.removeprefix("timm:")
        _check_name(f"The name in '{name}'", architecture)
        if not timm.is_model_pretrained(architecture):
            raise ValueError(
                f"'{name}' must name weights that timm has released, but there are none of '{architecture}'. "
                f"`timm.list_pretrained('{architecture.partition('.')[0]}.*')` lists them."
            )
        return None
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            "The model to start from must be a folder of `save_pretrained`, a Hub id or 'timm:ARCHITECTURE', but "
            f"'{name}' cannot be loaded: {error}"
        ) from error
    if not isinstance(config, PretrainingConfig) and config.model_type not in ("vit_msn", "timm_wrapper"):
        raise ValueError(
            "The model to start from must be of hf_msn, a ViTMSN, a network of timm or 'timm:ARCHITECTURE', but "
            f"'{name}' is of type '{config.model_type}'."
        )
    return config


def load_encoder(name_or_path: str | Path) -> tuple[PreTrainedModel | None, nn.Module, dict]:
    """Return the pretraining model of a checkpoint, if it is of one, its encoder, and the fields that describe it.

    Args:
        name_or_path (`str` or `Path`): Hub id or folder of a ViTMSN model, of a network of timm in timm's own form,
            with or without classifier, or of a pretraining model of this package, whose evaluated encoder is taken; or
            "timm:ARCHITECTURE", with timm's released weights.
    """
    config = read_source(name_or_path)
    if config is None:
        name = str(name_or_path).removeprefix("timm:")
        return None, timm.create_model(name, pretrained=True, num_classes=0), {"timm_model": name}
    if config.model_type == "timm_wrapper":
        encoder = TimmWrapperModel.from_pretrained(name_or_path).timm_model
        return None, encoder, {"timm_model": config.architecture, "timm_options": config.model_args}
    if config.model_type == "vit_msn":
        return None, ViTMSNModel.from_pretrained(name_or_path), own_fields(config)
    model = AutoModelForPreTraining.from_pretrained(name_or_path)
    return model, model.evaluation_encoder, own_fields(config)


def own_fields(config: PreTrainedConfig) -> dict:
    """Return the fields of a configuration without those of a checkpoint and of a classifier."""
    left_out = ("model_type", "architectures", "transformers_version", "dtype", "id2label", "label2id")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def select_fields(config_class: type[PreTrainedConfig], fields: dict, name_or_path: str | Path) -> dict:
    """Return those of an encoder's fields that `config_class` has."""
    if fields.get("timm_model") and not hasattr(config_class, "timm_model"):
        raise ValueError(
            f"The encoder of '{name_or_path}' is '{fields['timm_model']}' of timm, but a {config_class.__name__} has "
            "a ViTMSN. Use BYOL, PAWS or SuNCEt for it."
        )
    of_heads = "head_initializer_range"  # the heads are fresh, and each method starts them in its own way
    return {key: value for key, value in fields.items() if hasattr(config_class, key) and key != of_heads}


def copy_encoder(
    source: nn.Module, encoder: nn.Module, config: PreTrainedConfig, fields: dict, name_or_path: str | Path
) -> None:
    """Copy the weights of `source` into an encoder made from `config`, interpolating the position embeddings."""
    if getattr(config, "timm_model", None) is not None:
        standard = type(config)()
        for name in VIT_FIELDS:
            if getattr(config, name) != fields.get(name, getattr(standard, name)):
                raise ValueError(
                    f"`{name}` describes a ViT, but the encoder of '{name_or_path}' is '{config.timm_model}' of timm, "
                    "which ignores it. Leave it out."
                )
    weights = source.state_dict()
    position_key = "embeddings.position_embeddings"
    if position_key in weights and config.patch_size == fields.get("patch_size"):
        num_tokens = 1 + config.num_patches
        if weights[position_key].shape[1] != num_tokens:
            like = weights[position_key].new_empty(1, num_tokens, weights[position_key].shape[2])
            side = config.image_size
            weights[position_key] = source.embeddings.interpolate_pos_encoding(like, side, side).detach()
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"The encoder of '{name_or_path}' does not fit the configuration. Leave the fields that describe the "
            f"encoder (`hidden_size`, `timm_options`, ...) as the checkpoint has them. {error}"
        ) from error


def _create_network(name: str, options: dict) -> nn.Module:
    """Return a network of timm whose residual blocks do not start at 0, as in the authors' code of PAWS."""
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **{"zero_init_last": False, **options})
    except TypeError as error:
        if "zero_init_last" not in str(error):
            raise
    return timm.create_model(name, pretrained=False, num_classes=0, **options)  # has no such blocks


def _check_name(what: str, name: str) -> None:
    if not timm.is_model(name):
        raise ValueError(
            f"{what} must be an architecture of timm, but is {name!r}. `timm.list_models()` lists them. "
            f"{did_you_mean(name, timm.list_models())}".rstrip()
        )


def _make_stem_small(encoder: nn.Module, name: str) -> None:
    """Replace a ResNet's stem, 7x7 of stride 2 and pooling, by a 3x3 convolution of stride 1 without pooling."""
    stem = encoder.stem if isinstance(getattr(encoder, "stem", None), nn.Sequential) else encoder
    convolution, pooling = ("conv", "pool") if stem is not encoder else ("conv1", "maxpool")
    old = getattr(stem, convolution, None)
    if not isinstance(old, nn.Conv2d) or not hasattr(stem, pooling):
        raise ValueError(
            f"`small_image_stem` is for ResNets of timm whose stem is one convolution and pooling, but {name!r} has "
            "another. Use resnet18, resnet50, resnetv2_18 or the like, or leave `small_image_stem` off."
        )
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=old.bias is not None)
    with torch.no_grad():
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(stem, convolution, new)
    setattr(stem, pooling, nn.Identity())
