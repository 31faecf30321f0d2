"""Batch normalisation over ranks is that of one rank with the whole batch: outputs, gradients, running statistics."""

import pytest
import timm.layers
import torch
from launch import run_ranks
from torch import nn

from hf_msn.distributed.batch_norm import CrossRankBatchNorm, synchronize_batch_norm

pytestmark = pytest.mark.distributed


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.BatchNorm2d(3),
        timm.layers.BatchNormAct2d(3),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, momentum=None),
    ]
    model = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(num: int, dtype=torch.float64) -> torch.Tensor:
    # Far from mean 0: a variance of squares minus squared mean would lose its digits in float32.
    return 100 + torch.randn(num, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def pass_through(model: nn.Module, x: torch.Tensor) -> dict:
    x = x.clone().requires_grad_()
    for _ in range(2):
        out = model(x)
    weights = torch.arange(out.shape[1], dtype=out.dtype)
    (out.square() @ weights).mean().backward()
    return {
        "out": out.detach(),
        "x": x.grad,
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


def _pass_of_this_rank(rank):
    return {
        dtype: pass_through(
            synchronize_batch_norm(network(dtype), torch.device("cpu")), images(8, dtype).chunk(2)[rank]
        )
        for dtype in TOLERANCES
    }


def test_ranks_equal_one_rank_with_the_whole_batch():
    results = run_ranks(_pass_of_this_rank, 2)
    for dtype, tolerance in TOLERANCES.items():
        compare_with_one_rank([result[dtype] for result in results], dtype, tolerance)


def compare_with_one_rank(ranks, dtype, tolerance):
    one = pass_through(network(dtype), images(8, dtype))
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(torch.cat([result["out"] for result in ranks]), one["out"], **close)
    # As DistributedDataParallel averages.
    torch.testing.assert_close(torch.cat([result["x"] for result in ranks]) / 2, one["x"], **close)
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(sum(result["gradients"][name] for result in ranks) / 2, gradient, **close)
    for result in ranks:
        torch.testing.assert_close(result["buffers"], one["buffers"], **close)


def test_one_rank_and_evaluation_are_plain_batch_normalisation():
    plain, converted = network(), synchronize_batch_norm(network(), torch.device("cpu"))
    assert sum(isinstance(module, CrossRankBatchNorm) for module in converted.modules()) == 3
    assert converted.state_dict().keys() == plain.state_dict().keys()
    for model in (plain, converted):
        model(images(6))
    torch.testing.assert_close(converted.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(converted.eval()(images(3)), plain.eval()(images(3)), rtol=0, atol=0)
