"""Thin adapters between the events of a Trainer and the objects of the layers above."""

from .codistillation import CodistillationCallback
from .sync import (
    AsyncGossipCallback,
    GossipCallback,
    LocalSGDCallback,
    LocalUpdateCallback,
    OverlapGossipCallback,
    SlowMoCallback,
)
from .trainer_seams import bring_to_consensus
from .training import DatasetEpochCallback, LowShotCallback, ThroughputProgressCallback, UpdateTargetCallback

__all__ = [
    "AsyncGossipCallback",
    "CodistillationCallback",
    "DatasetEpochCallback",
    "GossipCallback",
    "LocalSGDCallback",
    "LocalUpdateCallback",
    "LowShotCallback",
    "OverlapGossipCallback",
    "SlowMoCallback",
    "ThroughputProgressCallback",
    "UpdateTargetCallback",
    "bring_to_consensus",
]
