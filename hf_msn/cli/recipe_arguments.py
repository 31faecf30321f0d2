"""The parts of a recipe that no other object of the package has: data, labels, start of the model, evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..data.labels import draw_labelled_rows, labelled_rows
from ..data.sources import load_images
from ..evaluation.probes import KNNProbe, LogisticProbe, Probe, SoftNearestNeighborProbe
from ..trainers.argument_names import in_terms_of

PROBES = {"logistic": LogisticProbe, "soft_nearest_neighbor": SoftNearestNeighborProbe, "knn": KNNProbe}


@dataclass
class DataArguments:
    """Where the training images come from; see [`load_images`]."""

    dataset: str = field(
        default="digits",
        metadata={
            "help": "digits (bundled), a folder of images, a save_to_disk folder, parquet or tar shards, or a Hub id."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; by default it is found."})
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of the labels; by default it is found. Training reads only labelled rows'."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of downloading first."})
    on_broken_image: str = field(
        default="skip", metadata={"help": "skip: name it, count it, take the next. raise: stop there."}
    )

    def load(self, split: str | None = None, dataset: str | None = None):
        """The images of a split, by default the training split; of another data set with the same columns if given."""
        return load_images(
            dataset or self.dataset,
            split=split or self.train_split,
            config=self.dataset_config if dataset is None else None,
            revision=self.dataset_revision if dataset is None else None,
            streaming=self.streaming and split is None,
            image_column=self.image_column,
            label_column=self.label_column,
        )


@dataclass
class ModelArguments:
    """How the model starts, beside its configuration."""

    from_backbone: str | None = field(
        default=None,
        metadata={"help": "Start from this trunk, such as facebook/vit-msn-small, instead of from scratch."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), eager, or another that transformers knows."}
    )


@dataclass
class LabelArguments:
    """Which images are labelled; exactly one way of saying it. No label of another image is read in training."""

    labelled_list_file: str | None = field(
        default=None, metadata={"help": "File with the names of the labelled images, a line each: 1percent.txt."}
    )
    labelled_rows_file: str | None = field(
        default=None,
        metadata={"help": "A .npy or .txt file: row numbers of the labelled images, or 0 or 1 for every row."},
    )
    labelled_dataset: str | None = field(
        default=None,
        metadata={"help": "A second data set, all of whose images are labelled; `dataset` is used without labels."},
    )
    labelled_split: str | None = field(
        default=None, metadata={"help": "Split of the labelled data set; by default train."}
    )
    labelled_images_per_class: int | None = field(
        default=None,
        metadata={"help": "For experiments: draw this many labelled images of each class. Reads all labels once."},
    )
    labelled_fraction: float | None = field(
        default=None,
        metadata={"help": "For experiments: draw this share of each class, such as 0.01. Reads all labels once."},
    )
    labelled_seed: int = field(default=0, metadata={"help": "Seed of the draw of labelled images."})
    support_views_per_image: int = field(
        default=1, metadata={"help": "Views of each labelled image in a support set."}
    )

    def __post_init__(self):
        given = [name for name in WAYS_OF_LABELLING if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Which images are labelled must be said in exactly one way, but {', '.join(given) or 'none'} "
                f"{'is' if len(given) < 2 else 'are'} given. Give one of {', '.join(WAYS_OF_LABELLING)}."
            )
        if self.labelled_split is not None and self.labelled_dataset is None:
            raise ValueError("`labelled_split` is of a second data set. Give `labelled_dataset` too, or leave it out.")

    def load(self, data: DataArguments, dataset) -> tuple[datasets.Dataset, np.ndarray]:
        """The data set that holds the labelled images, and their rows in it.

        Args:
            data ([`DataArguments`]): How `dataset` was loaded; a second data set is loaded with the same columns.
            dataset (`datasets.Dataset` or `datasets.IterableDataset`): The images to train on.
        """
        if self.labelled_dataset is not None:
            labelled = load_images(
                self.labelled_dataset,
                split=self.labelled_split or "train",
                image_column=data.image_column,
                label_column=data.label_column,
            )
            return labelled, np.arange(len(labelled))
        if data.streaming:
            raise ValueError(
                "A streamed data set has no numbered rows to pick the labelled ones from. Give the labelled images as "
                "a `labelled_dataset`, or load the data without `streaming`."
            )
        if self.labelled_list_file is not None:
            return dataset, labelled_rows(dataset, list_file=self.labelled_list_file)
        if self.labelled_rows_file is not None:
            with in_terms_of({"mask": "labelled_rows_file"}):
                return dataset, labelled_rows(dataset, mask=read_rows_file(self.labelled_rows_file, len(dataset)))
        size = {"images_per_class": self.labelled_images_per_class, "fraction": self.labelled_fraction}
        fields = {name: f"labelled_{name}" for name in ("images_per_class", "fraction", "seed")}
        with in_terms_of(fields):
            return dataset, draw_labelled_rows(dataset, **size, seed=self.labelled_seed)


WAYS_OF_LABELLING = (
    "labelled_list_file",
    "labelled_rows_file",
    "labelled_dataset",
    "labelled_images_per_class",
    "labelled_fraction",
)


def read_rows_file(path: str | Path, num_rows: int) -> np.ndarray:
    """Row numbers, or a mask with one entry for each of `num_rows` rows, from a .npy file or a text file of numbers.

    Raises:
        ValueError: If the file is not there or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file '{path}' with the labelled rows. Check `labelled_rows_file`.")
    try:
        values = (
            np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)
        )
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"'{path}' must hold row numbers, or 0 or 1 for every row, but cannot be read: {error}"
        ) from error
    is_mask = values.shape == (num_rows,) and num_rows > 2 and set(values.tolist()) <= {0, 1}
    return values.astype(bool) if is_mask else values


def without_replaced_labels(in_file: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The fields of a recipe file less how it says which images are labelled, if a field of `given` says it too."""
    if not set(WAYS_OF_LABELLING) & set(given):
        return in_file
    return {name: value for name, value in in_file.items() if name not in (*WAYS_OF_LABELLING, "labelled_split")}


def check_is_a_folder(output_dir: str) -> None:
    """Raises a `ValueError` if a file is where the folder `output_dir`, or one above it, should be."""
    for path in (Path(output_dir), *Path(output_dir).parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(
                    f"`output_dir` '{output_dir}' must be a folder, but '{path}' is a file. Give another."
                )
            return


@dataclass
class LowShotArguments:
    """The low-shot evaluation while training; see [`LowShotEvaluator`]."""

    low_shot_every_epochs: int = field(default=0, metadata={"help": "Evaluate every this many epochs; 0: never."})
    low_shot_train_split: str | None = field(
        default=None, metadata={"help": "Split that the labelled images are drawn from; by default that of training."}
    )
    low_shot_test_split: str = field(default="validation", metadata={"help": "Split that accuracy is measured on."})
    low_shot_test_dataset: str | None = field(
        default=None, metadata={"help": "Data set of that split; by default the one to train on."}
    )
    low_shot_images_per_class: tuple[int, ...] = field(
        default=(1, 2, 5),
        metadata={
            "help": "Labelled images a class, one evaluation for each number. Methods that train with labels are "
            "evaluated with those alone."
        },
    )
    low_shot_probe: str = field(
        default="logistic", metadata={"help": "Classifier on the features: logistic, soft_nearest_neighbor or knn."}
    )
    low_shot_features: str = field(
        default="backbone",
        metadata={"help": "backbone: what is kept. projection: the space that the loss compares images in."},
    )
    crop_fraction: float = field(
        default=224 / 256,
        metadata={"help": "Side of the evaluation's centre crop over the resized shortest edge; 1 keeps all."},
    )

    def __post_init__(self):
        if self.low_shot_probe not in PROBES:
            raise ValueError(f"`low_shot_probe` must be one of {', '.join(PROBES)}, but is '{self.low_shot_probe}'.")

    def make_probe(self) -> Probe:
        """The probe that `low_shot_probe` names."""
        return PROBES[self.low_shot_probe]()
