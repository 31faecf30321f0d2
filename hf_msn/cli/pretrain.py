"""`hf-msn pretrain`: one flat recipe for a whole run.

Each field has one home: the transform for views, the configuration of the method for the forward pass, its
TrainingArguments for what changes over training; `arguments.py` and `sync.py` have the rest. `image_size` goes to both
the views and the model.
"""

import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.utils import broadcast_object_list
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..checks import check_choice, check_number
from ..data.datasets import multi_view_dataset
from ..data.labels import check_class_names, class_numbers
from ..data.support import SupportDataset
from ..data.transforms import MultiViewTransform
from ..evaluation.backbones import evaluated_module
from ..evaluation.low_shot import LowShotEvaluator
from ..files import write_text
from ..models.sequence_compression import SequenceCompression, compression_stages
from ..trainers.argument_names import in_terms_of
from ..trainers.callbacks.low_shot import LowShotCallback
from ..trainers.callbacks.sequence_compression import SequenceCompressionCallback
from ..trainers.pretraining_arguments import uses_accelerator
from .arguments import (
    PROBES,
    DataArguments,
    LabelArguments,
    LowShotArguments,
    ModelArguments,
    check_encoder_fields,
    read_fields,
)
from .defaults import ImageSummary, default_fields, summarize_images
from .methods import METHODS, Method
from .parser import Option, Parser, build, check_output_dir, is_resumed, options_of, own_values
from .recipe_files import find_recipe, read_config, read_yaml
from .sync import SyncArguments, sync_options

RECIPE_FILE = "recipe.yaml"
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
    """All settings of a run, each in the object that uses it.

    `given` holds the fields that are not the defaults of these objects. `is_complete`: some of them follow from the
    images.
    """

    method: Method
    data: DataArguments
    labels: LabelArguments | None
    views: MultiViewTransform
    model: ModelArguments
    config_fields: dict[str, Any]
    training: TrainingArguments
    low_shot: LowShotArguments
    sync: SyncArguments
    max_minutes: float | None = None
    given: dict[str, Any] = field(default_factory=dict)
    is_complete: bool = False

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
        """Return the trainer of the method with all of the above. `kwargs` are arguments of the trainer.

        With `max_minutes` a few updates are measured first, and `max_steps` is lowered to the number that fits.
        """
        if self.max_minutes is not None:
            steps = max(1, int(60 * self.max_minutes / self.measure_update(self.max_minutes)))
            given = self.training.max_steps
            self.training.max_steps = min(steps, given) if given > 0 else steps
            self.given = {**self.given, "max_steps": self.training.max_steps}
            self.max_minutes = None
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

    def measure_update(self, max_minutes: float) -> float:
        """Train models that are then thrown away for 3 % of the time, and return the mean seconds per update.

        The stages of a compression schedule are measured one by one.
        """
        stages: list[tuple[float, SequenceCompression | None]] = [(0.0, None)]
        if self.training.compression is not None:
            patch_size = self.build_model().config.patch_size
            stages = compression_stages(self.training.compression, patch_size)
        ends = [*(begins for begins, _ in stages[1:]), 1.0]
        max_seconds = 0.03 * 60 * max_minutes / len(stages)
        return sum(
            (end - begins) * self._measure_stage(stage, max_seconds) for (begins, stage), end in zip(stages, ends)
        )

    def _measure_stage(self, stage: SequenceCompression | None, max_seconds: float) -> float:
        timer = _UpdateTimer(max_seconds)
        with tempfile.TemporaryDirectory() as folder:
            args = copy.copy(self.training)
            args.output_dir, args.max_steps = folder, 10**6
            args.save_strategy = args.logging_strategy = "no"
            args.report_to, args.disable_tqdm, args.push_to_hub, args.on_collapse = [], True, False, "ignore"
            args.resume_from_checkpoint = None
            trainer = self.method.trainer(self.build_model(), args, **self.build_datasets(), callbacks=[timer])
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, SequenceCompressionCallback):
                    callback.stages = [(0.0, stage)]
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return timer.seconds_per_update

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
                probe=PROBES[settings.low_shot_probe](),
                baselines=settings.low_shot_baselines or (),
                features=settings.low_shot_features,
                seed=self.training.seed,
            )
        trainer.add_callback(LowShotCallback(trainer, evaluator, settings.low_shot_every_epochs))


class _UpdateTimer(TrainerCallback):
    """Measure updates, without the first ones, and end training on all ranks when rank 0 has measured long enough."""

    NUM_WARM, NUM_LEAST = 3, 8

    def __init__(self, max_seconds: float):
        self.max_seconds = max_seconds
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())
        is_long = self.ends[-1] - self.ends[0] > self.max_seconds
        [control.should_training_stop] = broadcast_object_list([is_long and len(self.ends) >= self.NUM_LEAST])

    @property
    def seconds_per_update(self) -> float:
        ends = self.ends[self.NUM_WARM - 1 :]
        [seconds] = broadcast_object_list([(ends[-1] - ends[0]) / (len(ends) - 1)])
        return seconds


def parse_recipe(arguments: list[str] | None = None) -> Recipe:
    """Read `--config RECIPE` and the fields on the command line, which override those of the file.

    Args:
        arguments (`list[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: For an unknown field, with the nearest known one; for a value of the wrong type; for an
            `output_dir` that is not empty where neither a resume nor an overwrite is asked for.
    """
    return make_recipe(_read_values(sys.argv[1:] if arguments is None else arguments))


def recipe_of_run(arguments: list[str]) -> Recipe:
    """Return the recipe of `hf-msn pretrain`: that of [`parse_recipe`] if there is a `--config`.

    Without one, the fields that are not given follow from the images, the labels and the processor. A resumed run
    takes them from the recipe that it has written.
    """
    values = _read_values(arguments)
    has_config = read_config(arguments, "method", "msn")[0] is not None
    written = Path(values.get("output_dir") or "", RECIPE_FILE)
    if is_resumed(values) and written.is_file():
        fields = read_recipe(written, values.get("method"))
        if "max_minutes" in values and "max_steps" in fields:  # measured when it began
            del values["max_minutes"]
            values["max_steps"] = fields["max_steps"]
        return make_recipe(values if has_config else {**fields, **values})
    return make_recipe(values) if has_config else complete_recipe(values)


def _read_values(arguments: list[str]) -> dict[str, Any]:
    parser_of = make_parser
    if {"--help_all", "--help-all"} & set(arguments):
        parser_of = partial(make_parser, hidden=())
        arguments = ["--help", *arguments]
    return read_fields(arguments, "method", "msn", parser_of)


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
    if values.get("max_minutes") is not None:
        check_number("max_minutes", values["max_minutes"], above=0, remedy="It is the length of training.")
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
        max_minutes=values.get("max_minutes"),
        given=values,
    )


def complete_recipe(given: dict[str, Any], images=None) -> Recipe:
    """Return the recipe of the `given` fields and of the others that follow from images, labels and processor.

    Args:
        given (`dict[str, Any]`): Fields by name.
        images (`datasets.Dataset`, *optional*): The training images; by default those of the field `dataset`.

    Raises:
        ValueError: As [`parse_recipe`]. A wrong field is named before any image is read.
    """

    def completed(summary: ImageSummary, labels_per_class: np.ndarray | None = None) -> Recipe:
        fields = default_fields(
            method, summary, given, has_accelerator=has_accelerator, labels_per_class=labels_per_class
        )
        return make_recipe({**fields, **given})

    method = check_choice("method", given.get("method", "msn"), METHODS)
    has_accelerator = uses_accelerator(given.get("use_cpu", False))
    if given.get("from_backbone") is not None:
        return make_recipe(given)  # that encoder has its own sizes
    first = completed(ImageSummary(num_images=1000))
    if images is not None:
        first.images = images
    summary = summarize_images(first.images)
    if first.labels is None:
        found = completed(summary)
    else:
        labelled, rows = first.labelled
        found = completed(summary, np.bincount(class_numbers(labelled, rows)))
        found.labelled = first.labelled
    found.images, found.is_complete = first.images, True
    return found


def write_recipe(recipe: Recipe) -> str:
    """Write the fields of a run to `recipe.yaml` in its `output_dir`, and return them."""
    left_out = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_token", "max_minutes")
    fields = {name: value for name, value in recipe.given.items() if name not in left_out}
    plain = json.loads(json.dumps({"method": recipe.given.get("method", "msn"), **fields}))  # tuples become lists
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)
    write_text(Path(recipe.training.output_dir, RECIPE_FILE), text)
    return text


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
    minutes = "Minutes of training, in place of epochs and at most max_steps. Some updates are measured first."
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
        "training": [
            Option("max_minutes", float | None, None, minutes),
            *options_of(method.arguments),
        ],
        "low-shot evaluation during training": options_of(LowShotArguments),
        "training with little communication": sync_options(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn pretrain`: train, and save the model."""
    recipe = recipe_of_run(sys.argv[1:] if arguments is None else arguments)
    trainer = recipe.build_trainer()
    trainer.accelerator.wait_for_everyone()  # each rank has found `output_dir` empty before one writes to it
    if trainer.is_world_process_zero():
        text = write_recipe(recipe)
        if recipe.is_complete:
            print(f"Without a recipe, settings follow from the images. They are in {RECIPE_FILE}:\n\n{text}")
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
