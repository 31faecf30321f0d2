"""One parser for every command, made from dataclasses and from signatures.

Flags look as those of transformers' `HfArgumentParser`, which users of the `run_*.py` scripts know; fields have its
`HfArg`. It reads dataclasses alone, and a value as one type. Recipes also have signatures, `none`, tuples, JSON values
and values from a YAML file. (jsonargparse would nest the fields of each class; recipes are flat.)
"""

import argparse
import collections.abc
import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.hf_argparser import string_to_bool

from ..checks import did_you_mean
from ..files import whole_file
from ..trainers.argument_names import in_terms_of
from .recipe_files import FlagParser


def _boolean(text: str) -> bool:
    return {"on": True, "off": False}[text.lower()] if text.lower() in ("on", "off") else string_to_bool(text)


def _json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


# In the order in which they are tried, with the name in an error and in the help.
_READERS: dict[type, tuple[Callable[[str], Any], str, str]] = {
    bool: (_boolean, "true or false", "true|false"),
    int: (int, "a whole number", "INT"),
    float: (float, "a number", "NUMBER"),
    dict: (_json_object, "a JSON object such as '{\"depth\": 2}'", "JSON"),
    str: (str, "text", "TEXT"),
}
_SEQUENCES = (list, tuple, collections.abc.Sequence)
REQUIRED = inspect.Parameter.empty


@dataclass
class Option:
    """One flag of a command, and field of a recipe. Without a default it must be given.

    `annotation` is the type: a union of scalars, literals, sequences of them and `None`.
    """

    name: str
    annotation: Any
    default: Any = REQUIRED
    help: str = ""

    def __post_init__(self):
        members = _members(self.annotation)
        sequences = [member for member in members if (typing.get_origin(member) or member) in _SEQUENCES]
        literals = [member for member in members if typing.get_origin(member) is typing.Literal]
        values = [value for literal in literals for value in typing.get_args(literal)]
        self.choices = [value for value in values if isinstance(value, str)]
        self.sequence = None if not sequences else tuple if typing.get_origin(sequences[0]) is tuple else list
        self.is_scalar = bool(self.choices) or any(member in _READERS for member in members)
        # `--report_to none`: where a list of texts is allowed, "none" is a name
        self.is_optional = types.NoneType in members and not (sequences and str in members)
        entries = [member for sequence in sequences for part in typing.get_args(sequence) for member in _members(part)]
        others = [type(value) for value in values if value not in self.choices]
        self.kinds = [kind for kind in _READERS if kind in (*members, *entries, *others)]
        if sequences and not self.kinds and not entries:
            self.kinds = [str]

    def read(self, text: str) -> Any:
        """Return one value of the command line as the type of the option."""
        if self.is_optional and text.lower() in ("none", "null"):
            return None
        if text in self.choices:
            return text
        for kind in self.kinds:
            with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
                return _READERS[kind][0](text)
        rule = " or ".join(_READERS[kind][1] for kind in self.kinds) or f"one of {', '.join(self.choices)}"
        raise argparse.ArgumentTypeError(f"must be {rule}, but is {text!r}. {did_you_mean(text, self.choices)}")

    def collect(self, value: Any) -> Any:
        """Return what argparse made of all values as the type of the option."""
        if not isinstance(value, list):
            return value
        if len(value) == 1 and (self.is_scalar or value == [None]):
            return value[0]
        return self.sequence(value)

    def settings(self, is_hidden: bool) -> dict[str, Any]:
        """Return the arguments of `add_argument`. An option that is not given is not in the namespace."""
        metavar = "|".join(self.choices) or ("NUMBER" if float in self.kinds else _READERS[self.kinds[0]][2])
        settings = {"type": self.read, "default": argparse.SUPPRESS, "metavar": metavar}
        settings["help"] = argparse.SUPPRESS if is_hidden else self._help()
        if self.sequence is not None:
            settings["nargs"] = "+"
        elif self.kinds == [bool]:
            settings |= {"nargs": "?", "const": True}
        return settings

    def _help(self) -> str:
        shown = "" if self.default in (REQUIRED, None, ()) else f" [{_shown(self.default)}]"
        return f"{self.help}{shown}".replace("%%", "%").replace("%", "%%").strip()


class Parser(FlagParser):
    """Parser of one command, from the options by the title of their group. The first option of a name counts.

    The help does not show `hidden` ones. `owner` returns a sentence that says where an unknown name belongs.
    """

    def __init__(
        self,
        groups: Mapping[str, Iterable[Option]],
        hidden: Iterable[str] = (),
        owner: Callable[[str], str | None] = lambda name: None,
        **kwargs: Any,
    ):
        wide = partial(argparse.HelpFormatter, max_help_position=34, width=110)
        super().__init__(formatter_class=wide, allow_abbrev=False, **kwargs)
        self.options: dict[str, Option] = {}
        self.owner = owner
        for title, options in groups.items():
            group = self.add_argument_group(title)
            for option in options:
                if option.name not in self.options:
                    self.options[option.name] = option
                    group.add_argument(f"--{option.name}", **option.settings(option.name in hidden))

    def read(self, arguments: list[str] | None = None) -> dict[str, Any]:
        """Return the options that a command line gives, by name. A flag may have dashes in place of underscores."""
        arguments = sys.argv[1:] if arguments is None else arguments
        arguments = [re.sub(r"^--[^=]+", lambda flag: f"--{flag[0][2:].replace('-', '_')}", a) for a in arguments]
        namespace, unknown = self.parse_known_args(arguments)
        if unknown and not unknown[0].startswith("--"):
            raise ValueError(
                f"{unknown[0]!r} stands where a flag is expected. A field takes one value, unless the help shows more."
            )
        self.check_known([token.removeprefix("--").split("=")[0] for token in unknown], "the command line")
        return {name: self.options[name].collect(value) for name, value in vars(namespace).items()}

    def read_values(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the fields of a recipe file as [`read`] returns options. `where` names the file."""
        self.check_known(map(str, values), where)
        arguments = []
        for name, value in values.items():
            if isinstance(value, (list, tuple)):
                arguments += [f"--{name}", *map(_as_text, value)]
            else:
                arguments.append(f"--{name}={_as_text(value)}")
        return self.read(arguments)

    def check_known(self, names: Iterable[str], where: str) -> None:
        for name in names:
            if name not in self.options:
                hint = self.owner(name) or did_you_mean(name, self.options) or "`--help` lists the fields."
                raise ValueError(f"There is no field `{name}`, in {where}. {hint}")

    def read_complete(self, arguments: list[str] | None = None) -> dict[str, Any]:
        """Return what [`read`] does, after a check that every option without a default is given."""
        values = self.read(arguments)
        for option in self.options.values():
            if option.default is REQUIRED and values.get(option.name) is None:
                raise ValueError(f"`{option.name}` is missing: {option.help} Give --{option.name}.")
        return values


def options_of(
    source: type | Callable, *documented: Any, names: Mapping[str, str | None] | None = None
) -> list[Option]:
    """Return an option for each field of a dataclass, or for each parameter of a class or function.

    The help is that of the field, else the entry under `Args:` of `source` or of the further objects `documented`.
    Parameters without an entry, and those that a command line cannot hold, are left out. `names` are the names of
    options that differ from those of the parameters; a parameter whose name is `None` becomes no option.
    """
    names = names or {}
    helps = documentation(source, *documented)
    if dataclasses.is_dataclass(source):
        is_config = issubclass(source, PreTrainedConfig)
        inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)} if is_config else ()
        found = [
            Option(f.name, f.type, _default(f), f.metadata.get("help") or helps.get(f.name, ""))
            for f in dataclasses.fields(source)
            if f.init and not f.name.startswith("_") and f.name not in inherited
        ]
    else:
        found = []
        for name, parameter in parameters_of(source).items():
            if name in helps:  # the others are not public
                found.append(Option(names.get(name) or name, parameter.annotation, parameter.default, helps[name]))
        left_out = {name for name, new in names.items() if new is None}
        found = [option for option in found if option.name not in left_out]
    return [option for option in found if option.kinds or option.choices]


def parameters_of(source: type | Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function, or of a class and of the bases that it passes its `**kwargs` to."""
    parameters: dict[str, inspect.Parameter] = {}
    for function in [cls.__init__ for cls in source.__mro__[:-1]] if isinstance(source, type) else [source]:
        signature = inspect.signature(function, eval_str=True).parameters
        for parameter in signature.values():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                parameters.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
            break
    parameters.pop("self", None)
    return parameters


def arguments_for(
    source: type | Callable, values: Mapping[str, Any], names: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return the values that are arguments of `source`, by parameter. `names` are those of [`options_of`]."""
    fields = {parameter: names.get(parameter, parameter) for parameter in parameters_of(source)}
    return {parameter: values[name] for parameter, name in fields.items() if name in values}


def call(source: type | Callable, values: Mapping[str, Any], names: Mapping[str, str | None], **arguments: Any) -> Any:
    """Call `source` with the values that are its arguments, and with `arguments`. Its errors name options."""
    with in_terms_of(names):
        return source(**{**arguments, **arguments_for(source, values, names)})


@cache
def documentation(*sources: Any) -> Mapping[str, str]:
    """Return the entries under `Args:` in the docstrings of objects and of their bases. The first entry counts."""
    found: dict[str, str] = {}
    for source in sources:
        for documented in source.__mro__ if isinstance(source, type) else [source]:
            section = re.search(r"^Args:\n((?: .*\n?|\n)*)", inspect.cleandoc(documented.__doc__ or ""), re.MULTILINE)
            for entry in re.split(r"^    (?=\S)", section[1] if section else "", flags=re.MULTILINE):
                match = re.match(r"([\w, ]+?)(?: \(.*?\))?:\s+(.+)", entry, re.DOTALL)
                if match is None or re.match(r"(See \[|As for\s)", match[2]):
                    continue
                text = re.sub(r"\[(`.+?`)\]|\[(.+?)\]\(\S+?\)", r"\1\2", " ".join(match[2].split())).replace("`", "")
                for name in match[1].split(", "):
                    found.setdefault(name, text)
    return found


def build(cls: type, values: Mapping[str, Any], **defaults: Any) -> Any:
    """Return an object of a dataclass from the values that are fields of it."""
    return cls(**{**defaults, **own_values(cls, values)})


def own_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are fields of a dataclass."""
    names = {option.name for option in options_of(cls)}
    return {name: value for name, value in values.items() if name in names}


def is_resumed(values: Mapping[str, Any]) -> bool:
    """Return whether the fields of a run ask to go on from a checkpoint."""
    return str(values.get("resume_from_checkpoint") or False).lower() != "false"


def output_file(values: Mapping[str, Any], name: str) -> contextlib.AbstractContextManager[Path | None]:
    """Return a context that gives a path to write the file of this field to, or `None` where it was not given.

    It finds out whether the file can be written: enter it before the work.
    """
    return whole_file(values[name], name, overwrite=True) if values.get(name) else contextlib.nullcontext()


def check_output_dir(values: Mapping[str, Any]) -> None:
    """Check that `output_dir` is a folder, and new or empty unless a run in it is resumed or overwritten."""
    output_dir = values.get("output_dir")
    if output_dir is None:
        raise ValueError("`output_dir` is missing: the folder of the trained model. Give --output_dir.")
    folder = Path(output_dir)
    for path in (folder, *folder.parents):
        if path.is_file():
            raise ValueError(f"`output_dir` '{output_dir}' must be a folder, but '{path}' is a file. Give another.")
    if not is_resumed(values) and not values.get("overwrite_output_dir") and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"`output_dir` '{output_dir}' is not empty. Continue its run by `--resume_from_checkpoint true`, start "
            "again by `--overwrite_output_dir`, or choose another."
        )


def _members(annotation: Any) -> list:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [str if annotation in (Path, os.PathLike) else annotation]


def _default(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return None  # such as a list, which the help does not show
    return REQUIRED if f.default is dataclasses.MISSING else f.default


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _shown(default: Any) -> str:
    if isinstance(default, (tuple, list)):
        return " ".join(map(_shown, default))
    return f"{default:.4g}" if isinstance(default, float) else _as_text(default)
