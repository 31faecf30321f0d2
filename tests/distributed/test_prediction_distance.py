"""The distance between predictions against its equation in loops over rows and classes in float64."""

import math

import pytest
import torch

from hf_msn.distributed.codistillation import PredictionDistance


def softmax(row, temperature=1.0):
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def distance_by_loops(own, peer, kind="kl", temperature=1.0, top_k=None, mask=None):
    total, count = 0.0, 0
    for i, (own_row, peer_row) in enumerate(zip(own.tolist(), peer.tolist())):
        if mask is not None and not mask[i]:
            continue
        count += 1
        if kind == "mse":
            total += sum((a - b) ** 2 for a, b in zip(own_row, peer_row)) / len(own_row)
            continue
        p, q = softmax(peer_row, temperature), softmax(own_row, temperature)
        largest = sorted(range(len(p)), key=lambda c: -p[c])[:top_k]
        rest_p, rest_q = (sum(r[c] for c in range(len(p)) if c not in largest) for r in (p, q))
        total += temperature**2 * sum(p[c] * math.log(p[c] / q[c]) for c in largest)
        total += temperature**2 * rest_p * math.log(rest_p / rest_q) if len(largest) < len(p) else 0.0
    return total / count


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"temperature": 3.0, "top_k": 2}, {"kind": "mse"}])
@pytest.mark.parametrize("mask", [None, [True, False, True]])
def test_distance_and_gradient_are_those_of_the_equation(options, mask):
    own, peer = random(3, 5).requires_grad_(), random(3, 5, seed=1).requires_grad_()
    distance = PredictionDistance(**options)
    result = distance(own, distance.pack(peer), None if mask is None else torch.tensor(mask))
    result.backward()
    assert result.item() == pytest.approx(distance_by_loops(own, peer, mask=mask, **options), rel=1e-12)
    numeric = torch.zeros(3, 5).double()
    for i in range(15):
        ends = [own.detach().clone(), own.detach().clone()]
        for end, sign in zip(ends, (1e-6, -1e-6)):
            end.view(-1)[i] += sign
        high, low = (distance_by_loops(end, peer, mask=mask, **options) for end in ends)
        numeric.view(-1)[i] = (high - low) / 2e-6
    torch.testing.assert_close(own.grad, numeric, rtol=1e-6, atol=1e-8)
    assert peer.grad is None
    assert distance(own, distance.pack(own.clone())).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    "distance", [PredictionDistance("kl"), PredictionDistance("mse"), PredictionDistance(top_k=3)]
)
def test_distance_is_finite_for_masked_nan_and_for_probabilities_of_0(distance):
    own, peer = random(2, 4).requires_grad_(), random(2, 4, seed=1)
    peer[1] = float("nan")
    if distance.kind == "kl":
        peer[0, 2] = own.data[0, 2] = -float("inf")
    result = distance(own, distance.pack(peer), torch.tensor([1, 0]))
    result.backward()
    assert result.isfinite() and own.grad[0, [0, 1, 3]].isfinite().all()
    assert distance(own, distance.pack(peer), torch.tensor([0, 0])).item() == 0.0
    with pytest.raises(ValueError, match=r"mask.*\(2,\).*\(3,\)"):
        distance(own, distance.pack(peer), torch.ones(3))


def test_top_k_sends_k_classes_and_is_a_lower_bound():
    own, peer, values = random(4, 50), random(4, 50, seed=1), []
    for k in (1, 5, 20, 49, 50):
        distance = PredictionDistance("kl", top_k=k)
        packed = distance.pack(peer)
        values.append(distance(own, packed).item())
        if k < 50:
            assert packed[0].shape == (4, k + 1) and packed[1].shape == (4, k) and packed[1].dtype == torch.int32
            torch.testing.assert_close(packed[0].exp().sum(-1), torch.ones(4).double())
    assert len(packed) == 1 and values[0] > 0.0 and values == pytest.approx(sorted(values), abs=1e-12)


def test_bfloat16_predictions_are_compared_in_float32():
    own, peer = random(4, 6).bfloat16(), random(4, 6, seed=1).bfloat16()
    distance = PredictionDistance("kl")
    result = distance(own, distance.pack(peer, torch.bfloat16))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(distance_by_loops(own.double(), peer.double()), rel=1e-5)
