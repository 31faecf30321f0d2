"""Checks of arguments at the public door. Each error says the value, the rule and the remedy."""

import difflib
import math
import numbers
import operator
from collections.abc import Collection, Iterable
from typing import Any

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def check_integer(name: str, value: Any, minimum: int = 1, *, meaning: str = "", remedy: str = "") -> int:
    """Return `value` as an `int`.

    Args:
        name (`str`): The argument.
        minimum (`int`, *optional*, defaults to 1): The smallest value that is allowed.
        meaning (`str`, *optional*): What the argument means, as a verb phrase: "counts optimizer steps".
        remedy (`str`, *optional*): A sentence that says what to pass instead.

    Raises:
        ValueError: If `value` is not an integer, or is below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise _error(name, value, meaning, f"must be an integer >= {minimum}", remedy)
    return int(value)


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    meaning: str = "",
    remedy: str = "",
) -> float:
    """Return `value` as a `float`. `minimum` and `maximum` are allowed values, `above` and `below` are not.

    Raises:
        ValueError: If `value` is not a finite number, or lies outside of the limits.
    """
    allowed = {">=": minimum, ">": above, "<=": maximum, "<": below}
    limits = {sign: limit for sign, limit in allowed.items() if limit is not None}
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not all(_COMPARE[sign](value, limit) for sign, limit in limits.items()):
        rule = " and ".join(f"{sign} {limit:g}" for sign, limit in limits.items())
        raise _error(name, value, meaning, f"must be a number {rule}".rstrip(), remedy)
    return float(value)


def check_choice(name: str, value: Any, choices: Collection[Any], *, meaning: str = "", remedy: str = "") -> Any:
    """Return `value` if it is one of `choices`.

    Raises:
        ValueError: If it is not. The message names the nearest choice.
    """
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise _error(name, value, meaning, f"must be one of {listed}", remedy or did_you_mean(value, choices))
    return value


def check_known(names: Iterable[str], known: Collection[str], what: str, *, remedy: str = "") -> None:
    """Check that every name is known. `what` says what the names are: "field", "key of `views`".

    Raises:
        ValueError: For the first unknown name. The message names the nearest known one.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"There is no {what} '{name}'. {did_you_mean(name, known) or remedy}".rstrip())


def did_you_mean(value: Any, choices: Iterable[Any]) -> str:
    """Return "Did you mean 'x'?" for the nearest choice, or an empty string."""
    nearest = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"Did you mean '{nearest[0]}'?" if nearest else ""


def _error(name: str, value: Any, meaning: str, rule: str, remedy: str) -> ValueError:
    subject = f"`{name}` {meaning} and {rule}" if meaning else f"`{name}` {rule}"
    return ValueError(f"{subject}, but is {value!r}. {remedy}".rstrip())
