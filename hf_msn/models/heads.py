"""Heads between an encoder and a loss. They are discarded after pretraining."""

import torch
from torch import nn

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class ProjectionHead(nn.Module):
    """Linear layers, batch normalisation and activation between them: `(N, input_dim)` -> `(N, output_dim)`.

    Args:
        input_dim (`int`): Width of the encoder.
        hidden_dim (`int`): Width of the hidden layers.
        output_dim (`int`): Dimension of the projections, D.
        batch_norm (`bool`, *optional*, defaults to `True`): Without it the images of a batch do not interact.
        activation (`str`, *optional*, defaults to `"gelu"`): "gelu", as in MSN, or "relu", as in PAWS.
        num_layers (`int`, *optional*, defaults to 3): 3, or 2 as in BYOL, which has no `fc2`.
        output_batch_norm (`bool`, *optional*, defaults to `False`): Normalise the output too, as in SimSiam, without
            scale and shift.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        batch_norm: bool = True,
        activation: str = "gelu",
        num_layers: int = 3,
        output_batch_norm: bool = False,
    ):
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.bn1 = nn.BatchNorm1d(hidden_dim) if batch_norm else nn.Identity()
        self.fc2: nn.Module | None = None
        self.bn2: nn.Module | None = None
        if num_layers == 3:
            self.fc2 = nn.Linear(hidden_dim, hidden_dim)
            self.bn2 = nn.BatchNorm1d(hidden_dim) if batch_norm else nn.Identity()
        self.fc3 = nn.Linear(hidden_dim, output_dim)
        self.bn3 = nn.BatchNorm1d(output_dim, affine=False) if output_batch_norm else nn.Identity()
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.activation(self.bn1(self.fc1(features)))
        if self.fc2 is not None and self.bn2 is not None:
            hidden = self.activation(self.bn2(self.fc2(hidden)))
        return self.bn3(self.fc3(hidden))


class PredictionHead(nn.Module):
    """Batch normalisation, linear, batch normalisation, activation, linear: `(N, dim)` -> `(N, dim)`.

    Args:
        dim (`int`): Dimension of the projections and of the predictions.
        hidden_dim (`int`): Width of the hidden layer; a quarter of `dim` in PAWS.
        batch_norm (`bool`, *optional*, defaults to `True`): Without it the images of a batch do not interact.
        activation (`str`, *optional*, defaults to `"relu"`): "relu" or "gelu".
        input_batch_norm (`bool`, *optional*, defaults to `True`): `False`, as in BYOL: none before the first layer.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        batch_norm: bool = True,
        activation: str = "relu",
        input_batch_norm: bool = True,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm1d(dim) if batch_norm and input_batch_norm else nn.Identity()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.bn2 = nn.BatchNorm1d(hidden_dim) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, projections: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(self.bn1(projections))
        return self.fc2(self.activation(self.bn2(hidden)))
