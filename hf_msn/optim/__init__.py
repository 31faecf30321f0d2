"""Optimizers: only what torch.optim and timm.optim lack."""

from .lars import LARS

__all__ = ["LARS"]
