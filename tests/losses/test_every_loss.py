"""What holds for all losses: precision, autocast and temperatures."""

import math

import pytest
import torch
from loss_inputs import class_rows, softmax_rows

from hf_msn import msn_loss, nt_xent_loss, paws_loss, sharpen, sinkhorn, soft_nearest_neighbor, suncet_loss

LABELS = class_rows(6, 3)
LOSSES = {  # the function, and the numbers of rows that it takes
    "msn": (lambda *rows, **settings: msn_loss(*rows, **settings).loss, (6, 3, 5)),
    "msn with Sinkhorn": (lambda *rows, **settings: msn_loss(*rows, use_sinkhorn=True, **settings).loss, (6, 3, 5)),
    "paws": (lambda *rows, **settings: paws_loss(*rows, LABELS, num_small_crops=2, **settings).loss, (12, 6, 6, 6)),
    "nt_xent": (nt_xent_loss, (6,)),
    "suncet": (lambda rows, **settings: suncet_loss(rows, LABELS, **settings), (6,)),
    "soft_nearest_neighbor": (
        lambda *rows, temperature=0.1: soft_nearest_neighbor(*rows, LABELS, temperature),
        (3, 6),
    ),
    "sharpen": (lambda rows, temperature=0.25: sharpen(rows, temperature), (4,)),
    "sinkhorn": (sinkhorn, (4,)),
}
SHARPENED = ("msn", "paws")


def inputs(sizes, dtype) -> list[torch.Tensor]:
    return [softmax_rows(size, 4, seed=seed).to(dtype).requires_grad_() for seed, size in enumerate(sizes)]


def run(loss, rows, autocast: bool = False) -> list[torch.Tensor]:
    """Return the value, and the gradient of a weighted sum of it to each input that has one."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(*rows)
    if not value.requires_grad:
        return [value]
    weights = torch.linspace(1, 2, value.numel()).view_as(value)
    gradients = torch.autograd.grad((weights * value).sum(), rows, allow_unused=True)
    return [value, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_loses_only_its_own_rounding(name, dtype):
    loss, sizes = LOSSES[name]
    half = inputs(sizes, dtype)
    value, *gradients = run(loss, half)
    expected, *references = run(loss, [rows.detach().float().requires_grad_() for rows in half])
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    for gradient, reference in zip(gradients, references, strict=True):
        assert torch.equal(gradient, reference.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name, dtype):
    loss, sizes = LOSSES[name]
    for found, plain in zip(run(loss, inputs(sizes, dtype), autocast=True), run(loss, inputs(sizes, dtype))):
        assert found.dtype == plain.dtype and torch.equal(found, plain)


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sinkhorn"])
def test_a_temperature_that_is_not_above_0_is_an_error(name, value):
    loss, sizes = LOSSES[name]
    for argument in ("temperature", "sharpen_temperature") if name in SHARPENED else ("temperature",):
        with pytest.raises(ValueError, match=f"`{argument}`.*{value}"):
            loss(*inputs(sizes, torch.float64), **{argument: value})
