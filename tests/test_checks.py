import numpy as np
import pytest

from hf_msn.checks import check_choice, check_integer, check_known, check_number, did_you_mean


def test_values_inside_the_limits_are_returned_as_python_numbers():
    assert [check_integer("n", value) for value in (1, np.int64(7))] == [1, 7]
    assert type(check_integer("n", np.int64(7))) is int and type(check_number("x", np.float32(0.5))) is float
    assert [check_number("x", value, minimum=0, below=1) for value in (0, 0.5)] == [0.0, 0.5]
    assert check_number("x", 1, above=0, maximum=1) == 1.0
    assert check_choice("c", "b", ("a", "b")) == "b"
    check_known(["a"], ("a", "b"), "field")


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, float("nan")])
def test_integer_must_be_one_and_not_below_the_minimum(value):
    with pytest.raises(ValueError, match=r"`n` counts steps and .* >= 1, but is .*Use 12"):
        check_integer("n", value, meaning="counts steps", remedy="Use 12.")


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (0, {"above": 0}),
        (-0.1, {"minimum": 0}),
        (1, {"below": 1}),
        (1.1, {"maximum": 1}),
        *[(value, {}) for value in (True, "0.5", None, float("nan"), float("inf"))],
    ],
)
def test_number_must_be_finite_and_inside_the_limits(value, limits):
    with pytest.raises(ValueError, match=f"`x` .* is {value!r}"):
        check_number("x", value, **limits)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'logistic'.*'logistik'. Did you mean 'logistic'"):
        check_choice("probe", "logistik", ("linear", "logistic"))
    with pytest.raises(ValueError, match=r"field 'sede'. Did you mean 'seed'"):
        check_known(["seed", "sede"], ("seed", "split"), "field")
    assert did_you_mean("xyz", ("seed", "split")) == ""
