"""The part of a recipe that says how ranks train with little communication."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..distributed import topology
from ..distributed.async_gossip import AsyncGossip
from ..distributed.codistillation import Codistillation
from ..distributed.gossip import Gossip
from ..distributed.local_sgd import LocalSGD
from ..distributed.overlap_gossip import OverlapGossip
from ..distributed.slowmo import SlowMo
from ..trainers.argument_names import in_terms_of
from ..trainers.callbacks import codistillation, local_update

_CLASSES = {
    cls.__name__: cls
    for cls in (
        AsyncGossip,
        Codistillation,
        Gossip,
        LocalSGD,
        OverlapGossip,
        SlowMo,
        local_update.AsyncGossipCallback,
        codistillation.CodistillationCallback,
        local_update.GossipCallback,
        local_update.LocalSGDCallback,
        local_update.OverlapGossipCallback,
        local_update.SlowMoCallback,
    )
}

TOPOLOGIES = {
    "ring": topology.RingTopology,
    "complete": topology.CompleteTopology,
    "exponential": topology.ExponentialTopology,
    "bipartite_exponential": topology.BipartiteExponentialTopology,
    "random_one_peer": topology.RandomOnePeerTopology,
}

_ALL = ("sync_start_step", "sync_base_buffers", "sync_timeout_seconds", "sync_wire_dtype")
_ASYNC = (
    "sync_start_step",
    "sync_timeout_seconds",
    "sync_wire_dtype",
    "async_method",
    "async_rate_correction",
    "async_seed",
)
_SLOW = ("slow_momentum", "slow_lr", "slow_average", "slow_shard_state", "sync_base")
_PEERS = ("sync_topology", "sync_peers_per_step")
_CONSENSUS = ("consensus_target", "max_extra_rounds", "consensus_until_step")
_CODISTILLATION = (
    "sync_timeout_seconds",
    "sync_wire_dtype",
    "codistillation_exchange",
    "codistillation_exchange_every",
    "codistillation_transfer_steps",
    "codistillation_alpha",
    "codistillation_ramp_steps",
    "codistillation_burn_in_steps",
    "codistillation_distance",
    "codistillation_temperature",
    "codistillation_top_k",
    "codistillation_check_every",
    "codistillation_copies_dtype",
    "codistillation_copies_device",
)
# Of the callback alone.
_ON_A_TRAINER = (
    "codistillation_same_batch",
    "codistillation_inner_size",
    "codistillation_initialization",
    "codistillation_falling_weight_decay",
    "codistillation_publish",
)
_BASES = {
    "gossip": (*_PEERS, "push_sum", "quasi_global_momentum", *_CONSENSUS),
    "overlap_gossip": (*_PEERS, "staleness_bound", "deterministic"),
}
# The class in `distributed` (and, with Callback, in `callbacks`) of each method, and the fields that it knows.
METHODS = {
    "local_sgd": ("LocalSGD", ("sync_every", *_ALL)),
    "slowmo": ("SlowMo", ("sync_every", *_ALL, *_SLOW)),
    "gossip": ("Gossip", ("sync_every", *_ALL, *_BASES["gossip"])),
    "overlap_gossip": ("OverlapGossip", (*_ALL, *_BASES["overlap_gossip"])),
    "async_gossip": ("AsyncGossip", ("sync_every", *_ASYNC, *_PEERS)),
    "codistillation": ("Codistillation", (*_CODISTILLATION, *_ON_A_TRAINER)),
}
_NOT_OF_THE_METHOD = ("sync_topology", "sync_peers_per_step", *_ON_A_TRAINER)
# What a method calls a field, where it is not the field's own name.
_NAMES = {
    "sync_base_buffers": "base_buffers",
    "sync_timeout_seconds": "timeout_seconds",
    "sync_topology": "topology",
    "sync_peers_per_step": "peers_per_step",
    "sync_wire_dtype": "wire_dtype",
    "slow_average": "average",
    "slow_shard_state": "shard_state",
    "async_method": "method",
    "async_rate_correction": "rate_correction",
    "async_seed": "seed",
    **{name: name.removeprefix("codistillation_") for name in (*_CODISTILLATION[2:], *_ON_A_TRAINER)},
}


@dataclass
class SyncArguments:
    """Local steps on each rank, and exchanges now and then; see [`LocalUpdate`]. A field left out is the method's own.

    Raises:
        ValueError: If a field is given that the method does not know, or any without `sync`.
    """

    sync: str | None = field(
        default=None,
        metadata={
            "help": "local_sgd, slowmo, gossip, overlap_gossip, async_gossip or codistillation; none: gradients are "
            "averaged at every step."
        },
    )
    sync_every: int | None = field(
        default=None, metadata={"help": "Updates of a period between two outer steps; SlowMo's paper has 12."}
    )
    sync_start_step: int | None = field(
        default=None, metadata={"help": "Number of first updates with averaged gradients (post-local SGD)."}
    )
    sync_base_buffers: str | None = field(
        default=None, metadata={"help": "Optimizer moments at an outer step: maintain, reset or average."}
    )
    sync_timeout_seconds: float | None = field(
        default=None, metadata={"help": "Deadline of an exchange, after which the missing rank is named."}
    )
    slow_momentum: float | None = field(default=None, metadata={"help": "SlowMo's beta, in [0, 1); paper: 0.4-0.8."})
    slow_lr: float | None = field(default=None, metadata={"help": "SlowMo's alpha, > 0; paper: 1."})
    slow_average: bool | None = field(
        default=None, metadata={"help": "false: SlowMo without the average at an outer step ('noaverage')."}
    )
    slow_shard_state: bool | None = field(
        default=None, metadata={"help": "Each rank keeps its share of SlowMo's anchor and momentum only."}
    )
    sync_base: str | None = field(
        default=None,
        metadata={"help": "SlowMo over gossip or overlap_gossip, whose fields it then takes; by default Local SGD."},
    )
    sync_topology: str | None = field(
        default=None, metadata={"help": f"Who gossips with whom: {', '.join(TOPOLOGIES)}."}
    )
    sync_peers_per_step: int | None = field(
        default=None, metadata={"help": "Peers that a rank sends to at a step, with sync_topology exponential."}
    )
    sync_wire_dtype: str | None = field(
        default=None, metadata={"help": "What exchanges send: float32 or bfloat16; by default the parameters' own."}
    )
    push_sum: bool | None = field(
        default=None, metadata={"help": "Gossip by push-sum (SGP), or doubly stochastic without it (D-PSGD)."}
    )
    quasi_global_momentum: float | None = field(
        default=None, metadata={"help": "Momentum of gossip along the mixed parameters, for SGD without its own."}
    )
    consensus_target: float | None = field(
        default=None, metadata={"help": "Gossip mixes again while the consensus distance is over this."}
    )
    max_extra_rounds: int | None = field(
        default=None, metadata={"help": "Mixings after one update that consensus_target can ask for, at most."}
    )
    consensus_until_step: int | None = field(
        default=None, metadata={"help": "Number of first updates that consensus_target holds for; by default all."}
    )
    staleness_bound: int | None = field(
        default=None, metadata={"help": "Updates that a message of overlap_gossip may be late."}
    )
    deterministic: bool | None = field(
        default=None, metadata={"help": "overlap_gossip takes each message at the step of the bound, not on arrival."}
    )
    async_method: str | None = field(default=None, metadata={"help": "async_gossip by ad_psgd or push_sum."})
    async_rate_correction: bool | None = field(
        default=None, metadata={"help": "false: the steps of fast ranks are not made smaller, and bias the optimum."}
    )
    async_seed: int | None = field(default=None, metadata={"help": "Seed of ad_psgd's random neighbours."})
    codistillation_exchange: str | None = field(
        default=None, metadata={"help": "What replicas send to each other: predictions or checkpoints."}
    )
    codistillation_exchange_every: int | None = field(
        default=None, metadata={"help": "Updates between two checkpoints that replicas exchange; by default 2500."}
    )
    codistillation_transfer_steps: int | None = field(
        default=None, metadata={"help": "Updates from sending a checkpoint to using it; by default a tenth of those."}
    )
    codistillation_alpha: float | None = field(
        default=None, metadata={"help": "Weight of the distance from the other replicas, >= 0; by default 1."}
    )
    codistillation_ramp_steps: int | None = field(
        default=None, metadata={"help": "Updates over which that weight rises from 0, after the burn-in."}
    )
    codistillation_burn_in_steps: int | None = field(
        default=None, metadata={"help": "Number of first updates in which each replica trains alone."}
    )
    codistillation_distance: str | None = field(
        default=None, metadata={"help": "Distance between predictions: kl or mse."}
    )
    codistillation_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the softmax of kl, > 0."}
    )
    codistillation_top_k: int | None = field(
        default=None, metadata={"help": "Only so many of a prediction's probabilities travel; by default all."}
    )
    codistillation_check_every: int | None = field(
        default=None,
        metadata={"help": "Replicas compare batches at every so many exchanges; by default at each."},
    )
    codistillation_copies_dtype: str | None = field(
        default=None, metadata={"help": "bfloat16: precision of the checkpoints that travel, and of their copies."}
    )
    codistillation_copies_device: str | None = field(
        default=None, metadata={"help": "cpu: where the copies of other replicas rest between forward passes."}
    )
    codistillation_same_batch: bool | None = field(
        default=None,
        metadata={"help": "Whether replicas see the same batches; by default with an exchange of predictions only."},
    )
    codistillation_inner_size: int | None = field(
        default=None, metadata={"help": "Ranks of one replica, which average their gradients; by default 1."}
    )
    codistillation_initialization: str | None = field(
        default=None, metadata={"help": "own or same: whether replicas begin with parameters of their own."}
    )
    codistillation_falling_weight_decay: bool | None = field(
        default=None, metadata={"help": "Weight decay falls to a tenth and to 0 at thirds of the training."}
    )
    codistillation_publish: str | None = field(
        default=None,
        metadata={"help": "The replica that the run ends with: first or best; average is for models with classes."},
    )

    def __post_init__(self):
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        if self.sync is None:
            if given:
                raise ValueError(
                    f"`{given[0]}` is of training with little communication, but `sync` is not given. Give `sync`, "
                    f"one of {', '.join(METHODS)}, or leave `{given[0]}` out."
                )
            return
        if self.sync not in METHODS:
            raise ValueError(f"`sync` must be one of {', '.join(METHODS)}, but is '{self.sync}'.")
        if self.sync_base is not None and self.sync_base not in _BASES:
            raise ValueError(f"`sync_base` must be one of {', '.join(_BASES)}, but is '{self.sync_base}'.")
        known = METHODS[self.sync][1]
        known += _BASES[self.sync_base] if self.sync_base is not None and self.sync == "slowmo" else ()
        for name in given:
            if name != "sync" and name not in known:
                owners = [method for method, (_, fields) in METHODS.items() if name in fields]
                raise ValueError(
                    f"`{name}` is of `sync` {' and '.join(owners)}, but `sync` is {self.sync}"
                    f"{' without `sync_base`' if self.sync == 'slowmo' and self.sync_base is None else ''}. "
                    f"Leave it out; {self.sync} takes {', '.join(known)}."
                )
        if self.sync_topology is not None and self.sync_topology not in TOPOLOGIES:
            raise ValueError(f"`sync_topology` must be one of {', '.join(TOPOLOGIES)}, but is '{self.sync_topology}'.")
        if self.sync_peers_per_step is not None and self.sync_topology != "exponential":
            raise ValueError(
                f"`sync_peers_per_step` is of `sync_topology` exponential, but that is {self.sync_topology}. Give "
                "both."
            )
        self._check_values()

    def add_callback(self, trainer: Trainer) -> None:
        """Adds the callback of the method, if there is one, to a trainer."""
        if self.sync is None:
            return
        title, known = METHODS[self.sync]
        with in_terms_of(_fields_by_name()):
            settings = self._settings(known, trainer.args.world_size)
            if self.sync_base is not None:
                settings["base"] = self._make_base(trainer.args.world_size)
            trainer.add_callback(_CLASSES[f"{title}Callback"](trainer, **settings))

    def _settings(self, fields: tuple[str, ...], world_size: int) -> dict[str, Any]:
        """The arguments of a method that `fields` give."""
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        given.pop("sync_base", None)
        peers = given.pop("sync_peers_per_step", None)
        if self.sync_topology is not None and "sync_topology" in given:
            topology = TOPOLOGIES[self.sync_topology]
            given["sync_topology"] = topology(world_size, **({} if peers is None else {"peers_per_step": peers}))
        return {_NAMES.get(name, name): value for name, value in given.items()}

    def _base_title(self) -> list[str]:
        return [] if self.sync_base is None else [METHODS[self.sync_base][0]]

    def _make_base(self, world_size: int):
        (title,) = self._base_title()
        fields = (*_BASES[self.sync_base], "sync_timeout_seconds")  # SlowMo's own precision is for its outer steps
        return partial(_CLASSES[title], **self._settings(fields, world_size))

    def _check_values(self) -> None:
        """Before any data is read; what depends on the number of ranks is checked when the callback is made."""
        fields = [name for name in METHODS[self.sync][1] if name not in _NOT_OF_THE_METHOD]
        parameter = nn.Linear(1, 1)
        with in_terms_of(_fields_by_name()):
            method = _CLASSES[METHODS[self.sync][0]]
            method(parameter, torch.optim.SGD(parameter.parameters(), lr=1.0), **self._settings(tuple(fields), 1))


def _fields_by_name() -> dict[str, str]:
    return {name: field_name for field_name, name in _NAMES.items()}
