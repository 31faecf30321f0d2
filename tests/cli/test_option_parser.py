"""Options made from annotations and docstrings, and the values of a command line and of YAML as their types."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from hf_msn.cli.parser import Option, Parser, arguments_for, options_of
from hf_msn.cli.recipe_files import RECIPES, find_recipe, read_yaml


def read(annotation, *texts):
    """The value of `--field`, with these texts on the command line."""
    return Parser({"all": [Option("field", annotation)]}).read(["--field", *texts])["field"]


@pytest.mark.parametrize(
    ("annotation", "texts", "expected"),
    [
        (int | None, ["3"], 3),
        (int | None, ["none"], None),
        (str | None, ["null"], None),
        (None | str | list[str], ["none"], "none"),  # `--report_to none`
        (None | str | list[str], ["a", "b"], ["a", "b"]),
        (float, ["1e-3"], 0.001),
        (float | int, ["1"], 1),
        (tuple[float, float], ["0.2", "0.9"], (0.2, 0.9)),
        (tuple[int, ...], ["1"], (1,)),
        (int | list[int] | tuple[int, int], ["8"], 8),
        (Sequence[str | Path], ["a.json"], ["a.json"]),
        (Sequence, ["a", "b"], ["a", "b"]),
        (float | Callable[[int], float], ["0.5"], 0.5),
        (bool, ["yes"], True),
        (bool | None, [], True),
        (dict | None, ['{"depth": 2}'], {"depth": 2}),
        (Literal["a", "b"] | None, ["b"], "b"),
        (Literal["a", "b"] | None, ["none"], None),
        (str, ["12"], "12"),
        (str, ["-1"], "-1"),
        (float, ["-1e-3"], -0.001),
        (float, ["-.5"], -0.5),
        (float, ["-inf"], -math.inf),
        (tuple[float, ...], ["-.2", "-1E+2", "-Infinity"], (-0.2, -100.0, -math.inf)),
    ],
    ids=str,
)
def test_a_value_has_the_type_of_its_annotation(annotation, texts, expected):
    found = read(annotation, *texts)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "texts", "offending"),
    [
        (int, ["1.5"], "'1.5'"),
        (float, ["much"], "'much'"),
        (int, ["-1e3"], "'-1e3'"),
        (bool, ["maybe"], "'maybe'"),
        (int, ["1", "2"], "'2'"),
        (int, ["none"], "'none'"),
        (tuple[int, ...], ["1", "x"], "'x'"),
        (dict | None, ["depth=2"], "'depth=2'"),
        (dict | None, ["[2]"], r"'\[2\]'"),
        (Literal["linear", "suncet"], ["sunset"], "'sunset'.*'suncet'"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_named(annotation, texts, offending):
    with pytest.raises(ValueError, match=offending):
        read(annotation, *texts)


def test_an_unknown_name_has_its_owner_or_the_nearest_field_as_remedy():
    def owner(name):
        return "It belongs elsewhere." if name == "width" else None

    parser = Parser({"all": [Option("sizes", int)]}, owner=owner)
    for name, remedy in (("size", "'sizes'"), ("width", "belongs elsewhere"), ("x", "--help")):
        with pytest.raises(ValueError, match=f"`{name}`, in the command line.*{remedy}"):
            parser.read([f"--{name}", "1"])
        with pytest.raises(ValueError, match=f"`{name}`, in file.yaml.*{remedy}"):
            parser.read_values({name: 1}, "file.yaml")
    assert parser.read(["--sizes=3"]) == {"sizes": 3}


def test_a_flag_may_have_dashes_and_is_never_ignored():
    parser = Parser({"all": [Option("push_to_hub", bool), Option("run_name", str)]})
    for flag in ("--push_to_hub", "--push-to-hub", "--push_to-hub"):
        assert parser.read([flag, "--run-name=--a-b"]) == {"push_to_hub": True, "run_name": "--a-b"}
    with pytest.raises(ValueError, match="'push_to_hub'"):
        parser.read(["---push_to_hub"])


class Base:
    """A base class.

    Args:
        seed (`int`, *optional*, defaults to 0): Seed of
            the [draw](https://example.org).
    """

    def __init__(self, seed: int = 0, group: Callable | None = None):
        pass


class Derived(Base):
    """A derived class.

    Args:
        model (`Callable[[int], int]`): Nothing for a command line.
        name (`str`): The name, see [`Base`].
        first, second (`float`): Two numbers.
    """

    def __init__(self, model: Callable, name: str, first: float = 0.5, second: float | None = None, **kwargs):
        super().__init__(**kwargs)


def test_a_signature_becomes_options_with_the_help_of_the_docstrings():
    found = {option.name: option for option in options_of(Derived, names={"name": "title", "second": None})}
    assert list(found) == ["title", "first", "seed"]
    assert found["title"].help == "The name, see Base." and found["first"].help == "Two numbers."
    assert found["seed"].help == "Seed of the draw." and (found["seed"].default, found["first"].default) == (0, 0.5)
    parser = Parser({"all": found.values()})
    with pytest.raises(ValueError, match=r"`title` is missing"):
        parser.read_complete([])
    values = {"title": "x", "first": 0.1, "other": 1}
    assert arguments_for(Derived, values, {"name": "title"}) == {"name": "x", "first": 0.1}


@dataclass
class Fields:
    size: int = field(default=3, metadata={"help": "Side, 50 % of it."})
    rates: tuple[float, float] = (0.1, 1.0)
    _hidden: int = 0


def test_help_shows_the_text_and_the_default_of_a_field():
    text = " ".join(Parser({"fields": options_of(Fields)}).format_help().split())
    assert "--size INT Side, 50 % of it. [3]" in text and "[0.1 1]" in text and "hidden" not in text
    assert "size" not in Parser({"fields": options_of(Fields)}, hidden=["size"]).format_help()


@pytest.mark.parametrize(
    ("annotation", "line", "expected"),
    [
        (str, "no", "no"),  # of `save_strategy: no`
        (str, "on", "on"),
        (str, "yes", "yes"),
        (str, "0123", "0123"),
        (str, "1e10", "1e10"),
        (str, "2026-01-02", "2026-01-02"),
        (str, "1:30", "1:30"),
        (int, "012", 12),
        (float, "1e-3", 0.001),
        (float, ".5", 0.5),
        (float, "5", 5.0),
        (str, "--strange", "--strange"),
        (str, "'012'", "012"),
        (tuple[float, float], "[0, 1.5]", (0.0, 1.5)),
        (dict, "{a: '4', b: [+1, 2.], c: {d: .5}}", {"a": "4", "b": [1, 2.0], "c": {"d": 0.5}}),
        (bool, "on", True),
        (bool, "no", False),
        (bool, "True", True),
        (int | None, "", None),
        (int | None, "~", None),
        (str | None, "null", None),
        (list[str], "[off, n]", ["off", "n"]),
        (tuple[int, ...], "[07, 8]", (7, 8)),
        (dict, "{a: on, b: 012, c: [1, 0.5, 1e-3], d: true, e: null}", {
            "a": "on", "b": 12, "c": [1, 0.5, 0.001], "d": True, "e": None
        }),
    ],
    ids=str,
)  # fmt: skip
def test_a_line_of_a_recipe_is_read_as_on_the_command_line(annotation, line, expected, tmp_path):
    (tmp_path / "r.yaml").write_text(f"field: {line}\n")
    parser = Parser({"all": [Option("field", annotation)]})
    found = parser.read_values(read_yaml(tmp_path / "r.yaml"), "the file")["field"]
    assert found == expected and type(found) is type(expected)


def test_a_recipe_is_found_by_its_path_and_by_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    assert read_yaml(find_recipe(tmp_path / "mine.yaml")) == {"a": "1"}
    assert find_recipe("digits") == RECIPES / "digits.yaml"
    with pytest.raises(ValueError, match=r"msn_vits16_imagent.*'msn_vits16_imagenet'"):
        find_recipe("msn_vits16_imagent")
    with pytest.raises(ValueError, match=r"absent.yaml"):
        find_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", r"r\.yaml.*sequence"),
        ("text", r"r\.yaml.*scalar"),
        ("a: [1\n", r"r\.yaml"),
        ("a: 1\nb: 2\na: 3\n", r"r\.yaml.*'a' in line 3"),
        ("o:\n  x: 1\n  x: 2\n", r"'x' in line 3"),
        ("b: 2\n[seed, a]: 1\n", r"'\[seed, a\]' in line 2"),
        ("? - seed\n: 1\n", r"'- seed' in line 1"),
    ],
)
def test_a_recipe_has_lines_whose_keys_are_names_that_are_given_once(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "r.yaml")
