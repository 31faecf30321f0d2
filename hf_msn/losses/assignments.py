"""Assignments of embeddings to centers in log space, and the precision that losses compute in.

Losses compute in at least float32, whatever the input and whatever autocast is on: the exponents reach
1 / (temperature * sharpen_temperature), far beyond what half precision holds.
"""

import torch
import torch.nn.functional as F

from ..checks import check_number


def log_assignments(embeddings: torch.Tensor, centers: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log softmax(normalize(embeddings) normalize(centers)^T / temperature): `(B, D)`, `(K, D)` -> `(B, K)`."""
    embeddings, centers = at_least_float32(embeddings), at_least_float32(centers)
    similarities = F.normalize(embeddings, dim=-1) @ F.normalize(centers, dim=-1).T
    return torch.log_softmax(similarities / temperature, dim=-1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` itself if it is float32 or float64, else a float32 copy."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Return a context in which products of `tensor` keep its precision."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def check_temperature(name: str, value: float) -> None:
    """Raise a `ValueError` unless a temperature is above 0."""
    check_number(name, value, above=0, meaning="divides similarities or logarithms")
