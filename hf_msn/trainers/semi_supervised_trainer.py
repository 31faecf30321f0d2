"""Base of the trainers with a support set of labelled images beside each batch: PAWS and SimCLR + SuNCEt."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..data.datasets import as_crops
from ..data.labels import check_class_names
from ..data.samplers import ClassStratifiedSampler
from ..data.support import SupportCollator, SupportDataset, support_loader
from ..files import read_json, write_json
from ..models.modeling_pretraining import SemiSupervisedModel
from .argument_names import in_terms_of
from .checkpoints import CheckpointError
from .pretraining_arguments import SemiSupervisedArguments
from .pretraining_trainer import PretrainingTrainer

logger = logging.get_logger(__name__)

LABELLED_IMAGES_FILE = "labelled_images.json"
# Parameters of the sampler, and the arguments of a training that have them.
_SAMPLER_FIELDS = {
    "global_classes": "global_support_classes",
    "global_images_per_class": "global_support_images_per_class",
    "shard": "support_shard",
    "on_small_class": "support_on_small_class",
}


def make_support_sampler(labels: np.ndarray, args: TrainingArguments, **settings) -> ClassStratifiedSampler:
    """Return the sampler of supports that the arguments of a training describe. Its errors name these."""
    fields = {name: getattr(args, field) for name, field in _SAMPLER_FIELDS.items() if hasattr(args, field)}
    with in_terms_of(_SAMPLER_FIELDS):
        return ClassStratifiedSampler(labels, seed=args.seed, **fields, **settings)


class SemiSupervisedTrainer(PretrainingTrainer):
    """Base of [`PAWSTrainer`] and [`SuNCEtTrainer`]: every micro-batch comes with a support set.

    The images of a support set depend on the seed and the number of the micro-batch alone, so that a resumed run goes
    on with the next one. The labelled rows are saved with each checkpoint, and a run does not resume with others.

    Args:
        model ([`SemiSupervisedModel`]): The model to train.
        args ([`SemiSupervisedArguments`]): The settings that change over training, and the size of the support.
        support_dataset ([`SupportDataset`]): The labelled images. No label of another image is read.
        data_collator (`Callable`, *optional*): Collator of the unlabelled images, by default [`MultiViewCollator`].
        kwargs: As in `transformers.Trainer`; `train_dataset` returns the views of the unlabelled images.
    """

    args: SemiSupervisedArguments

    def __init__(
        self,
        model: SemiSupervisedModel,
        args: SemiSupervisedArguments,
        support_dataset: SupportDataset,
        data_collator=None,
        **kwargs,
    ):
        super().__init__(model, args, data_collator, **kwargs)
        if not isinstance(support_dataset, SupportDataset):
            raise ValueError(
                f"`support_dataset` must be a SupportDataset, the labelled images, but is {support_dataset!r:.80}. "
                "Pass `SupportDataset(images, labelled_rows, transform)`."
            )
        self.label_names = []  # an eval_dataset has a loss without labels of its own
        self.support_dataset = support_dataset
        sampler = self.support_sampler()
        if sampler.global_classes < 2:
            raise ValueError(
                f"A support must have at least 2 classes to tell apart, but has {sampler.global_classes} of the "
                f"{len(sampler.class_sizes)} with labelled images. Label images of another class, or raise "
                "`global_support_classes`."
            )
        self._supports: Iterator[dict[str, torch.Tensor]] | None = None
        self._micro_batch = self._next_support = 0
        self._evaluation_support: dict[str, torch.Tensor] | None = None

    def train(self, *args, **kwargs):
        if self.is_world_process_zero():
            logger.info(self.support_sampler().describe(self.support_dataset.views_per_image))
        try:
            return super().train(*args, **kwargs)
        finally:
            self._supports = None  # ends its workers

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training and "support_pixel_values" not in inputs and self.needs_support():
            inputs = {**inputs, **self._support_for_evaluation()}
        return super().compute_loss(model, inputs, return_outputs)

    def num_broken(self) -> dict[str, int]:
        return {**super().num_broken(), **self.count_broken("broken_labelled_images", self.support_dataset)}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        if self.args.adapt_shortcut_scales:
            scales = [name for name, p in model.named_parameters() if p.ndim == 1 and name.endswith(".weight")]
            names += [name for name in scales if ".downsample." in name]
        return names

    # Supports

    def support_sampler(self, start_step: int = 0) -> ClassStratifiedSampler:
        """Return the sampler of this rank's part of the supports. Its steps are micro-batches."""
        rank, world_size = self.support_ranks()
        ranks = {"rank": rank, "world_size": world_size}
        return make_support_sampler(self.support_dataset.labels, self.args, start_step=start_step, **ranks)

    def needs_support(self) -> bool:
        """Return whether the next micro-batch is trained with a support."""
        return True

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.needs_support():
            inputs = {**inputs, **self._load_support()}
        return super().training_step(model, inputs, num_items_in_batch)

    def _load_support(self) -> dict[str, torch.Tensor]:
        update, accumulated = self.state.global_step, self.args.gradient_accumulation_steps
        if self._supports is None or not update * accumulated <= self._micro_batch < (update + 1) * accumulated:
            self._micro_batch = update * accumulated  # a new update; the last of an epoch may have had fewer
        if self._supports is None or self._next_support > self._micro_batch:
            loader = support_loader(
                self._support_to_load(),
                self.support_sampler(start_step=self._micro_batch),
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            )
            self._supports, self._next_support = iter(loader), self._micro_batch
        with self.throughput.waiting():
            while self._next_support <= self._micro_batch:
                support = next(self._supports)
                self._next_support += 1
        self._micro_batch += 1
        return support

    def inputs_of_one_image(self) -> dict[str, torch.Tensor]:
        support = self._support_for_evaluation() if self.needs_support() else {}
        return {**super().inputs_of_one_image(), **support}

    def _support_to_load(self) -> SupportDataset:
        dataset = self.support_dataset
        return as_crops(dataset) if type(dataset) is SupportDataset and self.finishes_views_of(dataset) else dataset

    def _support_for_evaluation(self) -> dict[str, torch.Tensor]:
        """Return one support, the same for every evaluation."""
        if self._evaluation_support is None:
            dataset = self._support_to_load()
            items = [dataset[position] for position in self.support_sampler().batch(0)]
            self._evaluation_support = self._prepare_inputs(SupportCollator()(items))
        return self._evaluation_support

    # Checks

    def check_before_training(self) -> None:
        super().check_before_training()
        check_class_names(self.support_dataset, self.train_dataset)
        self.check_two_global_views()

    def check_checkpoint(self, checkpoint: str) -> None:
        super().check_checkpoint(checkpoint)
        file = Path(checkpoint, LABELLED_IMAGES_FILE)
        if not file.is_file():
            return
        here = self.labelled_images()
        there = {"sample_sha256": here["sample_sha256"], **read_json(file)}  # earlier versions have none
        if any(there[name] != value for name, value in here.items()):
            shared = len(set(there["rows"]) & set(here["rows"]))
            raise CheckpointError(
                f"'{checkpoint}' was trained with other labelled images: {len(there['rows'])} there, "
                f"{len(here['rows'])} here, {shared} rows in both. Give the same data, mask or list file, or start a "
                "new run in another `output_dir`."
            )

    # Record

    def labelled_images(self) -> dict:
        """Return the labelled rows, their labels and a hash of their images, as plain JSON types."""
        support = self.support_dataset
        return {
            "rows": support.rows.tolist(),
            "labels": support.labels.tolist(),
            "class_names": support.class_names,
            "sample_sha256": support.sample_sha256,
        }

    def save_records(self, folder: Path) -> None:
        super().save_records(folder)
        write_json(folder / LABELLED_IMAGES_FILE, self.labelled_images())
