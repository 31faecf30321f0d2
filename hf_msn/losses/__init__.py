"""Losses: tensors in, a small named output out. None holds a model or opens a process group."""

from .assignments import sharpen, sinkhorn, soft_nearest_neighbor
from .msn import MSNLossOutput, msn_loss

__all__ = ["MSNLossOutput", "msn_loss", "sharpen", "sinkhorn", "soft_nearest_neighbor"]
