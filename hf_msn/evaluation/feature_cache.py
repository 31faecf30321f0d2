"""Extracted features on disk, so that another probe on the same weights and images costs nothing."""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

logger = logging.getLogger(__name__)


def cache_path(cache_dir: str | os.PathLike, key: dict[str, Any]) -> Path:
    """The file of the features that `key` (JSON-serialisable) determines."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / f"features-{digest[:40]}.safetensors"


def read_cache(path: Path) -> tuple[dict[str, np.ndarray], list[Any]] | None:
    """The arrays and the skipped rows that `write_cache` stored; `None` if the file is not there or broken.

    A broken file is named in a warning, and the next `write_cache` replaces it.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a file handle, not a dict
            skipped = json.loads(file.metadata()["skipped"])
        if len(arrays["features"]) != len(arrays["rows_and_labels"]):
            raise ValueError("features and labels differ in length")
        return arrays, skipped
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The cached features in %s are broken (%s); they are extracted again.", path, error)
        return None


def write_cache(path: Path, arrays: dict[str, np.ndarray], skipped: list[Any]) -> None:
    """Stores arrays and skipped rows: beside `path`, then renamed. A failure is a warning: the features are there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, beside, metadata={"skipped": json.dumps(skipped)})
        os.replace(beside, path)
    except (SafetensorError, OSError) as error:
        logger.warning("The features cannot be cached in %s (%s); evaluation goes on without.", path, error)
        with contextlib.suppress(OSError):
            beside.unlink()
