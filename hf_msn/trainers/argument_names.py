"""Errors of the layers below, in terms of the fields that a user has set."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def in_terms_of(names: Mapping[str, str | None]) -> Iterator[None]:
    """Rename arguments, written as `name` or name=value, in the message of a wrong input from the block."""
    fields = {name: field for name, field in names.items() if field is not None}
    if not fields:
        yield
        return
    written = re.compile(rf"`({'|'.join(fields)})`|(?<!\w)({'|'.join(fields)})=")
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        message = written.sub(
            lambda found: f"`{fields[found[1]]}`" if found[1] else f"{fields[found[2]]}=", str(error)
        )
        if message == str(error):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(message) from error
