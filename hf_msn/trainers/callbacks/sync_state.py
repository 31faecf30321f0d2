"""`sync_state_<rank>.pt`: the state that each rank adds to a checkpoint, because the Trainer saves rank 0 only."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ...distributed.training_state import is_sharded
from ...files import whole_file
from ..checkpoints import own_settings_kept

logger = logging.get_logger(__name__)

_ENTRIES = ("world_size", "global_step", "settings", "sync", "model", "optimizer", "lr_scheduler", "scaler")


def save_rank_state(
    trainer: Trainer, sync: Any, settings: dict[str, str], folder: str | Path, with_model: bool
) -> None:
    """Write the state of this rank, `with_model` where models differ: the Trainer saves that of rank 0."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    rank = trainer.args.process_index
    # optimizer.pt is rank 0's; that of a sharded model has shards of several replicas
    has_own_optimizer = rank > 0 or trainer.is_fsdp_enabled
    state = {
        "world_size": trainer.args.world_size,
        "global_step": trainer.state.global_step,
        "settings": settings,
        "sync": sync.state_dict(),
        "model": trainer.model.state_dict() if rank > 0 and with_model else None,
        "optimizer": trainer.optimizer.state_dict() if has_own_optimizer else None,
        "lr_scheduler": trainer.lr_scheduler.state_dict(),  # a scaler may have skipped steps on this rank only
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    with whole_file(Path(folder, f"sync_state_{rank}.pt"), overwrite=True) as path:
        torch.save(state, path)


def load_rank_state(trainer: Trainer, settings: dict[str, str], checkpoint: str | Path) -> dict[str, Any] | None:
    """Read the state of this rank. Every rank must call it.

    All ranks return `None`, with a warning, if the checkpoint has no such states or those of another number of ranks.
    All ranks raise if the state of a rank is missing or damaged, or was saved with other settings.
    """
    world_size = trainer.args.world_size
    state, report = _read(Path(checkpoint), trainer.args.process_index)
    reports = [report] * world_size
    if world_size > 1:
        dist.all_gather_object(reports, report)
    saved = {size for _, size, _ in reports} - {None}
    remedy = "or delete its 'sync_state_*.pt' to start from the model that it holds"
    warning = None
    if not any(is_there for is_there, _, _ in reports):
        warning = "has no 'sync_state_*.pt': the ranks start from its model."
    elif saved and saved != {world_size}:
        warning = (
            f"was saved by {max(saved)} ranks, and now there are {world_size}: all ranks start from its model, with "
            "the optimizer state of rank 0."
        )
    if warning is not None:
        if trainer.is_world_process_zero():
            logger.warning(f"'{checkpoint}' {warning}")
        return None
    for place, (_, _, damage) in enumerate(reports):
        if damage is not None:
            raise ValueError(
                f"Cannot resume from '{checkpoint}': 'sync_state_{place}.pt', the state of rank {place}, "
                f"{damage}. Choose another checkpoint, {remedy}."
            )
    there = state["settings"]
    differing = [
        f"{name} {there.get(name, 'not there')} there, {settings.get(name, 'not there')} here"
        for name in {**there, **settings}
        if there.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"'{checkpoint}' must be resumed with the method and settings that it was saved with, but has "
            f"{', '.join(differing)}. Set the same, {remedy}."
        )
    return state


def restore_rank_state(trainer: Trainer, sync: Any, state: dict[str, Any]) -> None:
    """Load the state of this rank into its sync object, optimizer, schedule, gradient scaler and model."""
    if state["model"] is not None:
        trainer.model.load_state_dict(state["model"])
    with own_settings_kept(trainer):
        if state["optimizer"] is not None:
            trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if state["scaler"] is not None and getattr(trainer.accelerator, "scaler", None) is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    sync.load_state_dict(state["sync"])


def load_renamed_weights(trainer: Trainer, checkpoint: str | Path) -> None:
    """Load the weights that `transformers.Trainer` skips because the checkpoint has them under other names.

    `save_pretrained` writes the names of earlier versions for some models, ViT among them, and only `from_pretrained`
    maps them.
    """
    model = trainer.model
    if (
        isinstance(model, PreTrainedModel)
        and not trainer.is_fsdp_enabled
        and type(trainer)._load_from_checkpoint is Trainer._load_from_checkpoint
        and not {name for name, _ in _saved_weights(checkpoint)} <= set(model.state_dict())
    ):
        model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())


def has_weights_of(checkpoint: str | Path, model: torch.nn.Module) -> bool:
    """Return whether the weights of `model` are those of a checkpoint, as far as their names are the same."""
    own = {name: t.full_tensor() if is_sharded(t) else t for name, t in model.state_dict().items()}
    return all(
        torch.equal(read(name).to(own[name].dtype), own[name].cpu())
        for name, read in _saved_weights(checkpoint)
        if name in own
    )


def _saved_weights(checkpoint: str | Path) -> Iterator[tuple[str, Callable[[str], torch.Tensor]]]:
    """Yield each name of a weight, and the function that reads it."""
    for file in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict)
                yield name, weights.get_tensor


def _read(checkpoint: Path, rank: int) -> tuple[dict[str, Any] | None, tuple[bool, int | None, str | None]]:
    """Return the state of a rank, and for the other ranks: is a state there, by how many ranks, and its damage."""
    file = checkpoint / f"sync_state_{rank}.pt"
    if not file.is_file():
        return None, (any(checkpoint.glob("sync_state_*.pt")), None, "is missing")
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not compare the checksums that it writes
            if changed := archive.testzip():
                raise ValueError(f"the checksum of '{changed}' in it is wrong")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many ways to fail on half a file
        return None, (True, None, f"is damaged ({str(error).splitlines()[0]})")
    missing = [name for name in _ENTRIES if name not in state]
    damage = f"is of another version of hf_msn: it has no {', '.join(missing)}" if missing else None
    return state, (True, state.get("world_size"), damage)
