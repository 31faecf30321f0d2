"""Standardise the features that a linear head sees during training, and fold that into its weights at the end."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .models import linear_head


class Standardization:
    """Forward pre-hook of a linear head: `W (x - mean) / scale + b`.

    The features of a pretrained ViT have a common mean that is many times their spread; gradients of a plain linear
    layer point along it, and hardly along what tells images apart. `mean` is that of `features` (N, D) by dimension;
    `scale` is one number, the root of their mean squared distance from it per dimension.
    """

    def __init__(self, model: PreTrainedModel, features: np.ndarray):
        head = linear_head(model)
        mean = features.astype(np.float64).mean(axis=0)
        scale = max(float(np.sqrt(((features - mean) ** 2).mean())), 1e-6)
        self.mean = torch.from_numpy(mean).to(head.weight)
        self.scale = torch.tensor(scale).to(head.weight)
        self._handle = head.register_forward_pre_hook(self)

    def __call__(self, head: nn.Linear, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        mean, scale = self.mean.to(inputs[0].device), self.scale.to(inputs[0].device)
        return (inputs[0] - mean.view(-1, *[1] * (inputs[0].ndim - 2))) / scale  # a convolution takes (B, D, 1, 1)

    @torch.no_grad()
    def fold(self, model: PreTrainedModel) -> None:
        """Remove the hook. The plain head then computes the same, with W / scale and b - W mean / scale."""
        self._handle.remove()
        head = linear_head(model)
        weight = head.weight.double() / self.scale.to(head.weight).double()
        head.bias.copy_(head.bias.double() - weight.flatten(1) @ self.mean.to(head.weight).double())
        head.weight.copy_(weight)
