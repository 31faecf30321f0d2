"""Optimizers: only what torch.optim and timm.optim lack."""
