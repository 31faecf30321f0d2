"""Connects a replica to the others, in the way that its settings say."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .distances import PredictionDistance
from .groups import Replicas
from .mail import ReplicaMail
from .peer_checkpoints import PeerCheckpoints
from .peer_copies import PeerCopies
from .peer_predictions import PeerPredictions
from .settings import CodistillationSettings


def open_mail(settings: CodistillationSettings, replicas: Replicas) -> ReplicaMail | None:
    """Messages in the background, where checkpoints travel or replicas may be lost. All replicas must call it."""
    if settings.exchange == "predictions" and not settings.tolerant:
        return None
    outer = replicas.outer
    return ReplicaMail(outer.group, outer.timeout_seconds, settings.tolerant).start()


def find_peers(
    settings: CodistillationSettings,
    replicas: Replicas,
    mail: ReplicaMail | None,
    model: nn.Module,
    distance: PredictionDistance,
    predict: Callable[[nn.Module, Any], torch.Tensor],
) -> PeerPredictions | PeerCheckpoints:
    """Where the other replicas' predictions come from."""
    if settings.exchange == "predictions":
        return PeerPredictions(replicas.outer, distance, settings.dtype_of_wire, settings.check_every, mail)
    copies = PeerCopies(model, mail.live, settings.dtype_of_copies, settings.device_of_copies, replicas.inner_group)
    return PeerCheckpoints(settings, mail, copies, predict)


def warn_if_nothing_to_learn(
    settings: CodistillationSettings, replicas: Replicas, parameters: Sequence[torch.Tensor]
) -> None:
    """Warns of equal replicas that are to see equal batches. All replicas must call it."""
    if settings.exchange == "predictions" and replicas.are_equal(parameters):
        warnings.warn(
            "All replicas have the same parameters and are to see the same batches, so that they stay equal (but for "
            "dropout) and learn nothing from one another. Initialise each with a seed of its own, after DDP.",
            stacklevel=4,
        )
