"""What runs over `torch.distributed`: knows no model, no loss and no Trainer."""

from .async_gossip import AsyncGossip
from .batch_norm import CrossRankBatchNorm, synchronize_batch_norm
from .codistillation import Codistillation
from .collectives import all_gather_cat, all_reduce_mean, all_reduce_sum, is_distributed, rank, world_size
from .falling_weight_decay import FallingWeightDecay
from .gossip import Gossip
from .local_sgd import LocalSGD
from .local_update import LocalUpdate
from .messages.exchange import PeerError
from .messages.flat import FlatTensors
from .overlap_gossip import OverlapGossip
from .slowmo import SlowMo
from .topology import (
    BipartiteExponentialTopology,
    CompleteTopology,
    ExponentialTopology,
    RandomOnePeerTopology,
    RepairedTopology,
    RingTopology,
    Topology,
)

__all__ = [
    "AsyncGossip",
    "BipartiteExponentialTopology",
    "Codistillation",
    "CompleteTopology",
    "CrossRankBatchNorm",
    "ExponentialTopology",
    "FallingWeightDecay",
    "FlatTensors",
    "Gossip",
    "LocalSGD",
    "LocalUpdate",
    "OverlapGossip",
    "PeerError",
    "RandomOnePeerTopology",
    "RepairedTopology",
    "RingTopology",
    "SlowMo",
    "Topology",
    "all_gather_cat",
    "all_reduce_mean",
    "all_reduce_sum",
    "is_distributed",
    "rank",
    "synchronize_batch_norm",
    "world_size",
]
