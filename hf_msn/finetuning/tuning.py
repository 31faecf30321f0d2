"""Fine-tuning on labelled images alone: some of the labels choose the best epoch, never a test set."""

import copy
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback

from ..data.labels import class_names, class_numbers, labelled_rows
from ..data.map_style import image_dataset
from ..data.support import SupportDataset
from ..data.transforms import MultiViewTransform
from ..evaluation.weights_hash import weights_sha256
from ..hub.run_record import changed_arguments
from ..models.modeling_pretraining import SemiSupervisedModel
from ..trainers.checkpoints import find_last_checkpoint, resolve_checkpoint
from .arguments import ClassifierFinetuningArguments, FinetuningArguments, SuNCEtFinetuningArguments
from .batches import classifier_loader, suncet_loader
from .evaluation import classifier_accuracy, feature_extractor, head_inputs, suncet_accuracy
from .models import Start, linear_head, load_for_classification, load_for_suncet
from .result import FinetuningResult
from .standardization import Standardization
from .trainer import BestEpochCallback, FinetuningTrainer
from .validation_split import validation_split

# Settings in which a resumed run may differ from the stopped one. Batches are counted over all ranks together.
_MAY_DIFFER = (
    "per_device_train_batch_size",
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "save_total_limit",
    "dataloader_num_workers",
)
# Settings of `TrainingArguments` that settle the batches and the learning rates, and must be the same.
_INHERITED = ("num_train_epochs", "gradient_accumulation_steps")


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
    """Train a linear classifier on an encoder, and the encoder with it, by cross-entropy on labelled images.

    Some labelled images of each class are held out; the epoch with the highest accuracy on them is kept, the first of
    equals. No label of another row is read.

    Args:
        start (`str`, `Path`, `PreTrainedModel` or `PreTrainedConfig`): A folder or Hub id of MSN, PAWS, SuNCEt or a
            plain ViTMSN; "timm:ARCHITECTURE", with timm's released weights; such a model itself, which does not
            change; or a configuration such as [`SuNCEtConfig`], to start from scratch.
        dataset (`datasets.Dataset`): With the columns `image` and `label`, from [`load_images`].
        rows (`Sequence[int]`, `Sequence[bool]` or `numpy.ndarray`): The labelled rows: their numbers, or a mask.
        views ([`MultiViewTransform`]): Its global view is the training view of an image, another one in each epoch.
        args ([`ClassifierFinetuningArguments`]): The training arguments.
        image_processor (`BaseImageProcessor`, *optional*): Of the evaluation, saved with the model. By default
            `views.evaluation_image_processor()`.
        on_broken_image (`str`, *optional*, defaults to `"skip"`): "skip" or "raise", as in [`SupportDataset`].
        callbacks (`Sequence[TrainerCallback]`, *optional*): Callbacks of the Trainer.
        **config_fields: Fields of [`SuNCEtConfig`] that differ from those of `start`, such as `image_size`.

    Returns:
        [`FinetuningResult`]: Its `model` is a `ViTMSNForImageClassification` or `TimmWrapperForImageClassification`,
            or, with `start_layer="fc1"`, a [`HeadForImageClassification`].

    Raises:
        ValueError: If there is no labelled row, a label is no class number, there are fewer than 2 classes, a class
            has no image to hold out, or `start` does not fit.
    """
    run = _Classifier(start, dataset, rows, views, args, image_processor, on_broken_image, config_fields)
    return run.tune(callbacks)


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
    """Train encoder and heads by the SuNCEt loss (arXiv 2006.10803) on labelled images.

    Arguments, rules and errors are those of [`finetune_classifier`]. [`SoftNearestNeighborProbe`] classifies images in
    the space of the loss, by the training images; its accuracy chooses the epoch. Heads of PAWS or SuNCEt are kept.
    The loss is of the predictions where `start` has a prediction head and `config_fields` do not set `prediction_head`
    to False, else of the projections. `temperature` is 0.1 and `label_smoothing` 0 unless `config_fields` have others.

    Returns:
        [`FinetuningResult`]: Its `model` is a [`SuNCEtForPreTraining`].
    """
    run = _SuNCEt(start, dataset, rows, views, args, image_processor, on_broken_image, config_fields)
    return run.tune(callbacks)


class _Tuning:
    """One run: train, keep the best epoch, and train again on all labels with `refit`. A subclass is a head.

    It has `build_model()`, `make_trainer(model, rows, args)` and `measure(model, support_rows, dataset, rows)`, which
    returns accuracies in percent and the number of images.
    """

    head: str

    def __init__(self, start, dataset, rows, views, args, image_processor, on_broken_image, config_fields):
        self.start, self.dataset, self.views, self.args = start, image_dataset(dataset), views, args
        self.image_processor = image_processor or views.evaluation_image_processor()
        self.on_broken_image = on_broken_image
        self.extract = feature_extractor(self.image_processor, args, on_broken_image)
        self.config_fields = {"image_size": views.image_size, **config_fields}
        self.rows = labelled_rows(self.dataset, mask=rows)
        self.labels, self.class_names = class_numbers(self.dataset, self.rows), class_names(self.dataset)
        self.classes = np.unique(self.labels)
        if len(self.classes) < 2:
            raise ValueError(
                f"Fine-tuning needs at least 2 classes, but all {len(self.rows)} labelled images are of class "
                f"{self.classes[0]}. Label images of another class."
            )
        self.train_rows, self.held_out = validation_split(
            self.rows, self.labels, args.validation_fraction, args.seed, self.class_names
        )

    def tune(self, callbacks: Sequence[TrainerCallback]) -> FinetuningResult:
        args, started = self.args, time.monotonic()
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        refit_dir = Path(args.output_dir, "refit")
        if checkpoint is None and args.should_save:
            shutil.rmtree(refit_dir, ignore_errors=True)  # of an earlier run, with overwrite_output_dir
        model, best = self._train(self.train_rows, args, callbacks, checkpoint, self.held_out)
        last = best
        if args.refit:
            shorter = copy.copy(args)
            shorter.num_train_epochs = best.best_epoch
            shorter.output_dir = args.output_dir if args.save_strategy == "no" else str(refit_dir)
            found = None if checkpoint is None else find_last_checkpoint(refit_dir)
            model, last = self._train(self.rows, shorter, callbacks, found)
        elif best.best_weights is not None:
            model.load_state_dict(best.best_weights)
        self.finish(model)
        run = {"arguments": changed_arguments(args), "wall_time_seconds": time.monotonic() - started}
        named = isinstance(self.start, (str, Path))
        run["start"] = str(self.start) if named else getattr(self.start, "name_or_path", None) or None
        return FinetuningResult(
            model=model.eval(),
            head=self.head,
            best_epoch=best.best_epoch,
            accuracy_by_epoch=best.by_epoch,
            trained_rows=self.rows if args.refit else self.train_rows,
            held_out_rows=self.held_out,
            num_trained_images=int((~last.is_broken).sum()),
            num_held_out_images=best.num_measured,
            labelled=self.dataset,
            labels=self.labels,
            classes=self.classes,
            class_names=self.class_names,
            image_processor=self.image_processor,
            args=args,
            measure=lambda dataset: self.measure(model, self.rows, dataset, None),
            run=run,
        )

    def finish(self, model: PreTrainedModel) -> None:
        """Bring the trained model to the form in which it is saved."""

    def _train(
        self,
        rows: np.ndarray,
        args: FinetuningArguments,
        callbacks: Sequence[TrainerCallback],
        checkpoint: str | Path | None,
        held_out: Sequence[int] = (),
    ) -> tuple[PreTrainedModel, BestEpochCallback]:
        """Return the trained model, and the callback with its accuracies and the images that could not be read."""
        model = self.build_model()
        # Compare the weights of the start, not its path: the folder may be moved or spelled in another way.
        start = f"a model with the weights {weights_sha256(model)[:16]}"
        trainer = self.make_trainer(model, rows, args)
        settings = {name: getattr(args, name) for name in _INHERITED}
        settings |= {name: value for name, value in changed_arguments(args).items() if name not in _MAY_DIFFER}
        data = {"rows": rows.tolist(), "images": trainer.train_dataset.sample_sha256}
        settings |= {**asdict(self.views), **self.config_fields, **data, "start": start}
        measure = partial(self.measure, support_rows=rows, dataset=self.dataset, rows=held_out)
        best = BestEpochCallback(trainer, measure if len(held_out) else None, settings)
        for callback in (best, *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), best

    def _support(self, rows: np.ndarray, views_per_image: int = 1) -> SupportDataset:
        settings = {"views_per_image": views_per_image, "seed": self.args.seed}
        return SupportDataset(self.dataset, rows, self.views, on_broken_image=self.on_broken_image, **settings)


class _Classifier(_Tuning):
    head = "linear"
    standardization: Standardization | None = None

    def build_model(self) -> PreTrainedModel:
        labels, args = (self.classes, self.class_names), self.args
        how = (args.seed, args.zero_init_head, args.start_layer)
        return load_for_classification(self.start, *labels, *how, **self.config_fields)

    def make_trainer(self, model: PreTrainedModel, rows: np.ndarray, args: FinetuningArguments) -> FinetuningTrainer:
        if args.standardize_features or (args.standardize_features is None and args.freeze_encoder):
            features = head_inputs(model, linear_head(model), self.dataset, rows, self.extract)
            self.standardization = Standardization(model, features)
        loader = classifier_loader(self._support(rows), self.classes, args)
        return FinetuningTrainer(model, args, loader, head=linear_head)

    def measure(self, model, support_rows, dataset, rows) -> tuple[dict[str, float], int]:
        return classifier_accuracy(model, self.classes, dataset, rows, self.extract)

    def finish(self, model: PreTrainedModel) -> None:
        if self.standardization is not None:
            self.standardization.fold(model)


def suncet_heads(model: SemiSupervisedModel) -> nn.ModuleList:
    """Return the heads that train with `freeze_encoder`."""
    return nn.ModuleList([head for head in (model.projection_head, model.prediction_head) if head is not None])


class _SuNCEt(_Tuning):
    head = "suncet"

    def build_model(self) -> PreTrainedModel:
        return load_for_suncet(self.start, self.args.seed, **self.config_fields)

    def make_trainer(self, model: PreTrainedModel, rows: np.ndarray, args: FinetuningArguments) -> FinetuningTrainer:
        loader = suncet_loader(self._support(rows, args.support_views_per_image), args)
        return FinetuningTrainer(model, args, loader, head=suncet_heads)

    def measure(self, model, support_rows, dataset, rows) -> tuple[dict[str, float], int]:
        return suncet_accuracy(model, self.dataset, support_rows, dataset, rows, self.extract)
