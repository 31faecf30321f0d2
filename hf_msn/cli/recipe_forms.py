"""What the recipes of pretraining and fine-tuning share: fields as YAML, as arguments, as help, and their types."""

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

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


def init_fields(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of an object that a recipe can name."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}
    if issubclass(cls, PreTrainedConfig):
        inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)}
        fields = {name: f for name, f in fields.items() if name not in inherited}
    return fields


def read_mapping(path: str | Path, others: str) -> dict[str, Any]:
    """The lines `field: value` of a YAML file, as they are. `others` says where recipes are, for the error.

    Raises:
        ValueError: If the file is not there, not YAML or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe '{path}'. {others}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe '{path}' is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe '{path}' must be lines `field: value`, but holds a {type(values).__name__}.")
    return values


def refuse_unknown(
    names: Iterable[str], known: Collection[str], where: str, owner: Callable[[str], str | None], all_fields: str
) -> None:
    """Raises a `ValueError` for the first name that is no field, with the nearest one.

    Args:
        names (`Iterable[str]`): What was given.
        known (`Collection[str]`): The fields.
        where (`str`): Where it was given.
        owner (`Callable[[str], str | None]`): Says what a name belongs to, if to something else.
        all_fields (`str`): The option that lists all fields.
    """
    for name in map(str, names):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = owner(name) or (f"Did you mean `{nearest[0]}`?" if nearest else f"`{all_fields}` lists all fields.")
            raise ValueError(f"There is no field `{name}`, {where}. {hint}")


def add_argument(group, f: dataclasses.Field, default: Any, hidden: bool = False) -> None:
    """Adds a field to a group of an `ArgumentParser`; what it gives is a list of strings, for [`typed`]."""
    text = f.metadata.get("help", _ENCODER_HELP.get(f.name, ""))
    shown = "" if default in (dataclasses.MISSING, None) else f" [{_shown(default)}]"
    text = " ".join(f"{text}{shown}".split()).replace("%%", "%").replace("%", "%%")
    is_bool = set(_members(f.type)) <= {bool, type(None)}
    group.add_argument(
        f"--{f.name}",
        metavar=_metavar(f.type),
        help=argparse.SUPPRESS if hidden else text,
        **({"nargs": "?", "const": "true"} if is_bool else {"nargs": "+"}),
    )


def typed(name: str, value: Any, annotation: Any) -> Any:
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
        return typed(name, [value], annotation)
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


class WideHelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_args(self, action, default_metavar):
        metavar = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())
        return f"[{metavar}]" if action.nargs == "?" else metavar
