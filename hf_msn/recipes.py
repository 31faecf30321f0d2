"""Recipes: one flat YAML file for a whole run, and the same fields on the command line.

Each field has one home: what makes views is in [`MultiViewTransform`], what changes the forward pass in [`MSNConfig`],
what changes over training in [`MSNTrainingArguments`]; the data and the evaluation during training are here. A recipe
names fields of any of them; `image_size` goes to both the views and the model.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedConfig

from .callbacks import LowShotCallback
from .data import MultiViewTransform, load_images, multi_view_dataset
from .evaluation import LowShotEvaluator
from .models import MSNConfig, MSNForPreTraining
from .trainers import MSNTrainingArguments


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
        default=None, metadata={"help": "Column of the labels, which only the low-shot evaluation reads."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of downloading first."})
    on_broken_image: str = field(
        default="skip", metadata={"help": "skip: name it, count it, take the next. raise: stop there."}
    )

    def load(self, split: str | None = None):
        """The images of a split, by default the training split."""
        return load_images(
            self.dataset,
            split=split or self.train_split,
            config=self.dataset_config,
            revision=self.dataset_revision,
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
class LowShotArguments:
    """The low-shot evaluation while training; see [`LowShotEvaluator`]."""

    low_shot_every_epochs: int = field(default=0, metadata={"help": "Evaluate every this many epochs; 0: never."})
    low_shot_train_split: str | None = field(
        default=None, metadata={"help": "Split that the labelled images are drawn from; by default that of training."}
    )
    low_shot_test_split: str = field(default="validation", metadata={"help": "Split that accuracy is measured on."})
    low_shot_images_per_class: tuple[int, ...] = field(
        default=(1, 2, 5), metadata={"help": "Labelled images a class, one evaluation for each number."}
    )
    crop_fraction: float = field(
        default=224 / 256,
        metadata={"help": "Side of the evaluation's centre crop over the resized shortest edge; 1 keeps all."},
    )


@dataclass
class Recipe:
    """All settings of a run, each in the object that uses it."""

    data: DataArguments
    views: MultiViewTransform
    model: ModelArguments
    config_fields: dict[str, Any]
    training: MSNTrainingArguments
    low_shot: LowShotArguments

    def build_model(self) -> MSNForPreTraining:
        """The model from scratch, or from the trunk that the recipe names."""
        if self.model.from_backbone is not None:
            model = MSNForPreTraining.from_backbone(self.model.from_backbone, **self.config_fields)
        else:
            model = MSNForPreTraining(MSNConfig(**self.config_fields))
        if self.model.attn_implementation is not None:
            model.set_attn_implementation(self.model.attn_implementation)
        return model

    def build_train_dataset(self):
        """The views of the training images."""
        return multi_view_dataset(
            self.data.load(), self.views, seed=self.training.seed, on_broken_image=self.data.on_broken_image
        )

    def build_image_processor(self) -> BaseImageProcessor:
        """The evaluation's image processor, with the normalisation of training. It is saved with each checkpoint."""
        return self.views.evaluation_image_processor(crop_fraction=self.low_shot.crop_fraction)

    def add_low_shot_callback(self, trainer) -> None:
        """Evaluates every `low_shot_every_epochs` epochs, if the recipe asks for it."""
        if self.low_shot.low_shot_every_epochs > 0:
            evaluator = LowShotEvaluator(
                self.data.load(self.low_shot.low_shot_train_split or self.data.train_split),
                self.data.load(self.low_shot.low_shot_test_split),
                image_processor=self.build_image_processor(),
                images_per_class=self.low_shot.low_shot_images_per_class,
                seed=self.training.seed,
            )
            trainer.add_callback(LowShotCallback(trainer, evaluator, self.low_shot.low_shot_every_epochs))


# The object that each field of a recipe belongs to, and what it is called in the help.
HOMES = {
    DataArguments: "data",
    MultiViewTransform: "views",
    MSNConfig: "model",
    ModelArguments: "start of the model",
    MSNTrainingArguments: "training",
    LowShotArguments: "low-shot evaluation while training",
}


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Hands each value to the object that it belongs to, and checks what can be checked before work starts."""
    names = {cls: init_fields(cls) for cls in HOMES}

    def build(cls):
        return cls(**{name: value for name, value in values.items() if name in names[cls]})

    if values.get("output_dir") is None:
        raise ValueError("`output_dir` is missing: where checkpoints and the trained model go. Give --output_dir.")
    views = build(MultiViewTransform)
    config_fields = {name: value for name, value in values.items() if name in names[MSNConfig]}
    config_fields.setdefault("image_size", views.image_size)
    model = build(ModelArguments)
    if model.from_backbone is None:
        MSNConfig(**config_fields)  # a wrong field is named before any data is read
    training = build(MSNTrainingArguments)
    _check_output_dir(training)
    return Recipe(
        data=build(DataArguments),
        views=views,
        model=model,
        config_fields=config_fields,
        training=training,
        low_shot=build(LowShotArguments),
    )


def init_fields(cls) -> dict[str, dataclasses.Field]:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}
    if issubclass(cls, PreTrainedConfig):
        inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)}
        fields = {name: f for name, f in fields.items() if name not in inherited}
    return fields


def known_fields() -> dict[str, Any]:
    """The type of each field that a recipe can name."""
    known: dict[str, Any] = {}
    for cls in HOMES:
        for name, f in init_fields(cls).items():
            known.setdefault(name, f.type)
    return known


def _check_output_dir(training: MSNTrainingArguments) -> None:
    if training.resume_from_checkpoint or training.overwrite_output_dir:
        return
    output_dir = Path(training.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` '{output_dir}' is not empty. Go on with its run by `--resume_from_checkpoint true`, start "
            "anew with `--overwrite_output_dir`, or choose another."
        )
