"""Optimizers that torch.optim and timm.optim lack, and those of other packages by name."""
