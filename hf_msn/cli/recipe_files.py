"""Find and read recipe files. Imports neither torch nor transformers, so that `hf-msn --help` answers at once."""

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..checks import did_you_mean

RECIPES = Path(__file__).parent / "recipes"
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are a `ValueError` that names the field. A negative number is a value, never a flag."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # argparse's own knows neither -1e-3 (before Python 3.14) nor -inf
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument --(\w+)[^:]*:", r"`\1`", message).strip())


def find_recipe(name: str | Path) -> Path:
    """Return the path of a recipe, from the path of a YAML file or the name of a recipe of the package."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    hint = did_you_mean(Path(name).stem, shipped) or f"The package has {', '.join(shipped)}."
    raise ValueError(f"There is no recipe '{name}'. Give the path of a YAML file, or a name. {hint}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the lines `field: value` of a recipe.

    A value is text, or a list of texts, and is read as on the command line: YAML's own types would make `False` of
    `save_strategy: no` and 10 of `seed: 012`. An empty value is `None`. The values inside of an object, such as
    `timm_options`, are numbers, booleans, `None` and texts by the rules of YAML 1.2.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"The recipe '{path}' must be lines `field: value`, but holds a {root.id}.")
        return _mapping(root, is_typed=False)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe '{path}' cannot be read: {error}") from error


def _mapping(node: yaml.MappingNode, is_typed: bool) -> dict[str, Any]:
    values = {}
    for key, value in node.value:
        start, end = key.start_mark, key.end_mark
        place = f"'{start.buffer[start.pointer : end.pointer].strip()}' in line {start.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"a key must be the name of a field, but is {place}. Write one line per field.")
        if key.value in values:
            raise yaml.YAMLError(f"a key must be given once, but {place} repeats one. Keep one of the lines.")
        values[key.value] = _value(value, is_typed)
    return values


def _value(node: yaml.Node, is_typed: bool) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(entry, is_typed) for entry in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, is_typed=True)
    text = node.value
    if node.style is not None:  # quoted
        return text
    if not is_typed:
        return None if _CONSTANTS.get(text.lower(), text) is None else text
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return _CONSTANTS.get(text.lower(), text)


def read_config(arguments: list[str], variant: str, default: str) -> tuple[str | None, dict[str, Any], str]:
    """Return the value of `--config`, the fields of that file, and the value of the field `variant`.

    `variant` decides which other fields there are: "method" of pretraining, "head" of fine-tuning.
    """
    parser = FlagParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(f"--{variant}")
    given, _ = parser.parse_known_args(arguments)
    values = {} if given.config is None else read_yaml(find_recipe(given.config))
    return given.config, values, getattr(given, variant) or str(values.get(variant, default))
