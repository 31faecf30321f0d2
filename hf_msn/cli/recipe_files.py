"""Find and read recipe files. Imports neither torch nor transformers, so that `hf-msn --help` answers at once."""

import argparse
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the lines `field: value` of a recipe."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe '{path}' is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe '{path}' must be lines `field: value`, but holds a {type(values).__name__}.")
    return values


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
