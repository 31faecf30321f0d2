"""Recipes of fine-tuning: which model, which labels, which views, and how the result is saved and tested."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.utils import cached_file

from ..cli.recipe_arguments import WAYS_OF_LABELLING, DataArguments, LabelArguments, check_is_a_folder
from ..cli.recipe_forms import init_fields
from ..data.labels import class_names, class_numbers, labelled_rows
from ..data.transforms import MultiViewTransform
from ..distributed.collectives import rank
from ..hub.publishing import Publication, publish_checkpoint
from ..hub.upload.repository import HubRepository
from ..models.configuration_suncet import SuNCEtConfig
from ..trainers.semi_supervised_trainer import LABELLED_IMAGES_FILE
from .arguments import ClassifierFinetuningArguments, FinetuningArguments, SuNCEtFinetuningArguments
from .result import FinetuningResult
from .starts import check_start
from .tuning import finetune_classifier, finetune_suncet

# a random crop and a flip, where pretraining has strong colour changes too
VIEWS = {"global_scale": (0.08, 1.0), "focal_views": 0, "color_jitter": 0.0, "grayscale": 0.0, "blur_probability": 0.0}
HEADS = {
    "linear": (ClassifierFinetuningArguments, finetune_classifier),
    "suncet": (SuNCEtFinetuningArguments, finetune_suncet),
}


@dataclass
class StartArguments:
    """What is fine-tuned, by whose labels, and on what it is tested."""

    head: str = field(
        default="linear",
        metadata={"help": "linear: a classifier that plain transformers loads. suncet: encoder and projection head."},
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of MSN, PAWS, SuNCEt or a plain ViTMSN, or timm:ARCHITECTURE. Without it: from "
            "scratch, with the fields of the model below."
        },
    )
    labelled_from_checkpoint: bool | None = field(
        default=None,
        metadata={
            "help": "Use the labelled images that the checkpoint was trained with. By default so, where it has a "
            "labelled_images.json and no other way is given."
        },
    )
    test_split: str | None = field(
        default=None,
        metadata={"help": "Split to measure the chosen model on, once, at the end. By default no test image is read."},
    )
    crop_fraction: float = field(
        default=224 / 256,
        metadata={
            "help": "Of an evaluation that is not saved with the model: centre crop over resized shortest edge."
        },
    )


@dataclass
class FinetuningRecipe:
    """All settings of a fine-tuning run, each in the object that uses it. [`make_finetuning_recipe`] makes one.

    Example:

    ```python
    >>> recipe = parse_finetuning_recipe(["--config", "recipe.yaml", "--output_dir", "runs/tuned"])
    >>> result = recipe.finetune()
    >>> result.save(recipe.output_dir)
    ```
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
        """Reads the labelled images, and no other label, and trains. That it can be pushed is made sure of before."""
        if self.training.push_to_hub:
            self._open_repository()
        labelled, rows = self.load_labelled()
        if self.start.test_split is not None:
            self.data.load(self.start.test_split)  # a split that is not there is said now; no row of it is read
        start, fields = self.start.model, self.config_fields
        if start is None:
            start, fields = SuNCEtConfig(**self.config_fields), {}
        result = HEADS[self.start.head][1](
            start,
            labelled,
            rows,
            self.views,
            self.training,
            image_processor=self.image_processor,
            on_broken_image=self.data.on_broken_image,
            **fields,
        )
        result.run.pop("arguments")  # the recipe has them
        result.run["recipe"] = self.given
        return result

    def test(self, result: FinetuningResult) -> None:
        """Measures `result` on the test split, where one is given. Nothing of it is read before."""
        if self.start.test_split is not None:
            result.test(self.data.load(self.start.test_split))

    def push(self, result: FinetuningResult) -> Publication | None:
        """Publishes what `result.save` has written, if `push_to_hub` asks for it; from the first rank.

        Raises:
            PublishingError: The Hub or the network failed; what was saved is as it was.
        """
        if not self.training.push_to_hub or rank() > 0:
            return None
        return publish_checkpoint(
            self.output_dir,
            self._open_repository().repo_id,
            private=self.training.hub_private_repo,
            revision=self.training.hub_revision,
            token=self.training.hub_token,
            without_results=result.test_accuracy is None,
        )

    def _open_repository(self) -> HubRepository:
        args = self.training
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        repository = HubRepository(name, args.hub_revision, args.hub_private_repo, args.hub_token)
        repository.check_token()
        return repository

    def load_labelled(self) -> tuple[datasets.Dataset, np.ndarray]:
        """The data set that holds the labelled images, and their rows in it."""
        if self.data.streaming:
            raise ValueError(
                "Fine-tuning picks labelled images by row, which a stream does not have. Set `streaming` false."
            )
        given = [name for name in WAYS_OF_LABELLING if self.label_fields.get(name) is not None]
        wanted = self.start.labelled_from_checkpoint
        if wanted and given:
            raise ValueError(
                f"Which images are labelled must be said in one way, but both `labelled_from_checkpoint` and "
                f"{', '.join(given)} are given. Leave out one."
            )
        saved = None if given or wanted is False else find_labelled_images(self.start.model)
        if saved is not None:
            dataset = self.data.load()
            return dataset, _rows_of_checkpoint(dataset, saved, self.start.model)
        if wanted:
            raise ValueError(
                f"`labelled_from_checkpoint` needs a `{LABELLED_IMAGES_FILE}` beside the model, as PAWS and SuNCEt "
                f"save it, but '{self.start.model}' has none. Give one of {', '.join(WAYS_OF_LABELLING)}."
            )
        labels = LabelArguments(**self.label_fields)
        return labels.load(self.data, None if labels.labelled_dataset is not None else self.data.load())


def make_finetuning_recipe(values: dict[str, Any]) -> FinetuningRecipe:
    """Hands each value to the object that it belongs to, and checks what can be checked before any data is read.

    Views and evaluation take size and normalisation from the image processor that is saved with the model, unless the
    values say otherwise.
    """
    homes = finetuning_homes(values.get("head", "linear"))
    names = {cls: finetuning_fields(cls) for cls in homes}

    def of(cls) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in names[cls]}

    arguments = HEADS[values.get("head", "linear")][0]
    if values.get("output_dir") is None:
        raise ValueError("`output_dir` is missing: where the fine-tuned model goes. Give --output_dir.")
    start = StartArguments(**of(StartArguments))
    training = arguments(**of(arguments))
    _check_output_dir(training)
    if start.model is not None:
        check_start(start.model)
    saved = None if start.model is None else _saved_image_processor(start.model)
    views = MultiViewTransform(**{**VIEWS, **_input_of(start.model, saved), **of(MultiViewTransform)})
    config_fields = of(SuNCEtConfig)
    config_fields["image_size"] = views.image_size
    if start.model is None:
        SuNCEtConfig(**config_fields)  # a wrong field is named before any data is read
    fits = saved is not None and _settings(saved) == {name: getattr(views, name) for name in _settings(saved)}
    return FinetuningRecipe(
        start=start,
        data=DataArguments(**of(DataArguments)),
        label_fields=of(LabelArguments),
        views=views,
        config_fields=config_fields,
        training=training,
        image_processor=saved if fits else views.evaluation_image_processor(start.crop_fraction),
        given=dict(values),
    )


def finetuning_homes(head: str) -> dict[type, str]:
    """The object that each field of a recipe belongs to, and what it is called in the help.

    Raises:
        ValueError: There is no such head.
    """
    if head not in HEADS:
        raise ValueError(f"`head` must be one of {', '.join(HEADS)}, but is '{head}'.")
    return {
        StartArguments: "model and test",
        DataArguments: "data",
        LabelArguments: "labelled images",
        MultiViewTransform: "views",
        HEADS[head][0]: "training",
        SuNCEtConfig: "encoder (from scratch, or where it differs from the checkpoint's)",
    }


def finetuning_fields(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of an object that a recipe can name."""
    fields = init_fields(cls)
    if cls is LabelArguments:
        fields.pop("support_views_per_image")  # a field of SuNCEt's training, with another default
    return fields


def find_labelled_images(model: str | None) -> dict[str, Any] | None:
    """The `labelled_images.json` beside a checkpoint, in a folder or on the Hub; `None` if there is none."""
    if model is None or model.startswith("timm:"):
        return None
    path = cached_file(
        model,
        LABELLED_IMAGES_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _rows_of_checkpoint(dataset: datasets.Dataset, saved: dict[str, Any], model: str) -> np.ndarray:
    names = class_names(dataset)
    other = (
        "has fewer rows"
        if max(saved["rows"]) >= len(dataset)
        else "has other class names"
        if names is not None and saved["class_names"] is not None and names != saved["class_names"]
        else None
    )
    if other is None:
        rows = labelled_rows(dataset, mask=saved["rows"])
        if np.array_equal(class_numbers(dataset, rows), saved["labels"]):
            return rows
        other = "has other labels in these rows"
    raise ValueError(
        f"'{model}' was trained with {len(saved['rows'])} labelled rows of another data set: `dataset` {other}. Give "
        f"the data set that it was trained with (its `labelled_dataset`, if there was one), or one of "
        f"{', '.join(WAYS_OF_LABELLING)}."
    )


def _saved_image_processor(model: str) -> BaseImageProcessor | None:
    if model.startswith("timm:"):
        return None
    try:
        return AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError):
        return None


def _input_of(model: str | None, saved: BaseImageProcessor | None) -> dict[str, Any]:
    """Size and normalisation of the images that a model was trained with, as far as they are known."""
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


def _check_output_dir(training: FinetuningArguments) -> None:
    check_is_a_folder(training.output_dir)
    folder = Path(training.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not training.overwrite_output_dir:
        raise ValueError(
            f"`output_dir` '{folder}' is not empty. Choose another, or give `--overwrite_output_dir` to replace the "
            "model in it. (A fine-tuning run is short, and starts anew rather than being resumed.)"
        )
