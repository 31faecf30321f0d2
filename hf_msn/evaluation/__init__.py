"""Measuring representations with few labels: features, probes, and accuracy over splits."""

from .backbones import checkpoint_weights_sha256, load_vision_model
from .features import Features, extract_features, pixel_features
from .low_shot import LowShotEvaluator
from .metrics import TopKAccuracy, rank_classes
from .probes import KNNProbe, LinearProbe, LogisticProbe, Probe, SoftNearestNeighborProbe
from .results import LowShotResults, SplitResult, TaskResult

__all__ = [
    "Features",
    "KNNProbe",
    "LinearProbe",
    "LogisticProbe",
    "LowShotEvaluator",
    "LowShotResults",
    "Probe",
    "SoftNearestNeighborProbe",
    "SplitResult",
    "TaskResult",
    "TopKAccuracy",
    "checkpoint_weights_sha256",
    "extract_features",
    "load_vision_model",
    "pixel_features",
    "rank_classes",
]
