"""Losses: tensors in, a small named output out. None holds a model or opens a process group."""

from .assignments import sharpen, sinkhorn, soft_nearest_neighbor
from .contrastive import nt_xent_loss, suncet_loss
from .msn import MSNLossOutput, msn_loss
from .paws import PAWSLossOutput, paws_loss

__all__ = [
    "MSNLossOutput",
    "PAWSLossOutput",
    "msn_loss",
    "nt_xent_loss",
    "paws_loss",
    "sharpen",
    "sinkhorn",
    "soft_nearest_neighbor",
    "suncet_loss",
]
