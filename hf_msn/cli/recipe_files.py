"""Find and read recipe files. Imports neither torch nor transformers, so that `hf-msn --help` answers at once."""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

from ..checks import did_you_mean

RECIPES = Path(__file__).parent / "recipes"


def find_recipe(name: str | Path) -> Path:
    """Return the path of a recipe, from the path of a YAML file or the name of a recipe of the package."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    hint = did_you_mean(Path(name).stem, shipped) or f"The package has {', '.join(shipped)}."
    raise ValueError(f"There is no recipe '{name}'. Give the path of a YAML file, or a name. {hint}")


class _Loader(yaml.SafeLoader):
    """Reads the values inside an object, such as `timm_options`, by the rules of YAML 1.2."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Refuse keys that YAML would take in silence: a repeated one, and one that is no text."""
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            start, end = key.start_mark, key.end_mark
            place = f"'{start.buffer[start.pointer : end.pointer].strip()}' in line {start.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key must be the name of a field, but is {place}. Write one line per field.")
            if key.value in names:
                raise yaml.YAMLError(f"a key must be given once, but {place} repeats one. Keep one of the lines.")
            names.add(key.value)
        return node


# instead of those of YAML 1.1, where no, on and y are booleans, 012 is octal, 1:30 is 90, and 1e-3 is text
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", "|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?([0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the lines `field: value` of a recipe.

    A value is text, or a list of texts, and is read as on the command line: YAML's own types would make `False` of
    `save_strategy: no` and 10 of `seed: 012`. An empty value is `None`.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"The recipe '{path}' must be lines `field: value`, but holds a {root.id}.")
        loader.flatten_mapping(root)
        return {key.value: _value(loader, node) for key, node in root.value}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe '{path}' cannot be read: {error}") from error


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, entry) for entry in node.value]
    if isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def read_config(arguments: list[str], variant: str, default: str) -> tuple[str | None, dict[str, Any], str]:
    """Return the value of `--config`, the fields of that file, and the value of the field `variant`.

    `variant` decides which other fields there are: "method" of pretraining, "head" of fine-tuning.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(f"--{variant}")
    given, _ = parser.parse_known_args(arguments)
    values = {} if given.config is None else read_yaml(find_recipe(given.config))
    return given.config, values, getattr(given, variant) or str(values.get(variant, default))
