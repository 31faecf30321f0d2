"""`hf-msn finetune`: the recipe of fine-tuning, from the model and its labels to the saved result."""

import inspect
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
from accelerate import PartialState
from transformers import AutoImageProcessor, BaseImageProcessor, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import cached_file

from ..checks import check_choice, check_number
from ..data.labels import class_names, class_numbers, labelled_rows
from ..data.transforms import MultiViewTransform, cropped_as_in_torchvision
from ..distributed.collectives import rank
from ..files import read_json
from ..finetuning.arguments import ClassifierFinetuningArguments, FinetuningArguments, SuNCEtFinetuningArguments
from ..finetuning.models import check_start
from ..finetuning.result import FinetuningResult
from ..finetuning.tuning import finetune_classifier, finetune_suncet
from ..hub.publish import HubRepository, publish_checkpoint
from ..models.configuration_suncet import SuNCEtConfig
from ..trainers.argument_names import in_terms_of
from ..trainers.semi_supervised_trainer import LABELLED_IMAGES_FILE
from .arguments import LABEL_SOURCES, DataArguments, LabelArguments, check_encoder_fields, read_fields
from .parser import Option, Parser, build, check_output_dir, options_of, own_values

HEADS = {
    "linear": (ClassifierFinetuningArguments, finetune_classifier),
    "suncet": (SuNCEtFinetuningArguments, finetune_suncet),
}
_BATCH = {"linear": "global_batch_size", "suncet": "global_support_images_per_class"}
# A random crop and a flip, where pretraining has strong colour changes too.
VIEWS = {"global_scale": (0.08, 1.0), "focal_views": 0, "color_jitter": 0.0, "grayscale": 0.0, "blur_probability": 0.0}
# The fields of transformers.TrainingArguments that fine-tuning has, beside those of FinetuningArguments.
_TRAINER_FIELDS = {
    *("output_dir", "warmup_steps", "gradient_accumulation_steps", "bf16", "fp16", "use_cpu", "seed"),
    *("dataloader_num_workers", "disable_tqdm", "report_to", "run_name"),
    *("push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo"),
}
_FIXED = {"remove_unused_columns", "average_tokens_across_devices", "ddp_find_unused_parameters"}


@dataclass
class StartArguments:
    """The model to fine-tune, its labels, and the images that it is tested on."""

    head: str = HfArg(
        default="linear",
        help="linear: a classifier that plain transformers loads. suncet: encoder and projection head.",
    )
    model: str | None = HfArg(
        default=None,
        help="Folder or Hub id of a pretraining model or a plain ViTMSN, or timm:ARCHITECTURE. Without it: from "
        "scratch, with the fields of the model below.",
    )
    labelled_from_checkpoint: bool | None = HfArg(
        default=None,
        help="Use the labelled images of the checkpoint's training. The default if it has a labelled_images.json and "
        "no other source is given.",
    )
    test_split: str | None = HfArg(
        default=None, help="Split to measure the chosen model on, once, at the end. By default none."
    )
    crop_fraction: float = HfArg(
        default=224 / 256, help="Centre crop over resized shortest edge, of an evaluation not saved with the model."
    )

    def __post_init__(self):
        check_number("crop_fraction", self.crop_fraction, above=0, maximum=1, remedy="1 keeps the whole image.")


@dataclass
class FinetuningRecipe:
    """All settings of a fine-tuning run, each in the object that uses it. `given` holds the fields as they were given.

    Example: `recipe.finetune().save(recipe.output_dir)`.
    """

    start: StartArguments
    data: DataArguments
    label_fields: dict[str, Any]
    views: MultiViewTransform
    config_fields: dict[str, Any]
    training: FinetuningArguments
    image_processor: BaseImageProcessor
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> str:
        return self.training.output_dir

    def finetune(self) -> FinetuningResult:
        """Read the labelled images, and no other label, and train. First check that the result can be pushed."""
        check_start(self.start.model, getattr(self.training, "start_layer", "backbone"))
        if self.training.push_to_hub:
            self.open_repository()
        labelled, rows = self.load_labelled()
        if self.start.test_split is not None:
            self.load_test()  # a missing split is an error before training; no row is read
        start, fields = self.start.model, dict(self.config_fields)
        if start is None:
            start, fields = SuNCEtConfig(**self.config_fields), {}
        fields |= {"image_processor": self.image_processor, "on_broken_image": self.data.on_broken_image}
        _, tune = HEADS[self.start.head]
        with in_terms_of({"start": "model"}):
            result = tune(start, labelled, rows, self.views, self.training, **fields)
        result.run.pop("arguments")  # the recipe has them
        result.run["recipe"] = self.given
        return result

    def open_repository(self) -> HubRepository:
        """Return the repository that the result is pushed to, which is made if it does not exist."""
        args = self.training
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        return HubRepository(name, args.hub_revision, args.hub_private_repo, args.hub_token)

    def load_test(self) -> datasets.Dataset:
        """Return the images that the chosen model is measured on."""
        return self.data.load(self.start.test_split, split_field="test_split")

    def load_labelled(self) -> tuple[datasets.Dataset, np.ndarray]:
        """Return the data set that holds the labelled images, and their rows in it."""
        if self.data.streaming:
            raise ValueError(
                "`streaming` must be false for fine-tuning, but is true: labelled images are found by row number."
            )
        given = [name for name in LABEL_SOURCES if self.label_fields.get(name) is not None]
        wanted = self.start.labelled_from_checkpoint
        if wanted and given:
            raise ValueError(
                f"The labelled images must have one source, but both `labelled_from_checkpoint` and "
                f"{', '.join(given)} are given. Leave out one."
            )
        saved = None if given or wanted is False else find_labelled_images(self.start.model)
        if saved is not None:
            dataset = self.data.load()
            return dataset, _rows_of_checkpoint(dataset, saved, self.start.model)
        if wanted:
            raise ValueError(
                f"`labelled_from_checkpoint` needs a `{LABELLED_IMAGES_FILE}` beside the model, as PAWS and SuNCEt "
                f"save it, but '{self.start.model}' has none. Give one of {', '.join(LABEL_SOURCES)}."
            )
        labels = LabelArguments(**self.label_fields)
        return labels.load(self.data, None if labels.labelled_dataset is not None else self.data.load())


def parse_finetuning_recipe(arguments: list[str] | None = None) -> FinetuningRecipe:
    """Read `--config RECIPE` and the fields on the command line, as [`parse_recipe`] does for pretraining."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return make_finetuning_recipe(read_fields(arguments, "head", "linear", make_parser))


def make_finetuning_recipe(values: dict[str, Any]) -> FinetuningRecipe:
    """Pass each value to the object that it belongs to, and check as much as possible before any data is read.

    Views and evaluation take size and normalisation from the image processor that is saved with the model, unless the
    values have others.
    """
    check_output_dir(values)
    start = build(StartArguments, values)
    training = build(HEADS[check_choice("head", start.head, HEADS)][0], values)
    if start.model is not None:
        check_start(start.model, getattr(training, "start_layer", "backbone"))
    saved = _saved_image_processor(start.model)
    views = build(MultiViewTransform, values, **{**VIEWS, **_input_of(start.model, saved)})
    config_fields = {**own_values(SuNCEtConfig, values), "image_size": views.image_size}
    is_timm = str(start.model).startswith("timm:")
    check_encoder_fields(values, start.model if is_timm else config_fields.get("timm_model"))
    if start.model is None:
        SuNCEtConfig(**config_fields)  # names a wrong field before any data is read
    fits = saved is not None and all(getattr(views, name) == value for name, value in _settings(saved).items())
    label_fields = own_values(LabelArguments, values)
    label_fields.pop("support_views_per_image", None)  # a field of SuNCEt's training here
    return FinetuningRecipe(
        start=start,
        data=build(DataArguments, values),
        label_fields=label_fields,
        views=views,
        config_fields=config_fields,
        training=training,
        image_processor=saved if fits else views.evaluation_image_processor(start.crop_fraction),
        given=values,
    )


def make_parser(head: str) -> Parser:
    """Return the parser of a head."""

    def owner(name: str) -> str | None:
        if "batch_size" in name and "eval" not in name:
            return f"The images of an update are `{_BATCH[head]}`, over all ranks together."
        if name == "max_steps":
            return "Fine-tuning has whole epochs, `num_train_epochs`."
        others = [other for other in HEADS if name in Parser(_groups(other)).options]
        return f"It belongs to `--head {others[0]}`, but the head is {head}." if others else None

    return Parser(
        _groups(head),
        owner=owner,
        prog="hf-msn finetune",
        usage="hf-msn finetune [--num_processes N] --config RECIPE --output_dir FOLDER [--FIELD VALUE ...]",
        description=f"Fine-tune on labelled images: head {head}. For the other head: --head NAME --help. The best "
        "epoch is chosen on held-out labels and saved at the end. With --save_strategy epoch a stopped run can be "
        "resumed.",
        epilog="Fields on the command line override those of the recipe.",
    )


def _groups(head: str) -> dict[str, list[Option]]:
    """Return the options of a head by the title of their group in the help."""
    arguments = HEADS[check_choice("head", head, HEADS)][0]
    ours = arguments.__mro__[: arguments.__mro__.index(TrainingArguments)]
    own = {name for cls in ours for name in inspect.get_annotations(cls)}
    return {
        "recipe": [Option("config", str | None, None, "Path of a YAML file, or name of a recipe of the package.")],
        "model and test": options_of(StartArguments),
        "data": options_of(DataArguments),
        "labelled images": [o for o in options_of(LabelArguments) if o.name != "support_views_per_image"],
        "views": [replace(o, default=VIEWS.get(o.name, o.default)) for o in options_of(MultiViewTransform)],
        "training": [
            o for o in options_of(arguments) if o.name in _TRAINER_FIELDS or (o.name in own and o.name not in _FIXED)
        ],
        "encoder (from scratch, or where it differs from the checkpoint's)": options_of(SuNCEtConfig),
    }


def find_labelled_images(model: str | None) -> dict[str, Any] | None:
    """Return the `labelled_images.json` beside a checkpoint, in a folder or on the Hub; `None` if there is none."""
    if model is None or model.startswith("timm:"):
        return None
    path = cached_file(
        model,
        LABELLED_IMAGES_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else read_json(path)


def _rows_of_checkpoint(dataset: datasets.Dataset, saved: dict[str, Any], model: str) -> np.ndarray:
    names = class_names(dataset)
    if max(saved["rows"]) >= len(dataset):
        fault = "has fewer rows"
    elif names is not None and saved["class_names"] is not None and names != saved["class_names"]:
        fault = "has other class names"
    else:
        rows = labelled_rows(dataset, mask=saved["rows"])
        if np.array_equal(class_numbers(dataset, rows), saved["labels"]):
            return rows
        fault = "has other labels in these rows"
    raise ValueError(
        f"'{model}' was trained with {len(saved['rows'])} labelled rows of another data set: `dataset` {fault}. "
        "Give the data set of its training (its `labelled_dataset`, if there was one), or one of "
        f"{', '.join(LABEL_SOURCES)}."
    )


def _saved_image_processor(model: str | None) -> BaseImageProcessor | None:
    if model is None or model.startswith("timm:"):
        return None
    try:
        return cropped_as_in_torchvision(AutoImageProcessor.from_pretrained(model))
    except (OSError, ValueError):
        return None


def _input_of(model: str | None, saved: BaseImageProcessor | None) -> dict[str, Any]:
    """Return size and normalisation of the images that a model was trained with, as far as they are known."""
    if model is not None and model.startswith("timm:"):
        released = timm.get_pretrained_cfg(model.removeprefix("timm:")).to_dict()
        data = timm.data.resolve_data_config(pretrained_cfg=released)
        known = {"image_size": data["input_size"][-1], "image_mean": data["mean"], "image_std": data["std"]}
        return {**known, "interpolation": data["interpolation"]}
    return {} if saved is None else _settings(saved)


def _settings(processor: BaseImageProcessor) -> dict[str, Any]:
    known = {}
    crop = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    crop = crop if isinstance(crop, dict) else vars(crop)
    if crop.get("height"):
        known["image_size"] = int(crop["height"])
    for name in ("image_mean", "image_std"):
        if getattr(processor, name, None) is not None:
            known[name] = tuple(getattr(processor, name))
    return known


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn finetune`."""
    recipe = parse_finetuning_recipe(arguments)
    args, test_split = recipe.training, recipe.start.test_split
    result = recipe.finetune()
    result.save(args.output_dir)
    if test_split is not None:
        result.test(recipe.load_test())
        result.save(args.output_dir)
    PartialState().print(result.describe())
    if args.push_to_hub and rank() == 0:
        publish_checkpoint(
            args.output_dir,
            recipe.open_repository().repo_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
            without_results=test_split is None,
        )
    PartialState().destroy_process_group()
