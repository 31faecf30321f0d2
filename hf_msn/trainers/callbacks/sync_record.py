"""How the ranks of a Trainer train together, as values that people read and JSON holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ...distributed.falling_weight_decay import FallingWeightDecay
from ...distributed.local_update import LocalUpdate
from ...distributed.topology import Topology
from .codistillation import CodistillationCallback

if TYPE_CHECKING:
    from .trainer_seams import SyncCallback

# What recipes call a setting of a method, where its own name says less beside those of others.
_NAMES = {"method": "async_method", "kind": "distance"}
_OF_ONE_EXCHANGE = {"checkpoints": ("exchange_every", "transfer_steps"), "predictions": ("check_every",)}


def record_of(callback: SyncCallback | None) -> dict[str, Any] | None:
    """The method of a running callback, under `method`, and its settings that have a value; `None` if none runs.

    All ranks must call it.
    """
    if callback is None or callback.sync is None:
        return None
    if isinstance(callback, CodistillationCallback):
        return _of_replicas(callback)
    return _of_local_update(callback.sync)


def _of_replicas(callback: CodistillationCallback) -> dict[str, Any]:
    sync, settings = callback.sync, callback.sync.settings
    others = next(names for exchange, names in _OF_ONE_EXCHANGE.items() if exchange != settings.exchange)
    own = {name: value for name, value in dataclasses.asdict(settings).items() if name not in others}
    schedule = callback.settings.get("weight_decay_schedule")
    if callback.falling_weight_decay or isinstance(schedule, FallingWeightDecay):
        schedule = "falling"
    values = {
        "replicas": callback.num_replicas,
        "ranks_per_replica": callback._inner_place()[0],
        "same_batch": callback.same_batch,
        "initialization": callback.initialization,
        "publish": callback.publish,
        **own,
        **vars(sync.distance),
        "weight_decay_schedule": schedule,
    }
    return {"method": "Codistillation", **_readable(values)}


def _of_local_update(sync: LocalUpdate) -> dict[str, Any]:
    values = dict(sync._settings())
    target, most, until = values.pop("consensus control", (None, None, None))
    if target is not None:
        values |= {"consensus_target": target, "max_extra_rounds": most, "consensus_until_step": until}
    momentum = values.pop("quasi_global_momentum", None)
    values["quasi_global_momentum"] = momentum and momentum[0]
    if "topology" in values:  # described there for ranks to compare
        values["topology"] = sync.topology
    record = {"method": type(sync).__name__, **_readable(values)}
    base = getattr(sync, "base", None)
    if base is not None:
        record |= {f"base {name}": value for name, value in _of_local_update(base).items()}
    return record


def _readable(values: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in values.items():
        name = _NAMES.get(name, name)
        if isinstance(value, Topology):
            record[name] = type(value).__name__
            record |= _readable({f"topology_{setting}": own for setting, own in value._settings().items()})
        elif isinstance(value, torch.dtype):
            record[name] = str(value).removeprefix("torch.")
        elif callable(value):
            record[name] = "a function"  # where it lies in memory says nothing
        elif value is not None:
            record[name] = value if isinstance(value, (str, int, float)) else str(value)
    return record
