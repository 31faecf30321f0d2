"""The result of fine-tuning: the model of the best epoch, and how it was chosen."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch.distributed as dist
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.labels import check_every_class_is_learnt, class_names, class_numbers, numbered_as
from ..data.map_style import image_dataset
from ..distributed.collectives import is_distributed, rank
from ..evaluation.backbones import evaluated_module, weights_sha256
from ..evaluation.weights_hash import file_sha256
from ..files import write_json
from ..hub.run_record import describe_data, describe_hardware, write_run
from ..trainers.semi_supervised_trainer import LABELLED_IMAGES_FILE
from .arguments import FinetuningArguments
from .models import unshared_weights

RESULT_FILE = "finetune.json"
RESULT_FORMAT = "hf_msn fine-tuning 1"
_STAGING = ".incomplete-"


@dataclass
class FinetuningResult:
    """A fine-tuned model, and how its epoch was chosen.

    Attributes:
        model (`PreTrainedModel`): The model of the best epoch, in evaluation mode; with `refit`, trained again on all
            labelled images.
        head (`str`): "linear" or "suncet".
        best_epoch (`int`): The epochs of its training.
        accuracy_by_epoch (`dict[int, dict[str, float]]`): On the held-out images in percent, by the number of
            finished epochs. A classifier has "top1"; SuNCEt has "projection" (or "prediction"), which decides, and
            "backbone".
        trained_rows, held_out_rows (`numpy.ndarray`): The training rows, and the rows that chose the epoch. They
            overlap only with `refit`.
        num_trained_images, num_held_out_images (`int`): How many of these could be read.
        classes (`numpy.ndarray`): Class numbers, ascending: output j of a classifier is class `classes[j]`.
        class_names (`list[str]`, *optional*): Names by class number.
        image_processor (`BaseImageProcessor`): The image processor of the evaluation.
        test_accuracy (`dict[str, float]`, *optional*): Result of [`~FinetuningResult.test`].
        test_data (`dict[str, Any]`, *optional*): Name, split and fingerprint of the test images.
        run (`dict[str, Any]`): Further entries of `run.json`: start, wall time, recipe.
    """

    model: PreTrainedModel
    head: str
    best_epoch: int
    accuracy_by_epoch: dict[int, dict[str, float]]
    trained_rows: np.ndarray
    held_out_rows: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    class_names: list[str] | None
    num_trained_images: int
    num_held_out_images: int
    image_processor: BaseImageProcessor
    args: FinetuningArguments
    labelled: datasets.Dataset = field(repr=False)
    measure: Callable[[datasets.Dataset], tuple[dict[str, float], int]] = field(repr=False)
    test_accuracy: dict[str, float] | None = None
    num_test_images: int | None = None
    test_data: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def validation_accuracy(self) -> float | None:
        """Accuracy of the best epoch on the held-out labelled images, in percent; `None` without such images.

        It chose the epoch, so it is an optimistic measure, more so after a pretraining with the same labels.
        """
        accuracies = self.accuracy_by_epoch.get(self.best_epoch)
        return None if accuracies is None else next(iter(accuracies.values()))

    def test(self, dataset: datasets.Dataset) -> dict[str, float]:
        """Measure the model on other labelled images. Every rank must call it.

        SuNCEt classifies by all labelled images, including the held-out ones.

        Raises:
            ValueError: If an image has no label, or the data has other class names or a class that training lacks.
        """
        dataset = numbered_as(self.labelled, image_dataset(dataset))
        labels = class_numbers(dataset)
        check_every_class_is_learnt(self.classes, labels, "labelled images", class_names(dataset))
        self.test_accuracy, self.num_test_images = self.measure(dataset)
        counts = {"num_images": self.num_test_images, "num_skipped": len(labels) - self.num_test_images}
        fingerprint = getattr(dataset, "_fingerprint", None)
        self.test_data = {**describe_data(dataset), **counts, "fingerprint": fingerprint}
        return self.test_accuracy

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `finetune.json`."""
        return {
            "format": RESULT_FORMAT,
            "weights_sha256": weights_sha256(evaluated_module(self.model)[0]),
            "head": self.head,
            "best_epoch": self.best_epoch,
            "validation_accuracy": self.validation_accuracy,
            "test_accuracy": self.test_accuracy,
            "num_test_images": self.num_test_images,
            "test_data": self.test_data,
            "accuracy_by_epoch": {str(epoch): values for epoch, values in self.accuracy_by_epoch.items()},
            "seed": self.args.seed,
            "num_train_epochs": int(self.args.num_train_epochs),
            "validation_fraction": self.args.validation_fraction,
            "refit": self.args.refit,
            "num_labelled_images": len(self.labels),
            "num_trained_images": self.num_trained_images,
            "num_held_out_images": self.num_held_out_images,
            "classes": self.classes.tolist(),
            "class_names": None if self.class_names is None else [self.class_names[number] for number in self.classes],
            "trained_rows": self.trained_rows.tolist(),
            "held_out_rows": self.held_out_rows.tolist(),
        }

    def save(self, output_dir: str | os.PathLike) -> None:
        """Write the model, its image processor, `labelled_images.json`, `run.json` and, last, `finetune.json`.

        Files are written to a temporary folder and then moved: each is whole or missing, and a folder with
        `finetune.json` is complete. Every rank must call it; rank 0 writes.
        """
        if rank() == 0:
            self._write(Path(output_dir))
        if is_distributed():
            dist.barrier()

    def describe(self) -> str:
        """Return a summary of one or two lines."""
        if self.validation_accuracy is None:
            lines = [
                f"Epoch {self.best_epoch}, the last, on {self.num_trained_images} labelled images, none held out."
            ]
        else:
            lines = [
                f"Best epoch {self.best_epoch} of {int(self.args.num_train_epochs)}: "
                f"{self.validation_accuracy:.1f} % of {self.num_held_out_images} held-out labelled images are right."
            ]
        if self.test_accuracy is not None:
            measured = ", ".join(f"{name} {value:.1f} %" for name, value in self.test_accuracy.items())
            lines.append(f"Test: {measured} of {self.num_test_images} images.")
        return "\n".join(lines)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_STAGING}*"):  # by a killed run
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as name:
            staging = Path(name)
            self.model.save_pretrained(staging, state_dict=unshared_weights(self.model))
            self.image_processor.save_pretrained(staging)
            rows = np.union1d(self.trained_rows, self.held_out_rows)
            labelled = {"rows": rows.tolist(), "labels": self.labels.tolist(), "class_names": self.class_names}
            write_json(staging / LABELLED_IMAGES_FILE, labelled)
            args = self.args
            run = {
                "method": f"fine-tuning, {self.head}",
                "data": {**describe_data(self.labelled), "num_images": self.num_trained_images},
                "hardware": describe_hardware(args),
                "epochs": self.best_epoch,
                "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
                "seed": args.seed,
            }
            write_run(staging, {**run, **self.run})
            # the hash of the encoder is the same for every head on it, that of the files is not
            files = {file.name: file_sha256(file) for file in sorted(staging.glob("*.safetensors"))}
            write_json(staging / RESULT_FILE, {**self.to_dict(), "files": files})
            (folder / RESULT_FILE).unlink(missing_ok=True)  # it describes another model
            for file in sorted(staging.iterdir(), key=lambda file: file.name == RESULT_FILE):
                os.replace(file, folder / file.name)
