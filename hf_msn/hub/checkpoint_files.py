"""The files that a checkpoint folder must have to be of use to others, and whether they are whole."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..models.prediction_average import PUBLISHED_FILE, replica_folders

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises a `ValueError` if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"'{path.name}' of '{path.parent}' does not parse as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path.name}' of '{path.parent}' must be a JSON object, but is a {type(value).__name__}.")
    return value


def find_weights(folder: Path) -> list[str]:
    """The names of the safetensors files of a folder, once all of them are whole.

    Raises:
        ValueError: If one is missing or damaged, or the index of shards names anything else.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        names = [WEIGHTS]
    else:
        listed = read_json(folder / INDEX).get("weight_map")
        names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
        for name in names or [""]:
            if not _SHARD.fullmatch(name):
                raise ValueError(f"'{INDEX}' of '{folder}' names '{name}', which is no file of weights.")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(
                f"'{folder}' has no '{name}'. Weights are published as safetensors: `save_pretrained` writes them."
            )
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"'{name}' of '{folder}' is damaged ({error}). Take another checkpoint, or save the model anew."
            ) from error
    return names


def model_files(folder: Path, weights: list[str]) -> list[str]:
    """The names of all that loads the model of a folder: configuration, image processor, weights and their index."""
    names = ["config.json", IMAGE_PROCESSOR, *([INDEX] if weights != [WEIGHTS] else []), *weights]
    return [name for name in names if (folder / name).is_file()]


def find_replicas(folder: Path) -> dict[str, list[str]]:
    """The folders of the replicas whose average a run has published, and the files of each; none without an average.

    Raises:
        ValueError: If one is missing, damaged, or not of the model beside it.
    """
    if not (folder / PUBLISHED_FILE).is_file():
        return {}
    names = replica_folders(read_json(folder / PUBLISHED_FILE), f"'{PUBLISHED_FILE}' of '{folder}'") or []
    remedy = "An average needs all of its replicas: take the run's `output_dir` as the training left it."
    replicas = {}
    for name in names:
        replica = folder / name
        if not (replica / "config.json").is_file():
            what = "has no 'config.json'" if replica.is_dir() else "is not there"
            raise ValueError(f"'{PUBLISHED_FILE}' of '{folder}' names '{name}', which {what}. {remedy}")
        for field in ("model_type", "architectures", "id2label"):
            own, others = (read_json(place / "config.json").get(field) for place in (replica, folder))
            if own != others:
                raise ValueError(
                    f"'{name}' of '{folder}' is no replica of the model beside it: `{field}` is {own} and {others}. "
                    f"{remedy}"
                )
        replicas[name] = model_files(replica, find_weights(replica))
    return replicas
