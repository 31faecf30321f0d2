"""Which checkpoints of a run are whole, and what to say of those that are not or cannot be written."""

import json
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
STAGING_FOLDER = ".incomplete"


class CheckpointError(OSError):
    """A checkpoint could not be written or is not fit to resume from."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, oldest step first, whole or not."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and _CHECKPOINT.match(path.name)]
    return sorted(found, key=lambda path: int(_CHECKPOINT.match(path.name).group(1)))


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that is whole. Each broken one is named in a warning and skipped.

    Args:
        output_dir (`str` or `Path`): The `output_dir` of the run.

    Returns:
        `Path` or `None`: `None` if the run has no whole checkpoint.
    """
    for abandoned in sorted(Path(output_dir, STAGING_FOLDER).glob("checkpoint-*")):
        logger.warning(f"Skipping '{abandoned}': the run was stopped while it was writing this checkpoint.")
    for path in reversed(list_checkpoints(output_dir)):
        fault = find_fault(path)
        if fault is None:
            return path
        logger.warning(f"Skipping the broken checkpoint '{path}': {fault}.")
    return None


def find_fault(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint folder, or `None` if a run can be resumed from it.

    Reads headers and directories of the files, not the tensors: it is quick for a model of any size.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        json.loads((checkpoint / "config.json").read_text())
    except FileNotFoundError as error:
        return f"'{Path(error.filename).name}' is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"a JSON file does not parse ({error})"
    named = _CHECKPOINT.match(checkpoint.name)
    if named and step != int(named.group(1)):
        return f"'trainer_state.json' is of step {step}"

    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "'model.safetensors' is missing"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"'{file.name}' is damaged ({error})"

    if not any(checkpoint.glob("rng_state*.pth")):
        return "'rng_state.pth' is missing (was it saved with `save_only_model`?)"
    of_ranks = [file.name for file in sorted(checkpoint.glob("rng_state*.pth"))]
    if any(checkpoint.glob("sync_state_*.pt")):  # each rank that trained locally has one
        of_ranks += [f"sync_state_{rank}.pt" for rank in range(saved_world_size(checkpoint))]
    for name in ("optimizer.pt", "scheduler.pt", *of_ranks):
        file = checkpoint / name
        if not file.is_file():
            return f"'{name}' is missing"
        if not zipfile.is_zipfile(file):
            return f"'{name}' is damaged (its end is missing)"
    return None


def find_config_differences(folder: str | Path, config: PreTrainedConfig) -> str | None:
    """How the configuration in a folder differs from `config`, in words; `None` if a model of one fits the other."""
    written = json.loads(Path(folder, "config.json").read_text())
    if written.get("model_type") != config.model_type:
        return f"model_type {written.get('model_type')} there, {config.model_type} here"
    there = type(config).from_pretrained(folder)
    names = (set(there.to_dict()) & set(config.to_dict())) - {"transformers_version", "dtype", "architectures"}
    differing = sorted(name for name in names if getattr(there, name) != getattr(config, name))
    return ", ".join(f"{n} {getattr(there, n)} there, {getattr(config, n)} here" for n in differing[:5]) or None


def saved_world_size(checkpoint: str | Path) -> int:
    """Number of ranks that wrote a checkpoint: each saves the state of its random number generators."""
    return max(1, len(list(Path(checkpoint).glob("rng_state_*.pth"))))


def save_failed(path: str | Path, output_dir: str | Path, error: Exception) -> CheckpointError:
    """The error to raise where saving to `path` failed: why, how much room there is, and what is still whole."""
    last = list_checkpoints(output_dir)
    free = shutil.disk_usage(output_dir).free if Path(output_dir).is_dir() else 0
    return CheckpointError(
        f"Saving '{path}' failed: {error}. {free / 2**20:.0f} MiB are free on that disk. "
        + (f"The earlier checkpoint '{last[-1]}' is as it was; " if last else "")
        + "free some space or lower `save_total_limit`, then resume."
    )
