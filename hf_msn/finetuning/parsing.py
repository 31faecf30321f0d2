"""Reads a fine-tuning recipe from a YAML file and the command line."""

import argparse
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..recipe_arguments import without_replaced_labels
from .recipes import HEADS, VIEWS, FinetuningRecipe, finetuning_fields, finetuning_homes, make_finetuning_recipe

# The fields of transformers.TrainingArguments that mean something here, beside those of FinetuningArguments.
_OF_TRAINER = (
    *("output_dir", "warmup_steps", "gradient_accumulation_steps", "bf16", "fp16", "use_cpu", "seed"),
    *("dataloader_num_workers", "disable_tqdm", "report_to", "run_name"),
)
_FIXED = ("save_strategy", "remove_unused_columns", "average_tokens_across_devices", "ddp_find_unused_parameters")


def parse_finetuning_recipe(arguments: list[str] | None = None) -> FinetuningRecipe:
    """Reads `--config recipe.yaml` and the fields on the command line, which win over the file.

    Args:
        arguments (`list[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: For an unknown field, with the nearest known one; for a value of the wrong type; for an
            `output_dir` that is not empty where no overwrite is asked for.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=None)
    first.add_argument("--head", default=None)
    named, _ = first.parse_known_args(arguments)
    in_file = {} if named.config is None else _read_file(Path(named.config))
    head = named.head or str(in_file.get("head", "linear"))
    fields = _known_fields(head)
    if named.config is not None:
        _refuse_unknown(in_file, head, f"in '{named.config}'")

    namespace, unknown = _build_parser(head).parse_known_args(arguments)
    if unknown:
        _refuse_unknown([unknown[0].lstrip("-").split("=")[0]], head, "on the command line")
    given = {name: value for name, value in vars(namespace).items() if name in fields}
    in_file = without_replaced_labels(in_file, given)
    values = {name: typed_value(name, value, fields[name].type) for name, value in in_file.items()}
    values.update({name: typed_value(name, _from_text(value), fields[name].type) for name, value in given.items()})
    return make_finetuning_recipe(values)


def typed_value(name: str, value: Any, annotation: Any) -> Any:
    """A value of YAML as the type of its field.

    Raises:
        ValueError: It is of another type.
    """
    kinds = _members(annotation)
    if (value is None or (value == "none" and name != "report_to")) and type(None) in kinds:
        return None
    sequence = next((kind for kind in kinds if typing.get_origin(kind) in (tuple, list)), None)
    has_single = any(kind in (bool, int, float, str) for kind in kinds)
    if has_single and isinstance(value, list) and len(value) == 1:  # as the command line gives it
        value = value[0]
    if sequence is not None and (isinstance(value, list | tuple) or not has_single):
        entries = value if isinstance(value, list | tuple) else [value]
        return typing.get_origin(sequence)(typed_value(name, entry, typing.get_args(sequence)[0]) for entry in entries)
    if bool in kinds and isinstance(value, bool):
        return value
    if int in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-3 for text
        except (TypeError, ValueError):
            pass
    if dict in kinds and isinstance(value, dict):
        return value
    if str in kinds and not isinstance(value, dict | list):
        return str(value)
    words = {bool: "true or false", int: "a whole number", float: "a number", dict: 'JSON such as {"depth": 2}'}
    wanted = " or ".join(words[kind] for kind in kinds if kind in words)
    raise ValueError(f"`{name}` must be {wanted or 'text'}, but is {value!r}.")


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no recipe '{path}'. Recipes are in scripts/recipes/finetune_*.yaml.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe '{path}' is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe '{path}' must be lines `field: value`, but holds a {type(values).__name__}.")
    return values


def _known_fields(head: str) -> dict[str, dataclasses.Field]:
    known: dict[str, dataclasses.Field] = {}
    for cls in finetuning_homes(head):
        for name, f in finetuning_fields(cls).items():
            if issubclass(cls, TrainingArguments) and not _is_offered(cls, name):
                continue
            known.setdefault(name, f)
    return known


def _is_offered(arguments: type, name: str) -> bool:
    ours = any(name in cls.__annotations__ for cls in arguments.__mro__[: arguments.__mro__.index(TrainingArguments)])
    return name in _OF_TRAINER or (ours and name not in _FIXED)


def _refuse_unknown(names, head: str, where: str) -> None:
    known = _known_fields(head)
    for name in map(str, names):
        if name in known:
            continue
        others = [other for other in HEADS if other != head and name in _known_fields(other)]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if others:
            hint = f"It belongs to `--head {others[0]}`, but the head is {head}."
        else:
            hint = f"Did you mean `{nearest[0]}`?" if nearest else "`--help` lists all fields."
        raise ValueError(f"There is no field `{name}`, {where}. {hint}")


def _build_parser(head: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="accelerate launch scripts/finetune.py --config RECIPE --output_dir FOLDER [--FIELD VALUE ...]",
        description=f"Fine-tune on labelled images: head {head}. For the other head: --head NAME --help. The best "
        "epoch is chosen on held-out labels and saved at the end; a run is short and is not resumed.",
        epilog="Fields of the command line win over those of the recipe file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", default=None, help="A recipe: YAML lines `field: value`.")
    known, seen = _known_fields(head), set()
    for cls, title in finetuning_homes(head).items():
        group = parser.add_argument_group(title)
        for name in finetuning_fields(cls):
            if name in seen or name not in known:
                continue
            seen.add(name)
            f = known[name]
            default = VIEWS.get(name, f.default)
            shown = "" if default in (dataclasses.MISSING, None) else f" [{default}]"
            is_bool = bool in _members(f.type)
            many = any(typing.get_origin(kind) in (tuple, list) for kind in _members(f.type))
            group.add_argument(
                f"--{name}",
                metavar="true|false" if is_bool else "VALUE",
                help=f"{f.metadata.get('help', '')}{shown}".replace("%%", "%").replace("%", "%%"),
                **({"nargs": "?", "const": "true"} if is_bool else {"nargs": "+"} if many else {}),
            )
    return parser


def _from_text(value: str | list[str]) -> Any:
    return [_from_text(entry) for entry in value] if isinstance(value, list) else yaml.safe_load(value)


def _members(annotation: Any) -> list:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]
