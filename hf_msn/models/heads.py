"""Heads between an encoder and a loss. They are thrown away after pretraining."""

import torch
from torch import nn


class ProjectionHead(nn.Module):
    """Three linear layers, the first two with batch normalisation and GELU: `(N, input_dim)` -> `(N, output_dim)`.

    Args:
        input_dim (`int`): Width of the encoder.
        hidden_dim (`int`): Width of the two hidden layers.
        output_dim (`int`): Dimension of the projections, D.
        batch_norm (`bool`, *optional*, defaults to `True`): Without it, nothing mixes the images of a batch.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, batch_norm: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.bn1 = nn.BatchNorm1d(hidden_dim) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.bn2 = nn.BatchNorm1d(hidden_dim) if batch_norm else nn.Identity()
        self.fc3 = nn.Linear(hidden_dim, output_dim)
        self.activation = nn.GELU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.bn1(self.fc1(features)))
        hidden = self.activation(self.bn2(self.fc2(hidden)))
        return self.fc3(hidden)
