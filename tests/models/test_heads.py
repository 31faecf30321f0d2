"""The heads against their equations."""

import math

import pytest
import torch

from hf_msn.models.heads import PredictionHead, ProjectionHead


def loop_norm(norm, rows: torch.Tensor) -> torch.Tensor:
    if isinstance(norm, torch.nn.Identity):
        return rows
    mean = sum(rows) / len(rows)
    variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return torch.stack([(row - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias for row in rows])


def loop_linear(linear, rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([linear.weight @ row + linear.bias for row in rows])


ACTIVATIONS = {
    "relu": lambda rows: rows.clamp_min(0),
    "gelu": lambda rows: rows * (1 + torch.erf(rows / math.sqrt(2))) / 2,
}


@pytest.fixture
def features():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def random_head(head):
    torch.manual_seed(1)
    head = head.double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_projections_equal_the_loop(features, batch_norm, activation):
    head = random_head(ProjectionHead(5, 7, 3, batch_norm, activation))
    rows = features
    for linear, norm in ((head.fc1, head.bn1), (head.fc2, head.bn2)):
        rows = ACTIVATIONS[activation](loop_norm(norm, loop_linear(linear, rows)))
    torch.testing.assert_close(head(features), loop_linear(head.fc3, rows), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_predictions_equal_the_loop(features, batch_norm, activation):
    head = random_head(PredictionHead(5, 3, batch_norm, activation))
    rows = loop_norm(head.bn2, loop_linear(head.fc1, loop_norm(head.bn1, features)))
    expected = loop_linear(head.fc2, ACTIVATIONS[activation](rows))
    torch.testing.assert_close(head(features), expected, rtol=1e-11, atol=1e-13)
