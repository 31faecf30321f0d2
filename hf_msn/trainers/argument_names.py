"""Errors of the layers below, in terms of the fields that a user has set."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

SUPPORT_FIELDS = {
    "global_classes": "global_support_classes",
    "global_images_per_class": "global_support_images_per_class",
    "shard": "support_shard",
    "on_small_class": "support_on_small_class",
}


@contextmanager
def in_terms_of(names: dict[str, str]) -> Iterator[None]:
    """Rename arguments, written as `name` or name=value, in the message of a `ValueError` from the block."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, field in names.items():
            message = re.sub(rf"`{name}`", f"`{field}`", message)
            message = re.sub(rf"(?<!\w){name}=", f"{field}=", message)
        if message == str(error):
            raise
        raise ValueError(message) from error
