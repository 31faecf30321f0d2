"""`hf-msn evaluate`: low-shot evaluation of any vision model."""

from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate import PartialState

from ..data.sources import load_images
from ..data.transforms import evaluation_image_processor
from ..evaluation.backbones import load_vision_model
from ..evaluation.features import extract_features
from ..evaluation.low_shot import BASELINES, LowShotEvaluator
from ..evaluation.probes import KNNProbe, LinearProbe, LogisticProbe, SoftNearestNeighborProbe
from ..evaluation.report import save_report
from .parser import Option, Parser, call, options_of, output_file

# Fields that are not called as the parameter; None: no field.
_MODEL = {"name": "model"}
_DATA = {
    **{"source": "dataset", "config": "dataset_config", "revision": "dataset_revision"},
    **{"split": None, "streaming": None, "data_files": None, "token": None},
}
_EVALUATOR = {"device": None, "name": None, "probe": None}
# The probes, and the parameters of theirs that are fields.
PROBES = {
    "logistic": (LogisticProbe, {"l2": "l2"}),
    "soft_nearest_neighbor": (SoftNearestNeighborProbe, {"temperature": "temperature"}),
    "knn": (KNNProbe, {"k": "neighbors"}),
    "linear": (LinearProbe, {}),
}


def make_parser() -> Parser:
    """Return the parser of the command."""
    groups = {
        "model": options_of(load_vision_model, names=_MODEL),
        "data": [
            *options_of(load_images, names=_DATA),
            Option("train_split", str, "train", "Split that the labelled images are drawn from."),
            Option("test_split", str, "test", "Split that accuracy is measured on."),
            Option("image_size", int | None, None, "Resize and crop as the paper does, to this size."),
        ],
        "evaluation": options_of(LowShotEvaluator, extract_features, names=_EVALUATOR),
        "probe": [Option("probe", Literal[tuple(PROBES)], "logistic", "Classifier on the features.")],
        "computation and output": [
            Option("bf16", bool, False, "Compute the features under bfloat16 autocast."),
            Option("output", str | None, None, "Write everything, down to each split, to this JSON file."),
            Option(
                "report",
                str | None,
                None,
                "Write a page with table, curves, confusions, nearest images and a "
                "map of the features to this HTML file, which needs no other file.",
            ),
        ],
    }
    for title, (probe, names) in PROBES.items():
        for option in options_of(probe, names=names):
            if option.name in names.values():
                groups["probe"].append(replace(option, help=f"With --probe {title}: {option.help}"))
    defaults = {
        **{"dataset": {"default": "digits"}, "images_per_class": {"default": None}},
        "baselines": {"annotation": tuple[str, ...] | None, "default": BASELINES},
    }
    return Parser(
        {title: [replace(o, **defaults.get(o.name, {})) for o in options] for title, options in groups.items()},
        prog="hf-msn evaluate",
        usage="hf-msn evaluate [--num_processes N] --model MODEL [--FIELD VALUE ...]",
        description="Measure the accuracy of a frozen model with a few labelled images per class. Without another "
        "task it is measured with 1, 2 and 5 images per class.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run `hf-msn evaluate`."""
    values = make_parser().read_complete(arguments)
    _check_probe_options(values)
    if values.get("report") and values.get("report") == values.get("output"):
        raise ValueError(f"`report` and `output` must be two files, but both are '{values['report']}'. Rename one.")
    # processes on CPUs find each other only with cpu=True
    state = PartialState(cpu=not torch.accelerator.is_available())
    own = values if state.is_main_process else {}
    # opened first: a file that cannot be written is an error before minutes of work
    with output_file(own, "report") as report:
        with output_file(own, "output") as output:
            model = call(load_vision_model, values, _MODEL)
            evaluator = make_evaluator(values, state.device)
            features = evaluator.extract(model)
            evaluator(model, features)
            if output is not None:
                evaluator.results.save(output)
        state.print(evaluator.results.table())
        if report is not None:
            save_report(evaluator, features, report)
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()


def _check_probe_options(values: dict[str, Any]) -> None:
    chosen = values.get("probe", "logistic")
    for title, (_, names) in PROBES.items():
        for field in names.values():
            if title != chosen and field in values:
                raise ValueError(
                    f"`{field}` is an option of the probe '{title}', but `probe` is '{chosen}'. Leave it out, or give "
                    f"`--probe {title}`."
                )


def make_evaluator(values: dict[str, Any], device: torch.device) -> LowShotEvaluator:
    """Return the evaluator that the values of the command line describe."""
    values = {"dataset": "digits", "baselines": BASELINES, **values}
    values["baselines"] = values["baselines"] or ()  # none on the command line
    if not {"fractions", "list_files"} & set(values):
        values.setdefault("images_per_class", (1, 2, 5))
    size = values.get("image_size")
    probe, names = PROBES[values.get("probe", "logistic")]
    own = {name: values[name] for name in names.values() if name in values}
    train, test = (
        call(load_images, values, {**_DATA, "split": f"{split}_split"}, split=split) for split in ("train", "test")
    )
    return call(
        LowShotEvaluator,
        values,
        _EVALUATOR,
        train_dataset=train,
        test_dataset=test,
        images_per_class=(),
        image_processor=None if size is None else evaluation_image_processor(size),
        probe=call(probe, own, names, **({"device": device} if probe is LinearProbe else {})),
        device=device,
        dtype=torch.bfloat16 if values.get("bf16") else None,
    )
