"""Optimizers that torch.optim and timm.optim lack."""
