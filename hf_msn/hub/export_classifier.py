"""A probe's weights as the head of a classifier that loads without hf_msn."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from transformers import BaseImageProcessor, ViTMSNForImageClassification, ViTMSNModel
from transformers.utils import logging

from ..evaluation.backbones import find_backbone, is_timm_model, unwrapped, weights_sha256
from ..evaluation.features import Features
from ..evaluation.probes import LinearProbe, LogisticProbe
from ..files import check_new_folder, whole_folder
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_pretraining import SemiSupervisedModel
from .export import check_timm_can_make, image_processor_for, load_under_head, pretraining_model, save_timm_network

logger = logging.get_logger(__name__)

_MAX_CHANGED = 0.01  # fraction of the images; rounding changes fewer


def export_classifier(
    model: MSNForPreTraining | SemiSupervisedModel | ViTMSNModel,
    probe: LogisticProbe | LinearProbe,
    features: Features,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    image_processor: BaseImageProcessor | None = None,
) -> Path:
    r"""Write the evaluated encoder and a probe as an image classifier that loads where hf_msn is not installed.

    A ViT becomes a `ViTMSNForImageClassification`, a network of timm a classifier in timm's form (see
    [`export_backbone`]); `pipeline("image-classification", path)` loads both. Every image gets the same class as from
    the probe.

    A probe takes the centred and normalised [CLS] x before the final LayerNorm, a classifier's head the [CLS] y after
    it. Up to its epsilon the LayerNorm is `y = gamma sqrt(D) x + beta`, so that

    $$W x + b = W' y + b' \quad\text{with}\quad W' = W / (\gamma \sqrt D), \quad b' = b - W' \beta .$$

    The head of a network of timm takes raw features: `W'` is `W` with each row centred, over the mean length of the
    centred features. This keeps the ranks of the classes, but the probabilities of the probe are those of vectors of
    equal length. A bias would change the ranks: networks of timm take a [`LogisticProbe`] only.

    Args:
        model ([`MSNForPreTraining`], [`PAWSForPreTraining`], [`SuNCEtForPreTraining`] or `ViTMSNModel`): The
            pretrained model; of MSN the target encoder is taken. A `ViTMSNModel` is what [`export_backbone`] writes.
        probe ([`LogisticProbe`] or [`LinearProbe`]): Fitted on `features`, or on some rows of them; a [`LinearProbe`]
            with `affine=False`.
        features ([`Features`]): `extract_features(model, ...)`; the classifier is compared with the probe on them.
        path (`str` or `Path`): Folder to write. It must not exist or be empty.
        class_names (`Sequence[str]`, *optional*): Names by class number, such as `dataset.features["label"].names`. By
            default the numbers.
        image_processor (`BaseImageProcessor`, *optional*): As for [`export_backbone`]: the one that `features` were
            extracted with.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the probe is not fitted or cannot be a linear head, the features are not of this model, names do
            not fit the classes, or as for [`export_backbone`].
    """
    plain = unwrapped(model) if isinstance(model, nn.Module) else None
    model = plain if isinstance(plain, ViTMSNModel) else pretraining_model(model)
    path = check_new_folder(path, "path")
    encoder = find_backbone(model)
    weight, bias = _linear_weights(probe)
    _check_features(features, encoder, weight)
    names = _names(probe.classes_, class_names)
    check_timm_can_make(model.config)
    if is_timm_model(encoder):
        if bias.any():
            raise ValueError(
                "`probe` has a bias, which a network of timm cannot take: its features differ in length. Fit a "
                "LogisticProbe, or train the classifier with `finetune_classifier`."
            )
        weight = _fold_into_raw_features(weight, features.features)
        inputs = torch.from_numpy(features.features)
    else:
        weight, bias = _fold_into_layer_norm(weight, bias, encoder.layernorm)
        with torch.no_grad():
            inputs = encoder.layernorm(torch.from_numpy(features.features).to(encoder.layernorm.weight)).cpu()
    weight, bias = (torch.from_numpy(array).to(model.dtype) for array in (weight, bias))
    _check_decisions(inputs, weight, bias, probe, features.features)
    image_processor = image_processor_for(model, encoder, image_processor)

    with whole_folder(path, "path") as folder:
        if is_timm_model(encoder):
            classifier = _timm_classifier(model, encoder, weight, bias)
            save_timm_network(classifier, model.config, image_processor, folder, names)
        else:
            _vit_classifier(model, encoder, weight, bias, names).save_pretrained(folder)
            image_processor.save_pretrained(folder)
    return path


def _linear_weights(probe: LogisticProbe | LinearProbe) -> tuple[np.ndarray, np.ndarray]:
    """Return W (C, D) and b (C,) of a probe, on centred vectors of length 1, in float64."""
    if not isinstance(probe, (LogisticProbe, LinearProbe)) or not hasattr(probe, "classes_"):
        raise ValueError(
            "`probe` must be a fitted LogisticProbe or LinearProbe, which are linear like a classifier's head, but is "
            f"{type(probe).__name__}{'' if hasattr(probe, 'classes_') else ', not fitted'}. Call "
            "`LogisticProbe().fit(features.features, features.labels)`."
        )
    if isinstance(probe, LogisticProbe):
        return probe.coef_.astype(np.float64), np.zeros(len(probe.classes_))
    if probe.affine:
        raise ValueError(
            "`probe` learned scale and shift before the l2 norm, which no linear head computes. Fit "
            "`LinearProbe(affine=False)`, or a LogisticProbe."
        )
    return probe.weight_.cpu().numpy().astype(np.float64), probe.bias_.cpu().numpy().astype(np.float64)


def _check_features(features: Features, encoder: nn.Module, weight: np.ndarray) -> None:
    if not isinstance(features, Features) or features.weights_sha256 != weights_sha256(encoder):
        raise ValueError(
            "`features` must be those of this model's encoder, as `extract_features(model, ...)` returns them, but "
            f"are {type(features).__name__} or come from other weights, projections or pixels."
        )
    if is_timm_model(encoder):
        width = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    else:
        width = encoder.config.hidden_size
    if not weight.shape[1] == features.features.shape[1] == width:
        raise ValueError(
            f"A classifier's head takes {width} features, but the probe was fitted on {weight.shape[1]} and "
            f"`features` have {features.features.shape[1]}. Extract with num_last_layers=1, and fit the probe on them."
        )


def _names(classes: np.ndarray, class_names: Sequence[str] | None) -> list[str]:
    numbers = classes.tolist()
    if class_names is None:
        return [str(number) for number in numbers]
    if isinstance(class_names, str) or not 0 <= min(numbers) <= max(numbers) < len(class_names):
        raise ValueError(
            f"`class_names` must be a list with a name for each class number, but has {len(class_names)} names, and "
            f"the probe has classes from {min(numbers)} to {max(numbers)}."
        )
    names = [class_names[number] for number in numbers]
    if len(set(names)) < len(names):
        raise ValueError(f"`class_names` must differ from each other, but are {names}.")
    return names


def _fold_into_layer_norm(weight: np.ndarray, bias: np.ndarray, norm: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray]:
    """Return weights on the output of a LayerNorm, from those on its centred and l2-normalised input."""
    gamma, beta = (parameter.detach().cpu().double().numpy() for parameter in (norm.weight, norm.bias))
    if not gamma.all():
        raise ValueError(
            f"The final LayerNorm scales {int((gamma == 0).sum())} of {len(gamma)} features by 0, and the probe needs "
            "them. Train the classifier with `finetune_classifier(..., freeze_encoder=True)`."
        )
    folded = weight / (gamma * len(gamma) ** 0.5)
    return folded, bias - folded @ beta


def _fold_into_raw_features(weight: np.ndarray, features: np.ndarray) -> np.ndarray:
    centred = features.astype(np.float64) - features.mean(axis=1, keepdims=True, dtype=np.float64)
    length = np.linalg.norm(centred, axis=1).mean()
    return (weight - weight.mean(axis=1, keepdims=True)) / max(length, np.finfo(np.float32).tiny)


def _check_decisions(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    probe: LogisticProbe | LinearProbe,
    features: np.ndarray,
) -> None:
    """Compare the decisions of the head, in its own dtype, with those of the probe."""
    decided = nn.functional.linear(inputs.to(weight), weight, bias).argmax(dim=1).numpy()
    changed = int((decided != probe.predict_scores(features).argmax(axis=1)).sum())
    if changed > _MAX_CHANGED * len(features):
        raise ValueError(
            f"As a head in {weight.dtype} the probe assigns {changed} of {len(features)} images another class, so the "
            "classifier would not be the measured one. Extract and export with `model.float()`, or train the "
            "classifier with `finetune_classifier`."
        )
    if changed:
        logger.warning(f"As a head the probe assigns {changed} of {len(features)} images another class.")


def _vit_classifier(
    model: nn.Module, encoder: nn.Module, weight: torch.Tensor, bias: torch.Tensor, names: list[str]
) -> ViTMSNForImageClassification:
    if isinstance(model, ViTMSNModel):
        config = copy.deepcopy(model.config)
    else:
        config = model.config.to_vit_msn_config()
        config.pretrained_by = model.config.describe_method()
    config.id2label, config.label2id = dict(enumerate(names)), {name: column for column, name in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        classifier = ViTMSNForImageClassification(config).to(model.dtype)
    classifier.vit.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        classifier.classifier.weight.copy_(weight)
        classifier.classifier.bias.copy_(bias)
    return classifier


def _timm_classifier(model: nn.Module, encoder: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    config = model.config
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(config.timm_model, num_classes=len(weight), **(config.timm_options or {}))
    network = network.to(model.dtype)
    head = load_under_head(network, encoder, config.timm_model)
    with torch.no_grad():
        head.weight.copy_(weight.view_as(head.weight))
        if head.bias is not None:
            head.bias.copy_(bias)
    return network
