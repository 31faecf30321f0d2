"""Values of YAML and of the command line as the types of their fields."""

import pytest

from hf_msn.cli.recipe_forms import read_mapping, refuse_unknown, typed


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        (["3"], int | None, 3),
        (["none"], int | None, None),
        ("1e-3", float, 0.001),  # YAML takes it for text
        (["0.2", "0.9"], tuple[float, float], (0.2, 0.9)),
        ([1, 2], tuple[int, ...], (1, 2)),
        (["yes"], bool, True),
        ({"depth": 2}, dict | None, {"depth": 2}),
        (['{"depth": 2}'], dict | None, {"depth": 2}),
        (["12"], str, "12"),
    ],
    ids=str,
)
def test_a_value_becomes_the_type_of_its_field(value, annotation, expected):
    found = typed("field", value, annotation)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value, annotation, message",
    [
        (["1.5"], int, "`field` must be a whole number, but is '1.5'"),
        (["1", "2"], int, "`field` takes one value, but got 2: 1 2"),
        (["depth=2"], dict | None, "`field` must be JSON"),
        (["[2]"], dict | None, "`field` must be a JSON object"),
    ],
    ids=str,
)
def test_another_type_is_refused(value, annotation, message):
    with pytest.raises(ValueError, match=message):
        typed("field", value, annotation)


def test_an_unknown_name_is_said_to_be_of_something_else_before_it_is_taken_for_a_slip():
    with pytest.raises(ValueError, match=r"no field `size`, here\. Did you mean `sizes`\?"):
        refuse_unknown(["sizes", "size"], ["sizes"], "here", lambda name: None, "--help")
    with pytest.raises(ValueError, match=r"no field `size`, here\. It is of another"):
        refuse_unknown(["size"], ["sizes"], "here", lambda name: "It is of another.", "--help")
    with pytest.raises(ValueError, match=r"`--help` lists all fields"):
        refuse_unknown(["x"], ["sizes"], "here", lambda name: None, "--help")


def test_a_file_that_is_no_recipe_says_where_recipes_are(tmp_path):
    with pytest.raises(ValueError, match=r"There is no recipe .* Look there"):
        read_mapping(tmp_path / "absent.yaml", "Look there.")
