"""Accuracy of a fine-tuned model on labelled images, the work shared by all ranks."""

import datasets
import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.labels import class_numbers
from ..evaluation.features import extract_features
from ..evaluation.probes import SoftNearestNeighborProbe
from ..models.modeling_suncet import SuNCEtForPreTraining
from .arguments import FinetuningArguments


class _LogitsAsProjections(nn.Module):
    """Lets the feature extraction, which reads, shares out and skips images, compute logits."""

    def __init__(self, classifier: PreTrainedModel):
        super().__init__()
        self.classifier = classifier

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classifier(pixel_values=pixel_values).logits


class _HeadInputsAsProjections(_LogitsAsProjections):
    """The same for what the head of a classifier gets."""

    def __init__(self, classifier: PreTrainedModel, head: nn.Module):
        super().__init__(classifier)
        self._seen: list[torch.Tensor] = []
        self._hook = head.register_forward_pre_hook(lambda module, inputs: self._seen.append(inputs[0]))

    def project(self, pixel_values: torch.Tensor) -> torch.Tensor:
        super().project(pixel_values)
        return self._seen.pop()

    def end(self) -> None:
        self._hook.remove()


def extract_head_inputs(
    model: PreTrainedModel,
    head: nn.Module,
    dataset: datasets.Dataset,
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    rows: np.ndarray,
    on_broken_image: str = "skip",
) -> np.ndarray:
    """The features (N, D), float32, that `head` gets for the readable images among `rows`."""
    inputs = _HeadInputsAsProjections(model, head)
    settings = {"features": "projection", **_settings(args, on_broken_image)}
    try:
        return extract_features(inputs, dataset, image_processor, rows=rows, **settings).features
    finally:
        inputs.end()


def predict_logits(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    rows: np.ndarray | None = None,
    on_broken_image: str = "skip",
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C), float32, of the readable images among `rows` (by default all), and their rows (N,)."""
    found = extract_features(
        _LogitsAsProjections(model),
        dataset,
        image_processor,
        rows=rows,
        features="projection",
        **_settings(args, on_broken_image),
    )
    return found.features, found.rows


def classifier_accuracy(
    model: PreTrainedModel,
    classes: np.ndarray,
    dataset: datasets.Dataset,
    rows: np.ndarray | None,
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    on_broken_image: str = "skip",
) -> dict[str, float]:
    """`{"top1": percent}` of the images in `rows`, by default of all; output j of the model is class `classes[j]`."""
    logits, rows = predict_logits(model, dataset, image_processor, args, rows, on_broken_image)
    return {"top1": _percent(classes[logits.argmax(axis=1)] == class_numbers(dataset, rows))}


def suncet_accuracy(
    model: SuNCEtForPreTraining,
    labelled: datasets.Dataset,
    support_rows: np.ndarray,
    dataset: datasets.Dataset,
    rows: np.ndarray | None,
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    on_broken_image: str = "skip",
) -> dict[str, float]:
    """`{"projection": percent, "backbone": percent}`: [`SoftNearestNeighborProbe`] with labelled images as supports.

    Args:
        model ([`SuNCEtForPreTraining`]): The model.
        labelled (`datasets.Dataset`), support_rows (`numpy.ndarray`): The supports.
        dataset (`datasets.Dataset`), rows (`numpy.ndarray`, *optional*): The images to classify; by default all.
        image_processor (`BaseImageProcessor`): Of both.
        args ([`FinetuningArguments`]): Batch size and precision.
        on_broken_image (`str`, *optional*, defaults to `"skip"`): "skip" or "raise".
    """
    accuracies = {}
    for space in ("projection", "backbone"):
        settings = {"features": space, **_settings(args, on_broken_image)}
        supports = extract_features(model, labelled, image_processor, rows=support_rows, **settings)
        images = extract_features(model, dataset, image_processor, rows=rows, **settings)
        probe = SoftNearestNeighborProbe(temperature=model.config.temperature)
        probe.fit(supports.features, class_numbers(labelled, supports.rows))
        predicted = probe.classes_[probe.predict_scores(images.features).argmax(axis=1)]
        accuracies[space] = _percent(predicted == class_numbers(dataset, images.rows))
    return accuracies


def _settings(args: FinetuningArguments, on_broken_image: str) -> dict:
    return {
        "batch_size": args.per_device_eval_batch_size,
        "num_workers": args.dataloader_num_workers,
        "dtype": torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        "on_broken_image": on_broken_image,
    }


def _percent(right: np.ndarray) -> float:
    return 100.0 * int(right.sum()) / len(right)
