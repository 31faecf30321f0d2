"""The heads against their equations."""

import math

import pytest
import torch

from hf_msn.models.heads import PredictionHead, ProjectionHead


def loop_head(head: ProjectionHead, features: torch.Tensor, batch_norm: bool) -> torch.Tensor:
    rows = features
    for linear, norm in ((head.fc1, head.bn1), (head.fc2, head.bn2)):
        rows = torch.stack([linear.weight @ row + linear.bias for row in rows])
        if batch_norm:
            mean = sum(rows) / len(rows)
            variance = sum((row - mean) ** 2 for row in rows) / len(rows)
            rows = torch.stack([(row - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias for row in rows])
        rows = rows * (1 + torch.erf(rows / math.sqrt(2))) / 2
    return torch.stack([head.fc3.weight @ row + head.fc3.bias for row in rows])


@pytest.fixture
def features():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def random_head(batch_norm: bool) -> ProjectionHead:
    torch.manual_seed(1)
    head = ProjectionHead(5, 7, 3, batch_norm).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


@pytest.mark.parametrize("batch_norm", [True, False])
def test_projections_equal_the_loop(features, batch_norm):
    head = random_head(batch_norm)
    torch.testing.assert_close(head(features), loop_head(head, features, batch_norm), rtol=1e-11, atol=1e-13)


def test_batch_norm_uses_the_running_statistics_in_evaluation_mode(features):
    head = random_head(batch_norm=True)
    head(features)
    evaluated = head.eval()(features)
    torch.testing.assert_close(evaluated[:2], head(features[:2]), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(evaluated, head.train()(features))
    hidden = torch.stack([head.fc1.weight @ row + head.fc1.bias for row in features])
    # Two training passes with momentum 0.1 from 0 leave 1 - 0.9 ** 2 of the mean.
    torch.testing.assert_close(head.bn1.running_mean, 0.19 * hidden.mean(dim=0), rtol=1e-10, atol=1e-12)


def test_without_batch_norm_no_image_sees_another(features):
    head = random_head(batch_norm=False)
    torch.testing.assert_close(head(features)[:1], head(features[:1]), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(random_head(batch_norm=True)(features)[:2], random_head(batch_norm=True)(features[:2]))


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_predictions_equal_the_loop(batch_norm, activation):
    torch.manual_seed(2)
    head = PredictionHead(5, 3, batch_norm, activation).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    projections = torch.randn(6, 5, dtype=torch.float64)

    def normalized(rows, norm):
        if not batch_norm:
            return rows
        mean = sum(rows) / len(rows)
        variance = sum((row - mean) ** 2 for row in rows) / len(rows)
        return torch.stack([(row - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias for row in rows])

    rows = torch.stack([head.fc1.weight @ row + head.fc1.bias for row in normalized(projections, head.bn1)])
    rows = normalized(rows, head.bn2)
    rows = rows.clamp_min(0) if activation == "relu" else rows * (1 + torch.erf(rows / math.sqrt(2))) / 2
    expected = torch.stack([head.fc2.weight @ row + head.fc2.bias for row in rows])
    torch.testing.assert_close(head(projections), expected, rtol=1e-11, atol=1e-13)


def test_the_projection_head_of_paws_has_relu(features):
    torch.manual_seed(3)
    head = ProjectionHead(5, 7, 3, batch_norm=False, activation="relu").double()
    rows = features
    for linear in (head.fc1, head.fc2):
        rows = torch.stack([(linear.weight @ row + linear.bias).clamp_min(0) for row in rows])
    expected = torch.stack([head.fc3.weight @ row + head.fc3.bias for row in rows])
    torch.testing.assert_close(head(features), expected, rtol=1e-11, atol=1e-13)
