"""Fine-tuning on labelled images alone: the best epoch is chosen by some of the labels, never by a test set."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback

from ..data.labels import class_names, class_numbers, labelled_rows
from ..data.support import SupportDataset
from ..data.transforms import MultiViewTransform
from ..hub.run_record import changed_arguments
from .arguments import ClassifierFinetuningArguments, FinetuningArguments, SuNCEtFinetuningArguments
from .batches import classifier_loader, suncet_loader
from .heads import fold_head, standardize_head
from .held_out import held_out_rows
from .measuring import classifier_accuracy, suncet_accuracy
from .result import FinetuningResult
from .starts import Start, load_for_classification, load_for_suncet
from .trainer import BestEpochCallback, FinetuningTrainer


def finetune_classifier(
    start: Start,
    dataset: datasets.Dataset,
    rows: Sequence[int] | Sequence[bool] | np.ndarray,
    views: MultiViewTransform,
    args: ClassifierFinetuningArguments,
    *,
    image_processor: BaseImageProcessor | None = None,
    on_broken_image: str = "skip",
    callbacks: Sequence[TrainerCallback] = (),
    **config_fields: Any,
) -> FinetuningResult:
    """Trains a linear classifier on an encoder, and the encoder with it, by cross-entropy on labelled images.

    Of each class some labelled images are held out; the epoch with the highest accuracy on them is kept, the first of
    equals. No label of another row is read.

    Args:
        start (`str`, `Path`, `PreTrainedModel` or `PreTrainedConfig`): A folder or Hub id of MSN, PAWS, SuNCEt or a
            plain ViTMSN; "timm:ARCHITECTURE", with timm's released weights; such a model itself, which is left as it
            is; or a configuration such as [`SuNCEtConfig`], to start from scratch.
        dataset (`datasets.Dataset`): With the columns `image` and `label`, as [`load_images`] gives it.
        rows (`Sequence[int]`, `Sequence[bool]` or `numpy.ndarray`): The labelled rows: their numbers, or a mask.
        views ([`MultiViewTransform`]): Its global view is what an image is trained in, another in each epoch.
        args ([`ClassifierFinetuningArguments`]): What changes over training.
        image_processor (`BaseImageProcessor`, *optional*): Of the evaluation, saved with the model. By default
            `views.evaluation_image_processor()`.
        on_broken_image (`str`, *optional*, defaults to `"skip"`): "skip" or "raise", as in [`SupportDataset`].
        callbacks (`Sequence[TrainerCallback]`, *optional*): Of the Trainer.
        **config_fields: Fields of [`SuNCEtConfig`] that differ from those of `start`, such as `image_size`.

    Returns:
        [`FinetuningResult`]: Its `model` is a `ViTMSNForImageClassification` or `TimmWrapperForImageClassification`.

    Raises:
        ValueError: No labelled row, a label that is no class number, fewer than 2 classes, a class that can give no
            image to hold out, or a start that does not fit.
    """
    labels = _Labelled(dataset, rows, args)

    def build() -> PreTrainedModel:
        return load_for_classification(
            start, labels.classes, labels.class_names, args.seed, args.zero_init_head, **_fields(views, config_fields)
        )

    def measure(model, supports, on, on_rows):
        return classifier_accuracy(model, labels.classes, on, on_rows, processor, args, on_broken_image)

    def trainer_on(model, train_rows, args) -> FinetuningTrainer:
        support = SupportDataset(dataset, train_rows, views, seed=args.seed, on_broken_image=on_broken_image)
        if args.standardize_features or (args.standardize_features is None and args.freeze_encoder):
            standardize_head(model, dataset, train_rows, processor, args, on_broken_image)
        return FinetuningTrainer(model, args, classifier_loader(support, labels.classes, args), _encoder)

    processor = image_processor or views.evaluation_image_processor()
    result = _tune("linear", labels, build, trainer_on, measure, processor, args, callbacks)
    result.run["start"] = _name_of(start)
    fold_head(result.model)
    return result


def finetune_suncet(
    start: Start,
    dataset: datasets.Dataset,
    rows: Sequence[int] | Sequence[bool] | np.ndarray,
    views: MultiViewTransform,
    args: SuNCEtFinetuningArguments,
    *,
    image_processor: BaseImageProcessor | None = None,
    on_broken_image: str = "skip",
    callbacks: Sequence[TrainerCallback] = (),
    **config_fields: Any,
) -> FinetuningResult:
    """Trains encoder and projection head by the SuNCEt loss (arXiv 2006.10803) on labelled images.

    Arguments, rules and errors are those of [`finetune_classifier`]. Images are classified by
    [`SoftNearestNeighborProbe`] in the space of the projections, by those that are trained on; the accuracy there
    chooses the epoch. A projection head of PAWS or SuNCEt is carried over; `temperature` is 0.1 and nothing is
    smoothed unless `config_fields` say otherwise.

    Returns:
        [`FinetuningResult`]: Its `model` is a [`SuNCEtForPreTraining`].
    """
    labels = _Labelled(dataset, rows, args)

    def build() -> PreTrainedModel:
        return load_for_suncet(start, args.seed, **_fields(views, config_fields))

    def measure(model, supports, on, on_rows):
        return suncet_accuracy(model, dataset, supports, on, on_rows, processor, args, on_broken_image)

    def trainer_on(model, train_rows, args) -> FinetuningTrainer:
        support = SupportDataset(
            dataset,
            train_rows,
            views,
            views_per_image=args.support_views_per_image,
            seed=args.seed,
            on_broken_image=on_broken_image,
        )
        return FinetuningTrainer(model, args, suncet_loader(support, args), _encoder)

    processor = image_processor or views.evaluation_image_processor()
    result = _tune("suncet", labels, build, trainer_on, measure, processor, args, callbacks)
    result.run["start"] = _name_of(start)
    return result


@dataclass(init=False)
class _Labelled:
    """The labelled rows, their classes, and which of them are held out."""

    rows: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    class_names: list[str] | None
    train_rows: np.ndarray
    held_out: np.ndarray

    def __init__(self, dataset: datasets.Dataset, rows, args: FinetuningArguments):
        self.dataset = dataset
        self.rows = labelled_rows(dataset, mask=rows)
        self.labels, self.class_names = class_numbers(dataset, self.rows), class_names(dataset)
        self.classes = np.unique(self.labels)
        if len(self.classes) < 2:
            raise ValueError(
                f"Fine-tuning tells classes apart and needs at least 2, but all {len(self.rows)} labelled images are "
                f"of class {self.classes[0]}. Label images of another class."
            )
        self.train_rows, self.held_out = held_out_rows(
            self.rows, self.labels, args.validation_fraction, args.seed, self.class_names
        )


def _tune(
    head: str,
    labels: _Labelled,
    build: Callable[[], PreTrainedModel],
    trainer_on: Callable[[PreTrainedModel, np.ndarray, FinetuningArguments], FinetuningTrainer],
    measure: Callable[..., dict[str, float]],
    image_processor: BaseImageProcessor,
    args: FinetuningArguments,
    callbacks: Sequence[TrainerCallback],
) -> FinetuningResult:
    def train(rows: np.ndarray, args, measure_held_out=None) -> tuple[PreTrainedModel, BestEpochCallback]:
        trainer = trainer_on(build(), rows, args)
        best = BestEpochCallback(trainer, measure_held_out)
        for callback in (best, *callbacks):
            trainer.add_callback(callback)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), best

    def on_held_out(model: PreTrainedModel) -> dict[str, float]:
        return measure(model, labels.train_rows, labels.dataset, labels.held_out)

    started = time.monotonic()
    model, best = train(labels.train_rows, args, on_held_out if len(labels.held_out) else None)
    supports = labels.rows if args.refit else labels.train_rows
    if args.refit:
        shorter = copy.copy(args)
        shorter.num_train_epochs = best.best_epoch
        model, _ = train(labels.rows, shorter)
    elif best.best_weights is not None:
        model.load_state_dict(best.best_weights)
    return FinetuningResult(
        model=model.eval(),
        head=head,
        best_epoch=best.best_epoch,
        accuracy_by_epoch=best.by_epoch,
        trained_rows=supports,
        held_out_rows=labels.held_out,
        labelled=labels.dataset,
        labels=labels.labels,
        classes=labels.classes,
        class_names=labels.class_names,
        image_processor=image_processor,
        args=args,
        measure=lambda on: measure(model, labels.rows, on, None),
        run={"arguments": changed_arguments(args), "wall_time_seconds": time.monotonic() - started},
    )


def _name_of(start: Start) -> str | None:
    """The checkpoint that fine-tuning started from, if it has a name."""
    return str(start) if isinstance(start, (str, Path)) else getattr(start, "name_or_path", None) or None


def _fields(views: MultiViewTransform, config_fields: dict[str, Any]) -> dict[str, Any]:
    return {"image_size": views.image_size, **config_fields}


def _encoder(model: PreTrainedModel) -> nn.Module:
    """What a frozen encoder is: everything but the head."""
    for name in ("vit", "encoder"):
        if hasattr(model, name):
            return getattr(model, name)
    return _AllButHead(model.timm_model)


class _AllButHead:
    """A network of timm without its classifier, which has no module of its own."""

    def __init__(self, network: nn.Module):
        self.network, self.head = network, network.get_classifier()

    def requires_grad_(self, requires_grad: bool) -> None:
        self.network.requires_grad_(requires_grad)
        self.head.requires_grad_(True)

    def eval(self) -> None:
        self.network.eval()
        self.head.train()
