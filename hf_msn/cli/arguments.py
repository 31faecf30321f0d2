"""The fields of a recipe that no other object of the package has: data, labels, initial weights, evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
from transformers.hf_argparser import HfArg

from ..checks import check_choice, check_integer, check_number
from ..data.labels import draw_labelled_rows, labelled_rows
from ..data.sources import load_images
from ..evaluation.backbones import FeatureSpace
from ..evaluation.low_shot import BASELINES
from ..evaluation.probes import KNNProbe, LogisticProbe, SoftNearestNeighborProbe
from ..models.configuration_pretraining import VIT_FIELDS
from ..trainers.argument_names import in_terms_of
from .parser import Parser
from .recipe_files import read_config

PROBES = {"logistic": LogisticProbe, "soft_nearest_neighbor": SoftNearestNeighborProbe, "knn": KNNProbe}
LABEL_SOURCES = (
    "labelled_list_file",
    "labelled_rows_file",
    "labelled_dataset",
    "labelled_images_per_class",
    "labelled_fraction",
)


@dataclass
class DataArguments:
    """The source of the training images; see [`load_images`]."""

    dataset: str = HfArg(
        default="digits",
        help="digits (bundled), a folder of images, a save_to_disk folder, parquet or tar shards, or a Hub id.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a Hub data set.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a Hub data set.")
    train_split: str = HfArg(default="train", help="Split to train on.")
    image_column: str | None = HfArg(default=None, help="Column of the images; found by default.")
    label_column: str | None = HfArg(
        default=None, help="Column of the labels; found by default. Training reads labelled rows only."
    )
    streaming: bool = HfArg(default=False, help="Read while training instead of downloading first.")
    on_broken_image: Literal["skip", "raise"] = HfArg(
        default="skip", help="skip: log it, count it, take the next image. raise: stop."
    )

    def load(
        self,
        split: str | None = None,
        dataset: str | None = None,
        split_field: str = "train_split",
        dataset_field: str = "dataset",
    ):
        """Load the images of a split, by default of `train_split`; or of another data set with the same columns.

        Errors name the fields from which `split` and `dataset` come.
        """
        names = {"source": dataset_field, "split": split_field, "config": "dataset_config"}
        with in_terms_of({**names, "revision": "dataset_revision"}):
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
    """The initial weights and the attention of the model."""

    from_backbone: str | None = HfArg(
        default=None, help="Encoder to start from, such as facebook/vit-msn-small; random by default."
    )
    attn_implementation: str | None = HfArg(
        default=None, help="sdpa (default), eager, or another one of transformers."
    )


def check_encoder_fields(values: dict[str, Any], timm_model: str | None) -> None:
    """Check that no field of the ViT is given for a network of timm, which would ignore it."""
    ignored = [name for name in VIT_FIELDS if name in values]
    if timm_model is not None and ignored:
        raise ValueError(
            f"`{ignored[0]}` describes the ViT that trains without `timm_model`, but `timm_model` is '{timm_model}'. "
            "Leave one of them out; settings of a timm network go into `timm_options`."
        )


@dataclass
class LabelArguments:
    """The labelled images, from exactly one of `LABEL_SOURCES`. Training reads no label of another image."""

    labelled_list_file: str | None = HfArg(
        default=None, help="File with the names of the labelled images, one per line: 1percent.txt."
    )
    labelled_rows_file: str | None = HfArg(
        default=None, help="A .npy or .txt file: row numbers of the labelled images, or 0 or 1 for every row."
    )
    labelled_dataset: str | None = HfArg(
        default=None, help="A second data set whose images are all labelled; `dataset` is used without labels."
    )
    labelled_split: str | None = HfArg(default=None, help="Split of the labelled data set; train.")
    labelled_images_per_class: int | None = HfArg(
        default=None, help="For experiments: draw this many images per class. Reads all labels once."
    )
    labelled_fraction: float | None = HfArg(
        default=None, help="For experiments: draw this share of each class, such as 0.01. Reads all labels once."
    )
    labelled_seed: int = HfArg(default=0, help="Seed of the draw of labelled images.")
    support_views_per_image: int = HfArg(default=1, help="Views of each labelled image in a support set.")

    def __post_init__(self):
        given = [name for name in LABEL_SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"The labelled images must have exactly one source, but {', '.join(given) or 'none'} "
                f"{'is' if len(given) < 2 else 'are'} given. Give one of {', '.join(LABEL_SOURCES)}."
            )
        if self.labelled_split is not None and self.labelled_dataset is None:
            raise ValueError("`labelled_split` belongs to `labelled_dataset`, which is not given. Give both.")

    def load(self, data: DataArguments, dataset) -> tuple[datasets.Dataset, np.ndarray]:
        """Return the data set that holds the labelled images, and their rows in it. `data` describes `dataset`."""
        if self.labelled_dataset is not None:
            labelled = data.load(
                self.labelled_split or "train", self.labelled_dataset, "labelled_split", "labelled_dataset"
            )
            return labelled, np.arange(len(labelled))
        if data.streaming:
            raise ValueError(
                "A stream has no row numbers, by which labelled images are found. Give a `labelled_dataset`, or load "
                "the data without `streaming`."
            )
        if self.labelled_list_file is not None:
            return dataset, labelled_rows(dataset, list_file=self.labelled_list_file)
        if self.labelled_rows_file is not None:
            with in_terms_of({"mask": "labelled_rows_file"}):
                return dataset, labelled_rows(dataset, mask=read_rows_file(self.labelled_rows_file, len(dataset)))
        size = {"images_per_class": self.labelled_images_per_class, "fraction": self.labelled_fraction}
        with in_terms_of({name: f"labelled_{name}" for name in ("images_per_class", "fraction", "seed")}):
            return dataset, draw_labelled_rows(dataset, **size, seed=self.labelled_seed)


def read_rows_file(path: str | Path, num_rows: int) -> np.ndarray:
    """Read row numbers, or a mask with one entry for each of `num_rows` rows, from a .npy or a text file."""
    try:
        values = np.load(path) if Path(path).suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"`labelled_rows_file` must hold row numbers, or 0 or 1 for every row, but '{path}' cannot be read: "
            f"{error}"
        ) from error
    is_mask = values.shape == (num_rows,) and num_rows > 2 and set(values.tolist()) <= {0, 1}
    return values.astype(bool) if is_mask else values


def read_fields(arguments: list[str], variant: str, default: str, make_parser: Callable[[str], Parser]) -> dict:
    """Return the fields of `--config RECIPE` and of the command line, which override those of the file."""
    config, in_file, kind = read_config(arguments, variant, default)
    parser = make_parser(kind)
    given = parser.read(arguments)
    in_file = parser.read_values(in_file, f"'{config}'")
    if "config" in in_file:
        raise ValueError(f"`config` must be a flag, but '{config}' has it: a recipe takes no fields of another one.")
    if set(LABEL_SOURCES) & set(given):
        in_file = {name: value for name, value in in_file.items() if name not in (*LABEL_SOURCES, "labelled_split")}
    given.pop("config", None)
    return {**in_file, **given}


@dataclass
class LowShotArguments:
    """The low-shot evaluation during training; see [`LowShotEvaluator`]."""

    low_shot_every_epochs: int = HfArg(default=0, help="Epochs between evaluations; 0: none.")
    low_shot_train_split: str | None = HfArg(
        default=None, help="Split that the labelled images are drawn from; by default that of training."
    )
    low_shot_test_split: str = HfArg(default="test", help="Split that accuracy is measured on.")
    low_shot_test_dataset: str | None = HfArg(
        default=None, help="Data set of that split; by default the one to train on."
    )
    low_shot_images_per_class: tuple[int, ...] = HfArg(
        default=(1, 2, 5),
        help="Labelled images per class, one evaluation for each number. Methods that train with labels are evaluated "
        "with those alone.",
    )
    low_shot_probe: Literal[tuple(PROBES)] = HfArg(default="logistic", help="Classifier on the features.")
    low_shot_features: Literal[get_args(FeatureSpace)] = HfArg(
        default="backbone",
        help="backbone: the published features. projection: the space of the loss. prediction: after the prediction "
        "head, as PAWS was measured on ImageNet.",
    )
    low_shot_baselines: tuple[str, ...] | None = HfArg(
        default=BASELINES,
        help="Measured beside the model: knn, the nearest labelled images vote; untrained, the same network with "
        "random weights; pixels, the images at 64 x 64 or less. none: none.",
    )
    crop_fraction: float = HfArg(
        default=224 / 256, help="Side of the evaluation's centre crop over the resized shortest edge; 1 keeps all."
    )

    def __post_init__(self):
        check_integer("low_shot_every_epochs", self.low_shot_every_epochs, 0, remedy="0 is never.")
        for count in self.low_shot_images_per_class:
            check_integer("low_shot_images_per_class", count)
        check_number("crop_fraction", self.crop_fraction, above=0, maximum=1, remedy="1 keeps the whole image.")
        for baseline in self.low_shot_baselines or ():
            check_choice("low_shot_baselines", baseline, BASELINES)
