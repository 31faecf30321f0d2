"""A probe's weights as the head of a classifier that loads without hf_msn."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor, ViTMSNForImageClassification

from ..evaluation.backbones import find_backbone, is_timm_model, weights_sha256
from ..evaluation.features import Features
from ..evaluation.probes import LinearProbe, LogisticProbe
from ..files import check_new_folder, whole_folder
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_semi_supervised import SemiSupervisedModel
from .export import pretraining_model
from .export_image_processor import image_processor_for
from .timm_form import check_timm_can_make, new_network, save_timm_network

logger = logging.getLogger(__name__)

_MOST_DECIDED_OTHERWISE = 0.01  # more than what rounding does


def export_classifier(
    model: MSNForPreTraining | SemiSupervisedModel,
    probe: LogisticProbe | LinearProbe,
    features: Features,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    image_processor: BaseImageProcessor | None = None,
) -> Path:
    r"""Writes the evaluated encoder under a probe as an image classifier that loads where hf_msn is not installed.

    A ViT becomes a `ViTMSNForImageClassification`, a network of timm a classifier in timm's form (see
    [`export_backbone`]); `pipeline("image-classification", path)` takes both. Every image gets the class that the
    probe gives it.

    A probe centres and normalises the [CLS] before the final LayerNorm, the classifier's head sees it after. Up to its
    epsilon the LayerNorm does the same and then scales and shifts, `y = gamma sqrt(D) x + beta`, so that

    $$W x + b = W' y + b' \quad\text{with}\quad W' = W / (\gamma \sqrt D), \quad b' = b - W' \beta .$$

    The head of a network of timm sees its features as they are: `W'` is `W`, each row minus its mean, over the mean
    length of the centred features. Ranks of classes are those of the probe, while their probabilities were computed
    for vectors of equal length. A bias would break this, so a network of timm takes a [`LogisticProbe`] only.

    Args:
        model ([`MSNForPreTraining`], [`PAWSForPreTraining`] or [`SuNCEtForPreTraining`]): The pretrained model; of MSN
            the target encoder is taken.
        probe ([`LogisticProbe`] or [`LinearProbe`]): Fitted on `features`, or on some rows of them.
        features ([`Features`]): `extract_features(model, ...)`; what is written is held against the probe on them.
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

    Example:

    ```python
    >>> features = extract_features(model, images, processor)
    >>> probe = LogisticProbe().fit(features.features, features.labels)
    >>> names = images.features["label"].names
    >>> export_classifier(model, probe, features, "runs/mine/classifier", class_names=names, image_processor=processor)
    >>> pipeline("image-classification", "runs/mine/classifier")("image.png")
    ```
    """
    model = pretraining_model(model)
    path = check_new_folder(path, "path")
    encoder = find_backbone(model)
    weight, bias = _linear_weights(probe)
    _check_features(features, encoder, weight)
    names = _names(probe.classes_, class_names)
    if is_timm_model(encoder):
        check_timm_can_make(model.config)
        if bias.any():
            raise ValueError(
                "The LinearProbe has a bias, which a network of timm cannot take: its features are not of equal "
                "length. Fit a LogisticProbe, or train the classifier with `finetune_classifier`."
            )
        weight = _fold_into_raw_features(weight, features.features)
        inputs = torch.from_numpy(features.features)
    else:
        weight, bias = _fold_into_layer_norm(weight, bias, encoder.layernorm)
        inputs = _after_layer_norm(features.features, encoder.layernorm)
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
    """W (C, D) and b (C,) of a probe, on centred vectors of length 1, in float64."""
    if not isinstance(probe, (LogisticProbe, LinearProbe)):
        raise ValueError(
            f"`probe` must be a LogisticProbe or a LinearProbe, which are linear as a classifier's head is, but is "
            f"{type(probe).__name__}. Fit one of them: `LogisticProbe().fit(features.features, features.labels)`."
        )
    if not hasattr(probe, "classes_"):
        raise ValueError("`probe` is not fitted. Call `probe.fit(features.features, features.labels)` first.")
    if isinstance(probe, LogisticProbe):
        return probe.coef_.astype(np.float64), np.zeros(len(probe.classes_))
    return probe.weight_.cpu().numpy().astype(np.float64), probe.bias_.cpu().numpy().astype(np.float64)


def _check_features(features: Features, encoder: nn.Module, weight: np.ndarray) -> None:
    if not isinstance(features, Features):
        raise ValueError(
            f"`features` must be what `extract_features(model, ...)` returns, but is {type(features)}. An array "
            "alone does not tell which weights it comes from."
        )
    if features.weights_sha256 != weights_sha256(encoder):
        raise ValueError(
            "`features` must be those of this model's encoder, which the classifier holds, but they come from other "
            "weights, from projections or from pixels. Extract them with `extract_features(model, ...)`."
        )
    if weight.shape[1] != features.features.shape[1] or weight.shape[1] != _width(encoder):
        raise ValueError(
            f"A classifier's head sees {_width(encoder)} features, but the probe was fitted on {weight.shape[1]} and "
            f"`features` have {features.features.shape[1]}. Extract with num_last_layers=1, and fit the probe on them."
        )


def _width(encoder: nn.Module) -> int:
    if is_timm_model(encoder):
        return getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return encoder.config.hidden_size


def _names(classes: np.ndarray, class_names: Sequence[str] | None) -> list[str]:
    numbers = classes.tolist()
    if class_names is None:
        return [str(number) for number in numbers]
    if isinstance(class_names, str) or not 0 <= min(numbers) <= max(numbers) < len(class_names):
        raise ValueError(
            f"`class_names` must name every class number, but there are {len(class_names)} names and the probe has "
            f"classes from {min(numbers)} to {max(numbers)}. Give them in the order of the numbers."
        )
    names = [class_names[number] for number in numbers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`class_names` must differ from each other, but {twice[:3]} stand for several classes.")
    return names


def _fold_into_layer_norm(weight: np.ndarray, bias: np.ndarray, norm: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray]:
    """Weights on what a LayerNorm gives, from those on its centred and l2-normalised input."""
    gamma, beta = (parameter.detach().cpu().double().numpy() for parameter in (norm.weight, norm.bias))
    if not gamma.all():
        raise ValueError(
            f"The final LayerNorm scales {int((gamma == 0).sum())} of {len(gamma)} features by 0, and the probe needs "
            "them. Train the classifier with `finetune_classifier(..., freeze_encoder=True)`."
        )
    folded = weight / (gamma * len(gamma) ** 0.5)
    return folded, bias - folded @ beta


def _after_layer_norm(features: np.ndarray, norm: nn.LayerNorm) -> torch.Tensor:
    with torch.no_grad():
        return norm(torch.from_numpy(features).to(norm.weight)).cpu()


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
    """Holds the head, in its own dtype, against the probe on the images that are at hand."""
    decided = nn.functional.linear(inputs.to(weight), weight, bias).argmax(dim=1).numpy()
    otherwise = int((decided != probe.predict_scores(features).argmax(axis=1)).sum())
    if otherwise > _MOST_DECIDED_OTHERWISE * len(features):
        raise ValueError(
            f"As a head in {weight.dtype} the probe gives {otherwise} of {len(features)} images another class, so it "
            "would not be the classifier that was measured. Extract and export with `model.float()`, or train the "
            "classifier with `finetune_classifier`."
        )
    if otherwise:
        logger.warning("As a head the probe gives %d of %d images another class.", otherwise, len(features))


def _vit_classifier(
    model: nn.Module, encoder: nn.Module, weight: torch.Tensor, bias: torch.Tensor, names: list[str]
) -> ViTMSNForImageClassification:
    config = model.config.to_vit_msn_config()
    config.id2label, config.label2id = dict(enumerate(names)), {name: column for column, name in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        classifier = ViTMSNForImageClassification(config).to(model.dtype)
    classifier.vit.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        classifier.classifier.weight.copy_(weight)
        classifier.classifier.bias.copy_(bias)
    return classifier


def _timm_classifier(model: nn.Module, encoder: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    network = new_network(model.config, len(weight)).to(model.dtype)
    fault = network.load_state_dict(encoder.state_dict(), strict=False)
    head = network.get_classifier()
    of_head = {
        name
        for name, value in network.state_dict(keep_vars=True).items()
        if isinstance(head, nn.Module) and any(value is parameter for parameter in head.parameters())
    }
    is_linear = isinstance(head, nn.Linear) or (isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1))
    if (
        not is_linear
        or head.weight.shape[:2] != weight.shape
        or fault.unexpected_keys
        or set(fault.missing_keys) != of_head
    ):
        raise ValueError(
            f"'{model.config.timm_model}' has no single linear layer as its head that could be put onto its features. "
            "Export the backbone, or take another network."
        )
    with torch.no_grad():
        head.weight.copy_(weight.view_as(head.weight))
        if head.bias is not None:
            head.bias.copy_(bias)
    return network
