"""The distance between the predictions of two replicas, and what of them travels."""

import math

import pytest
import torch
from codistillation_runs import random

from hf_msn.distributed.replicas.distances import PredictionDistance


def softmax(row, temperature):
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def kl_by_loops(own, peer, temperature, top_k=None, mask=None):
    total, count = 0.0, 0
    for i, (own_row, peer_row) in enumerate(zip(own.tolist(), peer.tolist())):
        if mask is not None and not mask[i]:
            continue
        p, q = softmax(peer_row, temperature), softmax(own_row, temperature)
        classes = sorted(range(len(p)), key=lambda c: -p[c])[:top_k]
        rest_p, rest_q = 1 - sum(p[c] for c in classes), 1 - sum(q[c] for c in classes)
        total += sum(p[c] * math.log(p[c] / q[c]) for c in classes)
        if top_k is not None:
            total += rest_p * math.log(rest_p / rest_q)
        count += 1
    return temperature**2 * total / count


def gradient_by_differences(function, at, step=1e-6):
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        there, back = at.clone(), at.clone()
        there.view(-1)[i] += step
        back.view(-1)[i] -= step
        gradient.view(-1)[i] = (function(there) - function(back)) / (2 * step)
    return gradient


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 2, 4])
@pytest.mark.parametrize("mask", [None, [True, False, True]])
def test_the_divergence_is_that_of_loops_with_its_gradient(temperature, top_k, mask):
    own, peer = random(3, 5), random(3, 5, seed=1).requires_grad_()
    distance = PredictionDistance("kl", temperature, top_k)
    mask_tensor = None if mask is None else torch.tensor(mask)

    def value(tensor):
        return kl_by_loops(tensor, peer, temperature, top_k, mask)

    own.requires_grad_()
    result = distance(own, distance.pack(peer), mask_tensor)
    result.backward()
    assert result.item() == pytest.approx(value(own), rel=1e-12)
    torch.testing.assert_close(own.grad, gradient_by_differences(value, own.detach()), rtol=1e-6, atol=1e-8)
    assert peer.grad is None


def test_the_mean_squared_error_is_over_classes_and_positions_that_count():
    own, peer = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    distance = PredictionDistance("mse")
    counted = [(i, j) for i in range(2) for j in range(3) if mask[i, j]]
    total = sum((own[i, j, c] - peer[i, j, c]).item() ** 2 for i, j in counted for c in range(4))
    assert distance(own, distance.pack(peer), mask).item() == pytest.approx(total / 16, rel=1e-12)
    everything = (own - peer).square().sum().item() / 24
    assert distance(own, distance.pack(peer)).item() == pytest.approx(everything, rel=1e-12)


def test_what_is_masked_may_be_anything():
    own, peer = random(2, 3).requires_grad_(), random(2, 3, seed=1)
    peer[1] = float("nan")
    for distance in (PredictionDistance("kl"), PredictionDistance("mse"), PredictionDistance("kl", top_k=2)):
        own.grad = None
        result = distance(own, distance.pack(peer), torch.tensor([1, 0]))
        result.backward()
        assert result.isfinite()
        assert distance(own, distance.pack(peer), torch.tensor([0, 0])).item() == 0.0
    with pytest.raises(ValueError, match=r"of shape \(2,\), but is of \(3,\)"):
        distance(own, distance.pack(peer), torch.tensor([1, 0, 1]))


def test_equal_predictions_have_no_distance_and_log_probabilities_are_logits():
    own, peer = random(4, 6), random(4, 6, seed=1)
    for distance in (PredictionDistance("kl", 2.0), PredictionDistance("mse"), PredictionDistance("kl", top_k=3)):
        assert distance(own, distance.pack(own.clone())).item() == pytest.approx(0.0, abs=1e-15)
        assert distance(own, distance.pack(peer)).item() > 0.01
    kl = PredictionDistance("kl")
    assert kl(own, kl.pack(own.clone())).item() == 0.0
    expected = kl(own, kl.pack(peer)).item()
    assert kl(own.log_softmax(-1), kl.pack(peer.log_softmax(-1))).item() == pytest.approx(expected, rel=1e-12)


def test_top_k_sends_k_classes_and_the_rest_and_never_exaggerates():
    own, peer = random(4, 50), random(4, 50, seed=1)
    full = PredictionDistance("kl")
    whole, before = full(own, full.pack(peer)).item(), 0.0
    for k in (1, 5, 20, 49):
        distance = PredictionDistance("kl", top_k=k)
        values, classes = distance.pack(peer)
        assert values.shape == (4, k + 1)
        assert classes.shape == (4, k)
        assert classes.dtype == torch.int32
        torch.testing.assert_close(values.exp().sum(-1), torch.ones(4).double())
        value = distance(own, [values, classes]).item()
        assert before < value <= whole + 1e-12
        before = value
    assert len(PredictionDistance("kl", top_k=50).pack(peer)) == 1


def test_a_class_that_is_ruled_out_makes_no_hole():
    own, peer = random(1, 4).requires_grad_(), random(1, 4, seed=1)
    peer[0, 2] = own.data[0, 2] = -float("inf")
    for distance in (PredictionDistance("kl"), PredictionDistance("kl", top_k=3)):
        own.grad = None
        result = distance(own, distance.pack(peer))
        result.backward()
        assert result.isfinite()
        assert own.grad[0, [0, 1, 3]].isfinite().all()


def test_half_precision_is_computed_in_single():
    own, peer = random(4, 6).bfloat16(), random(4, 6, seed=1).bfloat16()
    kl = PredictionDistance("kl")
    result = kl(own, kl.pack(peer, torch.bfloat16))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(kl_by_loops(own.double(), peer.double(), 1.0), rel=1e-5)
