"""Training with little communication, in a recipe: the methods, and their fields, made from their signatures."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer

from ..distributed import topology
from ..distributed.async_gossip import AsyncGossip
from ..distributed.codistillation import Codistillation
from ..distributed.diloco import DiLoCo
from ..distributed.gossip import Gossip
from ..distributed.local_sgd import LocalSGD
from ..distributed.noloco import NoLoCo
from ..distributed.overlap_gossip import OverlapGossip
from ..distributed.slowmo import SlowMo
from ..distributed.streaming_diloco import StreamingDiLoCo
from ..optim.by_name import find_optimizer
from ..trainers.argument_names import in_terms_of
from ..trainers.callbacks.codistillation import CodistillationCallback
from ..trainers.callbacks.local_update import (
    AsyncGossipCallback,
    DiLoCoCallback,
    GossipCallback,
    LocalSGDCallback,
    NoLoCoCallback,
    OverlapGossipCallback,
    SlowMoCallback,
    StreamingDiLoCoCallback,
)
from .parser import Option, documentation, options_of, parameters_of

TOPOLOGIES = {
    "ring": topology.RingTopology,
    "complete": topology.CompleteTopology,
    "exponential": topology.ExponentialTopology,
    "bipartite_exponential": topology.BipartiteExponentialTopology,
    "random_one_peer": topology.RandomOnePeerTopology,
}
# The methods that SlowMo runs over.
BASES = ("gossip", "overlap_gossip", "local_sgd")
# Fields that are not called as the parameter; None: no field.
_NAMES = {
    **{name: f"sync_{name}" for name in ("timeout_seconds", "wire_dtype", "base_buffers")},
    "log_consensus_distance": None,
    "on_lost_rank": None,  # a Trainer needs all ranks
}
# What makes the outer optimizer of DiLoCo.
_OUTER_FIELDS: dict[str, tuple[Any, str]] = {
    "outer_optim": (
        str,
        "Outer optimizer: a class of torch.optim, timm:lamb or package.module:Class (SGD).",
    ),
    "outer_optim_args": (str, "Its arguments, as in a call: betas=(0.9,0.99). With SGD: momentum=0.9,nesterov=true."),
    "outer_lr": (float, "Its learning rate (0.7). It must be given with another outer_optim."),
}


@dataclass(frozen=True)
class SyncMethod:
    """A method: its class for any training loop, its callback for any Trainer, and the names of its fields.

    Fields in `names` are not called as the parameter (`None`: no field); the others are, with `prefix`.
    """

    core: type
    callback: type
    names: dict[str, str | None] = field(default_factory=dict)
    prefix: str = ""

    def fields(self) -> dict[str, Option]:
        """Return the fields of a recipe that the method has, by the names of the parameters."""
        names, found = {**_NAMES, **self.names}, {}
        for option in (*options_of(self.core), *options_of(self.callback, self.core)):
            name = names.get(option.name, f"{self.prefix}{option.name}")
            if name is not None:
                found.setdefault(option.name, replace(option, name=name))
        helps, parameters = documentation(self.core), parameters_of(self.core)
        if "topology" in parameters:
            annotation = Literal[tuple(TOPOLOGIES)]
            found["topology"] = Option("sync_topology", annotation, None, helps.get("topology", ""))
            text = "Peers that a rank sends to at a step, with sync_topology exponential."
            found["peers_per_step"] = Option("sync_peers_per_step", int, None, text)
        if "base" in parameters:
            found["base"] = Option("sync_base", Literal[BASES], None, helps.get("base", ""))
            text = "`sync_every` of sync_base: steps between two averages (local_sgd, 12) or mixings (gossip, 1)."
            found["base_every"] = Option("sync_base_every", int, None, text)
        if "fragments" in parameters:
            text = "Layers in turn, or runs of parameters of about equal size."
            found["fragments"] = Option("fragments", Literal["strided", "size"], "strided", text)
        if "outer_optimizer" in parameters:
            for name, (annotation, text) in _OUTER_FIELDS.items():
                found[name] = Option(name, annotation, None, text)
        return found


SYNC_METHODS = {
    "local_sgd": SyncMethod(LocalSGD, LocalSGDCallback),
    "slowmo": SyncMethod(SlowMo, SlowMoCallback, {"average": "slow_average", "shard_state": "slow_shard_state"}),
    "diloco": SyncMethod(DiLoCo, DiLoCoCallback),
    "streaming_diloco": SyncMethod(StreamingDiLoCo, StreamingDiLoCoCallback, {"delay": "fragment_delay"}),
    "gossip": SyncMethod(Gossip, GossipCallback),
    # a step always ends a period
    "overlap_gossip": SyncMethod(OverlapGossip, OverlapGossipCallback, {"sync_every": None}),
    "async_gossip": SyncMethod(
        AsyncGossip,
        AsyncGossipCallback,
        {**{name: f"async_{name}" for name in ("method", "rate_correction", "seed")}, "base_buffers": None},
    ),
    "noloco": SyncMethod(
        NoLoCo,
        NoLoCoCallback,
        {"outer_lr": "noloco_lr", "outer_momentum": "noloco_momentum", "pull": "noloco_pull", "seed": "noloco_seed"},
    ),
    "codistillation": SyncMethod(Codistillation, CodistillationCallback, prefix="codistillation_"),
}


def sync_options() -> list[Option]:
    """Return `sync` and the fields of all methods. A field of several methods is described as by the first."""
    text = f"{', '.join(SYNC_METHODS)}; none: gradients are averaged at every step."
    found = {"sync": Option("sync", Literal[tuple(SYNC_METHODS)] | None, None, text)}
    for method in SYNC_METHODS.values():
        for option in method.fields().values():
            found.setdefault(option.name, replace(option, annotation=option.annotation | None))
    return list(found.values())


class SyncArguments:
    """The method `sync` and its fields, from [`sync_options`]. A field left out has the default of its method."""

    def __init__(self, sync: str | None = None, **fields: Any):
        fields = {name: value for name, value in fields.items() if value is not None}
        self.method = None if sync is None else SYNC_METHODS[sync]
        own = {} if self.method is None else self.method.fields()
        self.base = SYNC_METHODS[fields["sync_base"]] if "base" in own and "sync_base" in fields else None
        # SlowMo's own period, precision and moments are those of its outer steps
        under, base_every = {}, own.pop("base_every", None)
        if self.base is not None:
            of_base = self.base.fields()
            under = {p: o for p, o in of_base.items() if p not in own} | {"timeout_seconds": own["timeout_seconds"]}
            if "sync_every" in of_base:
                under["sync_every"] = base_every
        self._names = {parameter: option.name for parameter, option in {**under, **own}.items()}
        self._base_names = {parameter: option.name for parameter, option in {**own, **under}.items()}
        known = {*self._names.values(), *self._base_names.values()}
        if base_every is not None and "sync_base_every" in fields and "sync_base_every" not in known:
            raise ValueError(
                "`sync_base_every` belongs to `sync_base` local_sgd, gossip, but `sync_base` is "
                f"{fields.get('sync_base')}. Leave it out, or choose one of these."
            )
        for name in fields:
            if name not in known:
                raise _unknown(name, sync, known)
        if "sync_peers_per_step" in fields and fields.get("sync_topology") != "exponential":
            raise ValueError(
                "`sync_peers_per_step` belongs to `sync_topology` exponential, but `sync_topology` is "
                f"{fields.get('sync_topology')}. Give both."
            )
        self.settings = {p: fields[o.name] for p, o in own.items() if o.name in fields}
        self.base_settings = {p: fields[o.name] for p, o in under.items() if o.name in fields}
        if self.method is not None:
            self._check_values()

    def add_callback(self, trainer: Trainer) -> None:
        """Add the callback of the method to a trainer, if there is a method."""
        if self.method is None:
            return
        world_size = trainer.args.world_size
        with in_terms_of(self._names):
            settings = _with_topology(_with_outer_optimizer(self.settings), world_size)
            if self.base is not None:
                settings["base"] = partial(self.base.core, **_with_topology(self.base_settings, world_size))
            trainer.add_callback(self.method.callback(trainer, **settings))

    def _check_values(self) -> None:
        """Check the values before any data is read, except those that depend on the number of ranks."""
        later = ("topology", "peers_per_step", "base")
        num_layers = max(4, min(self.settings.get("num_fragments", 4), 1000))  # one for each fragment
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(num_layers)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        levels = [(self.method, self.settings, self._names), (self.base, self.base_settings, self._base_names)]
        for method, settings, names in levels:
            if method is not None:
                known = parameters_of(method.core)
                with in_terms_of(names):
                    settings = _with_outer_optimizer(settings)
                    settings = {name: v for name, v in settings.items() if name in known and name not in later}
                    method.core(model, optimizer, **settings)


def _with_outer_optimizer(settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    name, arguments, lr = (settings.pop(field, None) for field in _OUTER_FIELDS)
    if name is arguments is lr is None:
        return settings
    if lr is None and name is not None:
        raise ValueError(f"`outer_lr` must be given with `outer_optim`, which is '{name}'. Nesterov's SGD has 0.7.")
    if name is None:
        arguments = arguments or "momentum=0.9,nesterov=true"
    name = name or "SGD"
    with in_terms_of({"optim": "outer_optim", "optim_args": "outer_optim_args"}):
        own_fields = {"params": "model", "lr": "outer_lr"}
        cls, found = find_optimizer(name if ":" in name else f"torch.optim:{name}", arguments, own_fields)
    return settings | {"outer_optimizer": partial(cls, lr=0.7 if lr is None else lr, **found)}


def _with_topology(settings: dict[str, Any], world_size: int) -> dict[str, Any]:
    settings = dict(settings)
    peers = {"peers_per_step": settings.pop("peers_per_step")} if "peers_per_step" in settings else {}
    if "topology" in settings:
        settings["topology"] = TOPOLOGIES[settings["topology"]](world_size, **peers)
    return settings


def _unknown(name: str, sync: str | None, known: Iterable[str]) -> ValueError:
    owners = [title for title, method in SYNC_METHODS.items() if name in [o.name for o in method.fields().values()]]
    rule = f"`{name}` belongs to `sync` {', '.join(owners)}"
    if sync is None:
        return ValueError(f"{rule}, but `sync` is not given. Give `sync`, or leave `{name}` out.")
    return ValueError(f"{rule}, but `sync` is {sync}. Leave it out; {sync} takes {', '.join(sorted(set(known)))}.")
