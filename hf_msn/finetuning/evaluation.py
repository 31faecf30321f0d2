"""Accuracy of a fine-tuned model on labelled images. The ranks share the work."""

from collections.abc import Callable
from functools import partial

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

Extract = Callable[..., Features]


def feature_extractor(image_processor: BaseImageProcessor, args: FinetuningArguments, on_broken_image: str) -> Extract:
    """Return [`extract_features`] with the settings of a run."""
    return partial(
        extract_features,
        image_processor=image_processor,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        on_broken_image=on_broken_image,
    )


class _AsProjections(nn.Module):
    """Give a function of the images the name `project`, from which feature extraction takes its values."""

    def __init__(self, model: PreTrainedModel, project: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.project = model, project


def head_inputs(
    model: PreTrainedModel, head: nn.Module, dataset: datasets.Dataset, rows: np.ndarray, extract: Extract
) -> np.ndarray:
    """Return the inputs (N, D), float32, of `head` for the readable images among `rows`."""
    seen: list[torch.Tensor] = []

    def project(pixel_values: torch.Tensor) -> torch.Tensor:
        model(pixel_values=pixel_values)
        return seen.pop()

    with head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(1))):
        return extract(_AsProjections(model, project), dataset, rows=rows, features="projection").features


def classifier_accuracy(
    model: PreTrainedModel, classes: np.ndarray, dataset: datasets.Dataset, rows: np.ndarray | None, extract: Extract
) -> tuple[dict[str, float], int]:
    """Return `{"top1": percent}` of the readable images in `rows`, by default of all, and their number.

    Output j of the model is `classes[j]`.
    """
    logits = _AsProjections(model, lambda pixel_values: model(pixel_values=pixel_values).logits)
    found = extract(logits, dataset, rows=rows, features="projection")
    return {"top1": _percent(classes[found.features.argmax(axis=1)] == class_numbers(dataset, found.rows))}, len(found)


def suncet_accuracy(
    model: SuNCEtForPreTraining,
    labelled: datasets.Dataset,
    support_rows: np.ndarray,
    dataset: datasets.Dataset,
    rows: np.ndarray | None,
    extract: Extract,
) -> tuple[dict[str, float], int]:
    """Return the accuracy of [`SoftNearestNeighborProbe`] in percent, by space, and the number of readable images.

    The spaces are that of the training, projections or predictions, and the features of the backbone.
    The supports are `support_rows` of `labelled`; the images to classify are `rows` of `dataset`, by default all.
    """
    accuracies = {}
    for space in ("projection" if model.prediction_head is None else "prediction", "backbone"):
        supports = extract(model, labelled, rows=support_rows, features=space)
        images = extract(model, dataset, rows=rows, features=space)
        probe = SoftNearestNeighborProbe(temperature=model.config.temperature)
        probe.fit(supports.features, class_numbers(labelled, supports.rows))
        predicted = probe.predict(images.features)
        accuracies[space] = _percent(predicted == class_numbers(dataset, images.rows))
    return accuracies, len(images)


def _percent(right: np.ndarray) -> float:
    return 100.0 * int(right.sum()) / len(right)
