"""Reads a recipe from a YAML file and the command line: names, types, and help that reads well."""

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from .recipe_arguments import without_replaced_labels
from .recipes import METHODS, Method, Recipe, find_method, init_fields, known_fields, make_recipe

_ENCODER_HELP = {
    "hidden_size": "Width of the encoder.",
    "num_hidden_layers": "Number of blocks of the encoder.",
    "num_attention_heads": "Attention heads of a block; 64 dimensions a head are usual.",
    "intermediate_size": "Hidden width of a block's MLP; 4 x hidden_size is usual.",
    "hidden_act": "Activation of the MLPs.",
    "hidden_dropout_prob": "Dropout of the hidden states.",
    "attention_probs_dropout_prob": "Dropout of the attention.",
    "initializer_range": "Standard deviation of the encoder's initial weights.",
    "layer_norm_eps": "Epsilon of the layer norms.",
    "patch_size": "Side of a patch, in pixels.",
    "num_channels": "Channels of the images; they are made RGB.",
    "qkv_bias": "Biases of the attention's query, key and value.",
}
# The fields of transformers.TrainingArguments that nearly every run sets; --help_all shows the others too.
_COMMON_TRAINING_FIELDS = (
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16", "use_cpu", "seed"),
    *("activation_checkpointing", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "report_to"),
    *("run_name", "dataloader_num_workers", "resume_from_checkpoint"),
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
    return make_recipe({**in_file, **{name: _typed(name, value, known[name]) for name, value in given.items()}})


def read_recipe(path: str | Path, method: str | None = None) -> dict[str, Any]:
    """Reads the fields of a recipe file.

    Args:
        path (`str` or `Path`): The file.
        method (`str`, *optional*): The method whose fields they are; by default what the file says, else msn.

    Raises:
        ValueError: If there is no such method, or the file is not there or not a mapping, or names an unknown field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe '{path}'. Recipes of the papers are in scripts/recipes/.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe '{path}' is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe '{path}' must be lines `field: value`, but holds a {type(values).__name__}.")
    found = find_method(method or values.get("method", "msn"))
    _refuse_unknown(values, found, f"in '{path}'")
    known = known_fields(found)
    return {name: _typed(name, value, known[name]) for name, value in values.items()}


def _build_parser(method: Method, show_all: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="accelerate launch scripts/pretrain.py --config RECIPE --output_dir FOLDER [--FIELD VALUE ...]",
        formatter_class=_WideHelpFormatter,
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
            text = f.metadata.get("help", _ENCODER_HELP.get(name, ""))
            value = method.views.get(name, f.default)
            default = "" if value in (dataclasses.MISSING, None) else f" [{_shown(value)}]"
            text = " ".join(f"{text}{default}".split()).replace("%%", "%").replace("%", "%%")
            group.add_argument(
                f"--{name}",
                metavar=_metavar(f.type),
                help=argparse.SUPPRESS if hidden else text,
                **({"nargs": "?", "const": "true"} if set(_members(f.type)) <= {bool, type(None)} else {"nargs": "+"}),
            )
    return parser


def _metavar(annotation: Any) -> str | tuple[str, str]:
    kinds = [kind for kind in _members(annotation) if kind is not type(None)]
    if kinds == [bool]:
        return "true|false"
    if any(typing.get_origin(kind) in (tuple, list) for kind in kinds[:1]):
        return ("VALUE", "...")
    return {int: "INT", float: "NUMBER"}.get(kinds[0], "TEXT")


def _shown(default: Any) -> str:
    if isinstance(default, (tuple, list)):
        return " ".join(_shown(entry) for entry in default)
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:.4g}" if isinstance(default, float) else str(default)


class _WideHelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_args(self, action, default_metavar):
        metavar = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())
        return f"[{metavar}]" if action.nargs == "?" else metavar


def _refuse_unknown(names, method: Method, where: str) -> None:
    known = known_fields(method)
    for name in map(str, names):
        if name in known:
            continue
        others = [other for other, candidate in METHODS.items() if name in known_fields(candidate)]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if others:
            hint = f"It belongs to method {' and '.join(others)}, but the run is one of {method.title.split(',')[0]}."
        else:
            hint = f"Did you mean `{nearest[0]}`?" if nearest else "`--help_all` lists all fields."
        raise ValueError(f"There is no field `{name}`, {where}. {hint}")


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """A value of the command line (a list of strings) or of YAML, as the field's type."""
    kinds = [kind for kind in _members(annotation) if kind is not type(None)]
    optional = len(kinds) < len(_members(annotation))
    sequence = next(
        (kind for kind in kinds if typing.get_origin(kind) in (tuple, list) or kind in (tuple, list)), None
    )
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        if sequence is None and len(value) != 1:
            raise ValueError(f"`{name}` takes one value, but got {len(value)}: {' '.join(value)}.")
        if sequence is None or (len(value) == 1 and len(kinds) > 1):
            value = value[0]
    if name == "resume_from_checkpoint" and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if isinstance(value, list):
        container = typing.get_origin(sequence) or sequence or list
        entries = [kind for kind in typing.get_args(sequence) if kind is not Ellipsis] or [str]
        return container(_scalar(name, entry, _members(entries[0])) for entry in value)
    means_none = value is None or (str(value).lower() in ("none", "null") and name != "report_to")
    if optional and means_none:  # "none" is a word of its own for `report_to`: no reporter
        return None
    if kinds == [dict] and isinstance(value, str):
        return _parsed_json(name, value)
    if sequence is not None and len(kinds) == 1:
        return _typed(name, [value], annotation)
    return _scalar(name, value, kinds)


def _parsed_json(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON such as '{{\"depth\": 2}}', but {text!r} is not: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a JSON object such as '{{\"depth\": 2}}', but is {text!r}.")
    return value


def _scalar(name: str, value: Any, kinds: list) -> Any:
    text = str(value)
    if bool in kinds and text.lower() in ("true", "false", "yes", "no", "1", "0"):
        return text.lower() in ("true", "yes", "1")
    if int in kinds and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if float in kinds:
        try:
            return int(value) if isinstance(value, int) and int in kinds else float(text)
        except ValueError:
            pass
    plain = {bool: "true or false", int: "a whole number", float: "a number"}
    if kinds and all(kind in plain for kind in kinds):
        wanted = " or ".join(plain[kind] for kind in kinds)
        raise ValueError(f"`{name}` must be {wanted}, but is '{text}'.")
    return text if isinstance(value, str) or str in kinds else value


def _members(annotation: Any) -> list:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]
