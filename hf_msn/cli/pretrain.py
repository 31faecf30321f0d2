"""`hf-msn pretrain`: one flat recipe for a whole run.

Each field has one home: the transform for views, the configuration of the method for the forward pass, its
TrainingArguments for what changes over training; `arguments.py` and `sync.py` have the rest. `image_size` goes to both
the views and the model.
"""

import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel, TrainingArguments, set_seed

from ..checks import check_choice
from ..data.datasets import multi_view_dataset
from ..data.labels import check_class_names
from ..data.support import SupportDataset
from ..data.transforms import MultiViewTransform
from ..evaluation.backbones import evaluated_module
from ..evaluation.low_shot import LowShotEvaluator
from ..trainers.argument_names import in_terms_of
from ..trainers.callbacks.low_shot import LowShotCallback
from .arguments import (
    DataArguments,
    LabelArguments,
    LowShotArguments,
    ModelArguments,
    check_encoder_fields,
    read_fields,
)
from .methods import METHODS, Method
from .parser import Option, Parser, build, check_output_dir, options_of, own_values
from .recipe_files import find_recipe, read_yaml
from .sync import SyncArguments, sync_options

# The fields of transformers.TrainingArguments that nearly every run sets; --help_all shows the others too.
_COMMON_TRAINING_FIELDS = {
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args", "bf16", "fp16"),
    *("activation_checkpointing", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "report_to"),
    *("run_name", "dataloader_num_workers", "resume_from_checkpoint", "use_cpu", "seed"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_revision", "hub_private_repo"),
}


@dataclass
class Recipe:
    """All settings of a run, each in the object that uses it. `given` holds the fields as they were given."""

    method: Method
    data: DataArguments
    labels: LabelArguments | None
    views: MultiViewTransform
    model: ModelArguments
    config_fields: dict[str, Any]
    training: TrainingArguments
    low_shot: LowShotArguments
    sync: SyncArguments
    given: dict[str, Any] = field(default_factory=dict)

    def build_model(self) -> PreTrainedModel:
        """Return the model, from scratch or on the encoder of `from_backbone`. New weights depend on `seed` alone."""
        set_seed(self.training.seed)  # Trainer seeds too, but after the weights are drawn
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
        """The data set that holds the labelled images, and their rows: one draw for training and evaluation."""
        return self.labels.load(self.data, self.images)

    def build_datasets(self) -> dict[str, Any]:
        """Return `train_dataset`, the views of the images, and `support_dataset` if the method has labels."""
        settings = {"seed": self.training.seed, "on_broken_image": self.data.on_broken_image}
        built = {"train_dataset": multi_view_dataset(self.images, self.views, **settings)}
        if self.labels is not None:
            labelled, rows = self.labelled
            check_class_names(labelled, self.images)
            settings["views_per_image"] = self.labels.support_views_per_image
            built["support_dataset"] = SupportDataset(labelled, rows, self.views, **settings)
        return built

    def build_image_processor(self) -> BaseImageProcessor:
        """Return the image processor of the evaluation, which is saved with each checkpoint."""
        return self.views.evaluation_image_processor(crop_fraction=self.low_shot.crop_fraction)

    def build_trainer(self, **kwargs):
        """Return the trainer of the method with all of the above. `kwargs` are arguments of the trainer."""
        trainer = self.method.trainer(
            self.build_model(),
            self.training,
            **self.build_datasets(),
            processing_class=self.build_image_processor(),
            **kwargs,
        )
        trainer.run_record.recipe = self.given
        self._add_low_shot_callback(trainer)
        self.sync.add_callback(trainer)
        return trainer

    def _add_low_shot_callback(self, trainer) -> None:
        """Evaluate every `low_shot_every_epochs` epochs. A method with labels is evaluated with those alone."""
        settings = self.low_shot
        if settings.low_shot_every_epochs == 0:
            return
        evaluated_module(trainer.model, settings.low_shot_features)  # a missing head is an error before training
        if self.labels is None:
            field = "train_split" if settings.low_shot_train_split is None else "low_shot_train_split"
            labelled = self.data.load(settings.low_shot_train_split or self.data.train_split, split_field=field)
            tasks = {"images_per_class": settings.low_shot_images_per_class}
        elif settings.low_shot_train_split is not None:
            raise ValueError(
                f"`low_shot_train_split` must be left out for a method with labels, but is "
                f"'{settings.low_shot_train_split}'. Evaluation reads no label that training does not have."
            )
        else:
            labelled, rows = self.labelled
            tasks = {"images_per_class": (), "rows": {"labelled": rows}}
        source = settings.low_shot_test_dataset
        field = "dataset" if source is None else "low_shot_test_dataset"
        test = self.data.load(settings.low_shot_test_split, source, "low_shot_test_split", field)
        with in_terms_of({"images_per_class": "low_shot_images_per_class"}):
            evaluator = LowShotEvaluator(
                labelled,
                test,
                image_processor=self.build_image_processor(),
                **tasks,
                probe=settings.make_probe(),
                baselines=settings.low_shot_baselines or (),
                features=settings.low_shot_features,
                seed=self.training.seed,
            )
        trainer.add_callback(LowShotCallback(trainer, evaluator, settings.low_shot_every_epochs))


def parse_recipe(arguments: list[str] | None = None) -> Recipe:
    """Read `--config RECIPE` and the fields on the command line, which override those of the file.

    Args:
        arguments (`list[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: For an unknown field, with the nearest known one; for a value of the wrong type; for an
            `output_dir` that is not empty where neither a resume nor an overwrite is asked for.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser_of = make_parser
    if {"--help_all", "--help-all"} & set(arguments):
        parser_of = partial(make_parser, hidden=())
        arguments = ["--help", *arguments]
    return make_recipe(read_fields(arguments, "method", "msn", parser_of))


def read_recipe(path: str, method: str | None = None) -> dict[str, Any]:
    """Read the fields of a recipe file.

    Args:
        path (`str` or `Path`): The file, or the name of a recipe of the package.
        method (`str`, *optional*): The method whose fields they are; by default the `method` of the file, else msn.

    Raises:
        ValueError: If there is no such method or file, or the file is not a mapping or has an unknown field.
    """
    values = read_yaml(find_recipe(path))
    return make_parser(method or values.get("method", "msn")).read_values(values, f"'{path}'")


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Pass each value to the object that it belongs to, and check as much as possible before work begins."""
    method = METHODS[check_choice("method", values.get("method", "msn"), METHODS)]
    views = build(MultiViewTransform, values, **method.views)
    config_fields = {"image_size": views.image_size, **own_values(method.config, values)}
    check_encoder_fields(values, config_fields.get("timm_model"))
    if config_fields.get("num_channels", 3) != 3:
        raise ValueError(f"`num_channels` must be 3, as images are RGB, but is {config_fields['num_channels']}.")
    model = build(ModelArguments, values)
    if model.from_backbone is None:
        method.config(**config_fields)  # names a wrong field before any data is read
    check_output_dir(values)
    names = {option.name for option in sync_options()}
    return Recipe(
        method=method,
        data=build(DataArguments, values),
        labels=build(LabelArguments, values) if method.has_labels else None,
        views=views,
        model=model,
        config_fields=config_fields,
        training=build(method.arguments, values),
        low_shot=build(LowShotArguments, values),
        sync=SyncArguments(**{name: value for name, value in values.items() if name in names}),
        given=values,
    )


def make_parser(method: str, hidden: Iterable[str] | None = None) -> Parser:
    """Return the parser of a method. By default the help hides rare fields of `TrainingArguments`."""
    groups = _groups(method)
    if hidden is None:
        hidden = {option.name for option in options_of(TrainingArguments)} - _COMMON_TRAINING_FIELDS
    title = METHODS[method].title

    def owner(name: str) -> str | None:
        if "batch_size" in name and "eval" not in name:
            return "The images of a batch are `per_device_train_batch_size`, on each rank."
        others = [other for other in METHODS if name in Parser(_groups(other)).options]
        return f"It belongs to method {' and '.join(others)}, but the run is {title}." if others else None

    return Parser(
        groups,
        hidden,
        owner,
        prog="hf-msn pretrain",
        usage="hf-msn pretrain [--num_processes N] --config RECIPE --output_dir FOLDER [--FIELD VALUE ...]",
        description=f"Pretrain an image encoder with {title}. For another method: --method NAME --help. For all "
        "training fields: --help_all. Fields on the command line override those of the recipe.",
        epilog="On a cluster: accelerate launch scripts/pretrain.py --config RECIPE ...",
    )


def _groups(name: str) -> dict[str, list[Option]]:
    """Return the options of a method by the title of their group in the help."""
    method = METHODS[check_choice("method", name, METHODS)]
    recipe = "Path of a YAML file, or name of a recipe of the package: digits, msn_vits16_imagenet."
    views = [replace(o, default=method.views.get(o.name, o.default)) for o in options_of(MultiViewTransform)]
    return {
        "recipe": [
            Option("config", str | None, None, recipe),
            Option("method", str, name, f"{', '.join(METHODS)}; by default the one of the recipe."),
        ],
        "data": options_of(DataArguments),
        **({"labelled images": options_of(LabelArguments)} if method.has_labels else {}),
        "views": views,
        "model": options_of(method.config),
        "initial weights": options_of(ModelArguments),
        "training": options_of(method.arguments),
        "low-shot evaluation during training": options_of(LowShotArguments),
        "training with little communication": sync_options(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn pretrain`: train, and save the model."""
    trainer = parse_recipe(arguments).build_trainer()
    trainer.train()
    trainer.save_state()
    trainer.save_model()  # last, as with push_to_hub it can fail
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LowShotCallback) and trainer.is_world_process_zero():
            print(callback.evaluator.results.table())
    trainer.accelerator.end_training()
    del trainer
    # a process group whose threads outlive the interpreter aborts it
    gc.collect()
