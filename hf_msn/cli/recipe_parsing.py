"""Reads a recipe from a YAML file and the command line: names, types, and help that reads well."""

import argparse
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .recipe import METHODS, Method, Recipe, find_method, known_fields, make_recipe
from .recipe_arguments import without_replaced_labels
from .recipe_forms import WideHelpFormatter, add_argument, init_fields, read_mapping, refuse_unknown, typed

# The fields of transformers.TrainingArguments that nearly every run sets; --help_all shows the others too.
_COMMON_TRAINING_FIELDS = (
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16", "use_cpu", "seed"),
    *("activation_checkpointing", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "report_to"),
    *("run_name", "dataloader_num_workers", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_revision", "hub_private_repo"),
)


def parse_recipe(arguments: list[str] | None = None) -> Recipe:
    """Reads `--config recipe.yaml` and the fields on the command line, which win over the file.

    Args:
        arguments (`list[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: For an unknown field, with the nearest known one; for a value of the wrong type; for an
            `output_dir`
            that is not empty where neither a resume nor an overwrite is asked for.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=None)
    first.add_argument("--method", default=None)
    named, _ = first.parse_known_args(arguments)
    in_file = read_recipe(named.config, named.method) if named.config is not None else {}
    method = find_method(named.method or in_file.get("method", "msn"))

    known = known_fields(method)
    parser = _build_parser(method)
    namespace, unknown = parser.parse_known_args(arguments)
    if namespace.help_all:
        _build_parser(method, show_all=True).print_help()
        parser.exit()
    if unknown:
        _refuse_unknown([unknown[0].lstrip("-").split("=")[0]], method, "on the command line")
    given = {name: value for name, value in vars(namespace).items() if name in known}
    in_file = without_replaced_labels(in_file, given)
    return make_recipe({**in_file, **{name: typed(name, value, known[name]) for name, value in given.items()}})


def read_recipe(path: str | Path, method: str | None = None) -> dict[str, Any]:
    """Reads the fields of a recipe file.

    Args:
        path (`str` or `Path`): The file.
        method (`str`, *optional*): The method whose fields they are; by default what the file says, else msn.

    Raises:
        ValueError: If there is no such method, or the file is not there or not a mapping, or names an unknown field.
    """
    values = read_mapping(path, "Recipes of the papers are in scripts/recipes/.")
    found = find_method(method or values.get("method", "msn"))
    _refuse_unknown(values, found, f"in '{path}'")
    known = known_fields(found)
    return {name: typed(name, value, known[name]) for name, value in values.items()}


def _build_parser(method: Method, show_all: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="accelerate launch scripts/pretrain.py --config RECIPE --output_dir FOLDER [--FIELD VALUE ...]",
        formatter_class=WideHelpFormatter,
        description=f"Pretrain an image encoder with {method.title}. For another method: --method NAME --help.",
        epilog="Fields of the command line win over those of the recipe file. Example: accelerate launch "
        "scripts/pretrain.py --config scripts/recipes/digits.yaml --output_dir runs/digits --seed 1",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", default=None, help="A recipe: YAML lines `field: value`.")
    parser.add_argument("--method", metavar="NAME", help=f"{', '.join(METHODS)}. [msn, or what the recipe says]")
    parser.add_argument("--help_all", action="store_true", default=False, help="Show every training field too.")
    seen: set[str] = set()
    own = set(init_fields(method.arguments)) - set(init_fields(TrainingArguments))
    for cls, title in method.homes.items():
        group = parser.add_argument_group(title)
        for name, f in init_fields(cls).items():
            if name in seen:
                continue
            seen.add(name)
            hidden = cls is method.arguments and not show_all and name not in own | set(_COMMON_TRAINING_FIELDS)
            add_argument(group, f, method.views.get(name, f.default), hidden)
    return parser


def _refuse_unknown(names, method: Method, where: str) -> None:
    def owner(name: str) -> str | None:
        others = [other for other, candidate in METHODS.items() if name in known_fields(candidate)]
        if others:
            return f"It belongs to method {' and '.join(others)}, but the run is one of {method.title.split(',')[0]}."
        return None

    refuse_unknown(names, known_fields(method), where, owner, "--help_all")
