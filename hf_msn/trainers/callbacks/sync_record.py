"""Settings of a sync object as values that people read and JSON holds."""

from typing import Any

import torch

from ...distributed.topology import Topology

# Names of settings in recipes, where they differ from those of the methods.
_NAMES = {"method": "async_method"}


def readable(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that have a value, under the names of recipes."""
    record: dict[str, Any] = {}
    for name, value in values.items():
        name = _NAMES.get(name, name)
        if isinstance(value, Topology):
            record[name] = type(value).__name__
            record |= readable({f"topology_{setting}": own for setting, own in value._settings().items()})
        elif isinstance(value, torch.dtype):
            record[name] = str(value).removeprefix("torch.")
        elif callable(value):
            record[name] = "a function"  # its address in memory says nothing
        elif value is not None:
            record[name] = value if isinstance(value, (str, int, float)) else str(value)
    return record
