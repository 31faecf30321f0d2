"""Recipes: one flat YAML file for a whole run, and the same fields on the command line.

Each field has one home: what makes views is in [`MultiViewTransform`], what changes the forward pass in the method's
configuration, what changes over training in its TrainingArguments; the rest is in `recipe_arguments.py`. A recipe
names fields of any of them; `image_size` goes to both the views and the model.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, set_seed

from ..data.datasets import multi_view_dataset
from ..data.labels import check_class_names
from ..data.support import SupportDataset
from ..data.transforms import MultiViewTransform
from ..evaluation.low_shot import LowShotEvaluator
from ..models.configuration_msn import MSNConfig
from ..models.configuration_paws import PAWSConfig
from ..models.configuration_suncet import SuNCEtConfig
from ..models.modeling_msn import MSNForPreTraining
from ..models.modeling_paws import PAWSForPreTraining
from ..models.modeling_suncet import SuNCEtForPreTraining
from ..trainers.callbacks.low_shot import LowShotCallback
from ..trainers.msn_arguments import MSNTrainingArguments
from ..trainers.msn_trainer import MSNTrainer
from ..trainers.paws_arguments import PAWSTrainingArguments
from ..trainers.paws_trainer import PAWSTrainer
from ..trainers.suncet_arguments import SuNCEtTrainingArguments
from ..trainers.suncet_trainer import SuNCEtTrainer
from .recipe_arguments import DataArguments, LabelArguments, LowShotArguments, ModelArguments, check_is_a_folder
from .recipe_forms import init_fields
from .recipe_sync import SyncArguments


@dataclass(frozen=True)
class Method:
    """The classes of a pretraining method, and where its paper's views differ from the transform's defaults."""

    title: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    arguments: type
    trainer: type
    has_labels: bool = False
    views: dict[str, Any] = field(default_factory=dict)

    @property
    def homes(self) -> dict[type, str]:
        """The object that each field of a recipe belongs to, and what it is called in the help."""
        return {
            DataArguments: "data",
            **({LabelArguments: "labelled images"} if self.has_labels else {}),
            MultiViewTransform: "views",
            self.config: "model",
            ModelArguments: "start of the model",
            self.arguments: "training",
            LowShotArguments: "low-shot evaluation while training",
            SyncArguments: "training with little communication",
        }


METHODS = {
    "msn": Method(
        "Masked Siamese Networks, without labels", MSNConfig, MSNForPreTraining, MSNTrainingArguments, MSNTrainer
    ),
    "paws": Method(
        "PAWS, with a few labelled images",
        PAWSConfig,
        PAWSForPreTraining,
        PAWSTrainingArguments,
        PAWSTrainer,
        has_labels=True,
        views={"global_scale": (0.14, 1.0), "focal_scale": (0.05, 0.14), "focal_views": 6, "color_jitter": 1.0},
    ),
    "suncet": Method(
        "SimCLR + SuNCEt, with a few labelled images",
        SuNCEtConfig,
        SuNCEtForPreTraining,
        SuNCEtTrainingArguments,
        SuNCEtTrainer,
        has_labels=True,
        views={"global_scale": (0.08, 1.0), "focal_views": 0, "color_jitter": 1.0},
    ),
}


@dataclass
class Recipe:
    """All settings of a run, each in the object that uses it."""

    method: Method
    data: DataArguments
    labels: LabelArguments | None
    views: MultiViewTransform
    model: ModelArguments
    config_fields: dict[str, Any]
    training: Any
    low_shot: LowShotArguments
    sync: SyncArguments
    given: dict[str, Any] = field(default_factory=dict)

    def build_model(self) -> PreTrainedModel:
        """The model from scratch, or from the trunk that the recipe names. Its new weights depend on `seed` alone."""
        set_seed(self.training.seed)  # Trainer does it too, but when the weights are there
        if self.model.from_backbone is not None:
            model = self.method.model.from_backbone(self.model.from_backbone, **self.config_fields)
        else:
            model = self.method.model(self.method.config(**self.config_fields))
        if self.model.attn_implementation is not None:
            model.set_attn_implementation(self.model.attn_implementation)
        return model

    @cached_property
    def images(self):
        """The images to train on."""
        return self.data.load()

    @cached_property
    def labelled(self) -> tuple[Any, Any]:
        """The data set that holds the labelled images, and their rows in it: one draw for training and evaluation."""
        return self.labels.load(self.data, self.images)

    def build_datasets(self) -> dict[str, Any]:
        """`train_dataset`, the views of the training images, and `support_dataset` where some images are labelled."""
        images = self.images
        settings = {"seed": self.training.seed, "on_broken_image": self.data.on_broken_image}
        built = {"train_dataset": multi_view_dataset(images, self.views, **settings)}
        if self.labels is not None:
            labelled, rows = self.labelled
            check_class_names(labelled, images)
            views_per_image = self.labels.support_views_per_image
            built["support_dataset"] = SupportDataset(
                labelled, rows, self.views, views_per_image=views_per_image, **settings
            )
        return built

    def build_image_processor(self) -> BaseImageProcessor:
        """The evaluation's image processor, with the normalisation of training. It is saved with each checkpoint."""
        return self.views.evaluation_image_processor(crop_fraction=self.low_shot.crop_fraction)

    def build_trainer(self, **kwargs):
        """The trainer of the method with everything above; `kwargs` go to it."""
        trainer = self.method.trainer(
            self.build_model(),
            self.training,
            **self.build_datasets(),
            processing_class=self.build_image_processor(),
            **kwargs,
        )
        trainer.run_record.recipe = self.given
        self.add_low_shot_callback(trainer)
        self.sync.add_callback(trainer)
        return trainer

    def add_low_shot_callback(self, trainer) -> None:
        """Evaluates every `low_shot_every_epochs` epochs, if the recipe asks for it.

        A method that trains with labels is evaluated with the same labelled images, and reads no other label.
        """
        settings = self.low_shot
        if settings.low_shot_every_epochs == 0:
            return
        if self.labels is None:
            labelled = self.data.load(settings.low_shot_train_split or self.data.train_split)
            tasks = {"images_per_class": settings.low_shot_images_per_class}
        elif settings.low_shot_train_split is not None:
            raise ValueError(
                "`low_shot_train_split` would read labels of images that the method does not know. It is evaluated "
                "with the images that it is trained with; leave the field out."
            )
        else:
            labelled, rows = self.labelled
            tasks = {"images_per_class": (), "rows": {"labelled": rows}}
        evaluator = LowShotEvaluator(
            labelled,
            self.data.load(settings.low_shot_test_split, settings.low_shot_test_dataset),
            image_processor=self.build_image_processor(),
            **tasks,
            probe=settings.make_probe(),
            features=settings.low_shot_features,
            seed=self.training.seed,
        )
        trainer.add_callback(LowShotCallback(trainer, evaluator, settings.low_shot_every_epochs))


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Hands each value to the object that it belongs to, and checks what can be checked before work starts."""
    method = find_method(values.get("method", "msn"))
    names = {cls: init_fields(cls) for cls in method.homes}

    def build(cls, **defaults):
        return cls(**{**defaults, **{name: value for name, value in values.items() if name in names[cls]}})

    if values.get("output_dir") is None:
        raise ValueError("`output_dir` is missing: where checkpoints and the trained model go. Give --output_dir.")
    views = build(MultiViewTransform, **method.views)
    config_fields = {name: value for name, value in values.items() if name in names[method.config]}
    config_fields.setdefault("image_size", views.image_size)
    model = build(ModelArguments)
    if model.from_backbone is None:
        method.config(**config_fields)  # a wrong field is named before any data is read
    training = build(method.arguments)
    _check_output_dir(training)
    return Recipe(
        method=method,
        data=build(DataArguments),
        labels=build(LabelArguments) if method.has_labels else None,
        views=views,
        model=model,
        config_fields=config_fields,
        training=training,
        low_shot=build(LowShotArguments),
        sync=build(SyncArguments),
        given=dict(values),
    )


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, but is '{name}'.")
    return METHODS[name]


def known_fields(method: Method) -> dict[str, Any]:
    """The type of each field that a recipe of a method can name."""
    known: dict[str, Any] = {"method": str}
    for cls in method.homes:
        for name, f in init_fields(cls).items():
            known.setdefault(name, f.type)
    return known


def _check_output_dir(training) -> None:
    check_is_a_folder(training.output_dir)
    if training.resume_from_checkpoint or training.overwrite_output_dir:
        return
    output_dir = Path(training.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` '{output_dir}' is not empty. Go on with its run by `--resume_from_checkpoint true`, start "
            "anew with `--overwrite_output_dir`, or choose another."
        )
