"""What each rank keeps in a checkpoint where the ranks train locally: the Trainer saves rank 0 only."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ...distributed.codistillation import Codistillation
from ...distributed.local_update import LocalUpdate

logger = logging.get_logger(__name__)


def sync_state_file(folder: str | Path, rank: int) -> Path:
    """Where a rank's state lies in a checkpoint."""
    return Path(folder, f"sync_state_{rank}.pt")


def settings_of(sync: LocalUpdate | Codistillation) -> dict[str, str]:
    """The method and its settings, as text: what a saved state must have in common with the run that goes on."""
    if isinstance(sync, Codistillation):
        distance = {name: repr(value) for name, value in vars(sync.distance).items()}
        return {"method": "Codistillation", **sync.settings.described(), **distance}
    described = {"method": type(sync).__name__, **{name: repr(value) for name, value in sync._settings().items()}}
    base = getattr(sync, "base", None)
    if base is not None:
        described.update({f"base {name}": value for name, value in settings_of(base).items()})
    return described


def save_rank(trainer: Trainer, sync: LocalUpdate | Codistillation, folder: str) -> None:
    """Writes what this rank alone knows.

    Of local steps parameters and buffers are at consensus, and so in the model's own file; of replicas they are not.
    """
    scaler = getattr(trainer.accelerator, "scaler", None)
    rank = trainer.args.process_index
    state = {
        "world_size": trainer.args.world_size,
        "global_step": trainer.state.global_step,
        "settings": settings_of(sync),
        "sync": sync.state_dict(),
        "model": trainer.model.state_dict() if rank > 0 and isinstance(sync, Codistillation) else None,
        # optimizer.pt is rank 0's.
        "optimizer": trainer.optimizer.state_dict() if rank > 0 else None,
        "lr_scheduler": trainer.lr_scheduler.state_dict(),  # a scaler may have skipped steps on this rank only
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    os.makedirs(folder, exist_ok=True)
    torch.save(state, sync_state_file(folder, rank))


def load_rank(trainer: Trainer, sync: LocalUpdate | Codistillation, checkpoint: str) -> dict[str, Any] | None:
    """This rank's part of a checkpoint, or `None` (on all ranks) where the run starts from its model; says so.

    Raises:
        ValueError: On all ranks, if a rank's file is missing or damaged, or of another method or setting.
    """
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    held = "the model of the first replica" if isinstance(sync, Codistillation) else "the consensus"
    state, report = _read(checkpoint, rank)
    reports = _gather(report, world_size)
    saved = {entry["world_size"] for entry in reports} - {None}
    if not any(entry["found"] for entry in reports):
        _say(trainer, f"'{checkpoint}' was saved without local steps: {type(sync).__name__} starts from its model.")
        return None
    if saved and saved != {world_size}:
        _say(
            trainer,
            f"'{checkpoint}' was saved by {max(saved)} ranks and goes on with {world_size}: {type(sync).__name__} "
            f"starts anew from {held} that it holds, with rank 0's optimizer state on all ranks.",
        )
        return None
    for place, entry in enumerate(reports):
        if entry["damage"]:
            raise ValueError(
                f"Cannot resume from '{checkpoint}': '{sync_state_file('', place)}', which holds the local training "
                f"of rank {place}, {entry['damage']}. Give another checkpoint, or delete all its 'sync_state_*.pt' to "
                f"start from {held} that it holds."
            )
    now = settings_of(sync)
    for entry in reports:
        there = entry["settings"]
        differing = [
            f"{name} {there.get(name, 'not there')} there, {now.get(name, 'not there')} here"
            for name in {**there, **now}
            if there.get(name) != now.get(name)
        ]
        if differing:
            raise ValueError(
                f"'{checkpoint}' must be resumed with the method and settings that it was saved with, but has "
                f"{', '.join(differing)}. Give the same, or delete its 'sync_state_*.pt' to start from {held} "
                "that it holds."
            )
    return state


def restore(trainer: Trainer, sync: LocalUpdate | Codistillation, state: dict[str, Any]) -> None:
    """Gives this rank its own optimizer, schedule, scaler (and model) for rank 0's, and the sync object its state."""
    if state.get("model") is not None:
        trainer.model.load_state_dict(state["model"])
    if state["optimizer"] is not None:
        trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if state["scaler"] is not None and getattr(trainer.accelerator, "scaler", None) is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    sync.load_state_dict(state["sync"])


def load_renamed_weights(trainer: Trainer, checkpoint: str) -> None:
    """Loads the model by its class where the Trainer, which goes by names alone, has left weights as they were.

    transformers saves some models, ViT among them, under the names of earlier versions, which only `from_pretrained`
    knows how to read.
    """
    model = trainer.model
    if (
        not isinstance(model, PreTrainedModel)
        or type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint
    ):
        return
    saved = set()
    for file in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            saved.update(weights.keys())
    if not saved <= set(model.state_dict()):
        model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())


def _read(checkpoint: str, rank: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The state of a rank, and what the other ranks must know of it."""
    own, others = sync_state_file(checkpoint, rank), sorted(Path(checkpoint).glob("sync_state_*.pt"))
    report: dict[str, Any] = {"found": bool(others), "world_size": None, "settings": {}, "damage": "is missing"}
    if own.is_file():
        try:
            state = torch.load(own, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has many ways to fail on half a file
            return None, {**report, "damage": f"is damaged ({str(error).splitlines()[0]})"}
        return state, {**report, "world_size": state["world_size"], "settings": state["settings"], "damage": None}
    if others:
        try:
            other = torch.load(others[0], map_location="cpu", mmap=True, weights_only=True)
            report["world_size"] = other["world_size"]
        except Exception:  # its own rank says so
            return None, report
    return None, report


def _gather(report: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    if world_size == 1:
        return [report]
    reports: list = [None] * world_size
    dist.all_gather_object(reports, report)
    return reports


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_world_process_zero():
        logger.warning(line)
