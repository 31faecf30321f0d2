"""Accuracy of a fine-tuned model on labelled images. The ranks share the work."""

from collections.abc import Callable

import datasets
import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.labels import class_numbers
from ..evaluation.features import Features, extract_features
from ..evaluation.probes import SoftNearestNeighborProbe
from ..models.modeling_suncet import SuNCEtForPreTraining
from .arguments import FinetuningArguments


class _AsProjections(nn.Module):
    """Give a function of the images the name `project`, from which feature extraction takes its values."""

    def __init__(self, model: PreTrainedModel, project: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.project = model, project


def extract_head_inputs(
    model: PreTrainedModel,
    head: nn.Module,
    dataset: datasets.Dataset,
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    rows: np.ndarray,
    on_broken_image: str = "skip",
) -> np.ndarray:
    """Return the inputs (N, D), float32, of `head` for the readable images among `rows`."""
    seen: list[torch.Tensor] = []

    def project(pixel_values: torch.Tensor) -> torch.Tensor:
        model(pixel_values=pixel_values)
        return seen.pop()

    with head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        found = _extract(_AsProjections(model, project), dataset, rows, image_processor, args, on_broken_image)
    return found.features


def classifier_accuracy(
    model: PreTrainedModel,
    classes: np.ndarray,
    dataset: datasets.Dataset,
    rows: np.ndarray | None,
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    on_broken_image: str = "skip",
) -> dict[str, float]:
    """Return `{"top1": percent}` of the images in `rows`, by default of all; output j of the model is `classes[j]`."""
    logits = _AsProjections(model, lambda pixel_values: model(pixel_values=pixel_values).logits)
    found = _extract(logits, dataset, rows, image_processor, args, on_broken_image)
    return {"top1": _percent(classes[found.features.argmax(axis=1)] == class_numbers(dataset, found.rows))}


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
    """Return the accuracy of [`SoftNearestNeighborProbe`], fitted on labelled images.

    Args:
        model ([`SuNCEtForPreTraining`]): The model.
        labelled (`datasets.Dataset`), support_rows (`numpy.ndarray`): The supports.
        dataset (`datasets.Dataset`), rows (`numpy.ndarray`, *optional*): The images to classify; by default all.
        image_processor (`BaseImageProcessor`): Of both.
        args ([`FinetuningArguments`]): Batch size and precision.
        on_broken_image (`str`, *optional*, defaults to `"skip"`): "skip" or "raise".

    Returns:
        `dict[str, float]`: `{"projection": percent, "backbone": percent}`, the spaces that images are compared in.
    """
    accuracies = {}
    for space in ("projection", "backbone"):
        supports = _extract(model, labelled, support_rows, image_processor, args, on_broken_image, space)
        images = _extract(model, dataset, rows, image_processor, args, on_broken_image, space)
        probe = SoftNearestNeighborProbe(temperature=model.config.temperature)
        probe.fit(supports.features, class_numbers(labelled, supports.rows))
        predicted = probe.classes_[probe.predict_scores(images.features).argmax(axis=1)]
        accuracies[space] = _percent(predicted == class_numbers(dataset, images.rows))
    return accuracies


def _extract(
    model: nn.Module,
    dataset: datasets.Dataset,
    rows: np.ndarray | None,
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    on_broken_image: str,
    space: str = "projection",
) -> Features:
    return extract_features(
        model,
        dataset,
        image_processor,
        rows=rows,
        features=space,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        on_broken_image=on_broken_image,
    )


def _percent(right: np.ndarray) -> float:
    return 100.0 * int(right.sum()) / len(right)
