"""Inputs of the losses, and the golden numbers of the authors' code for them."""

import json
from pathlib import Path

import numpy as np
import torch


def golden(name: str) -> list[dict]:
    return json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())[name]


def golden_array(seed: int, *shape: int) -> torch.Tensor:
    values = np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)
    return torch.tensor(values, requires_grad=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_rows(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.softmax(scale * normal(*shape, seed=seed), dim=-1)


def class_rows(num: int, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """Return smoothed labels: image j has class j mod `num_classes`."""
    one_hot = torch.eye(num_classes, dtype=torch.float64)[torch.arange(num) % num_classes]
    return one_hot * (1 - smoothing) + smoothing / num_classes


def cosine(a, b) -> torch.Tensor:
    """Return the cosine of two rows, number by number."""
    return sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a).sqrt() * sum(y * y for y in b).sqrt())
