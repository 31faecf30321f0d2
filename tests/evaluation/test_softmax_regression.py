"""The solver of the logistic probe against scikit-learn's L-BFGS in float64, its slow twin."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_msn import LogisticProbe
from hf_msn.evaluation import softmax_regression
from hf_msn.evaluation.probes import centre_and_normalize
from hf_msn.evaluation.softmax_regression import fit_softmax_regression


def problem(rows, dimension, classes, seed=0, noise=2.0):
    """Features like those of a network: class centres, noise, a common offset, falling variances."""
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(rows) % classes)
    scale = np.arange(1, dimension + 1) ** -0.5
    features = (
        random.normal(size=(classes, dimension))[labels] + noise * random.normal(size=(rows, dimension))
    ) * scale
    return (features + random.normal(size=dimension)).astype(np.float32), labels


def twin(features, labels, l2):
    """Return W by scikit-learn, two rows for two classes."""
    two = len(np.unique(labels)) == 2
    solver = LogisticRegression(C=(2 if two else 1) / l2, fit_intercept=False, max_iter=5000, tol=1e-10)
    coefficients = solver.fit(centre_and_normalize(features), labels).coef_
    return np.concatenate([-coefficients / 2, coefficients / 2]) if two else coefficients


def objective(weights, features, labels, l2):
    scores = centre_and_normalize(features) @ weights.T
    own = scores[np.arange(len(labels)), labels]
    return np.mean(np.logaddexp.reduce(scores, axis=1) - own) + l2 / len(labels) / 2 * (weights**2).sum()


def solve(features, labels, l2=0.075, **settings):
    inputs = torch.from_numpy(centre_and_normalize(features))
    return fit_softmax_regression(inputs, torch.from_numpy(labels), labels.max() + 1, l2, **settings)


@pytest.fixture
def precisions(monkeypatch):
    """Collect the type of each evaluation of the objective."""
    collected, evaluate = [], softmax_regression._Objective.__call__

    def spy(self, weights):
        collected.append(weights.dtype)
        return evaluate(self, weights)

    monkeypatch.setattr(softmax_regression._Objective, "__call__", spy)
    return collected


@pytest.mark.slow
@pytest.mark.parametrize("l2", [0.0025, 0.075, 3.0])
@pytest.mark.parametrize(
    ("rows", "dimension", "classes"),
    [(10, 192, 10), (50, 48, 10), (40, 6, 2), (2, 30, 2), (130, 130, 3), (300, 20, 60)],
)
def test_minimum_is_that_of_the_slow_twin(rows, dimension, classes, l2):
    features, labels = problem(rows, dimension, classes)
    expected = twin(features, labels, l2)
    solution = solve(features, labels, l2, tol=1e-10)
    assert solution.converged
    weights = solution.weights.numpy()
    best = objective(expected, features, labels, l2)
    assert objective(weights, features, labels, l2) == pytest.approx(best, rel=1e-10)
    assert solution.objective == pytest.approx(best, rel=1e-10)
    np.testing.assert_allclose(weights, expected, atol=1e-4 * np.abs(expected).max())
    queries, _ = problem(500, dimension, classes, seed=1)
    scores = centre_and_normalize(queries) @ expected.T
    probe = LogisticProbe(l2=l2, device="cpu").fit(features, labels)
    np.testing.assert_array_equal(probe.predict_scores(queries).argmax(axis=1), scores.argmax(axis=1))


@pytest.mark.parametrize("rows", [300, 90])
def test_largest_gradient_is_that_of_the_equation(rows):
    features, labels = problem(rows, 120, 8)
    solution = solve(features, labels, max_iter=3)
    inputs, weights = torch.from_numpy(centre_and_normalize(features)), solution.weights.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(inputs @ weights.T, torch.from_numpy(labels))
    (loss + 0.075 / rows / 2 * weights.square().sum()).backward()
    assert solution.largest_gradient == pytest.approx(weights.grad.abs().max().item(), rel=1e-9)
    assert solution.iterations == 3 and not solution.converged
    torch.testing.assert_close(solution.weights.sum(dim=0), torch.zeros(120, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tol", [1e-6, 1e-8, 1e-11])
def test_float32_iterations_end_at_the_same_minimum(monkeypatch, precisions, tol):
    features, labels = problem(400, 64, 20)
    slow = solve(features, labels, tol=tol)
    precisions.clear()
    monkeypatch.setattr(softmax_regression, "_SMALL", 0)
    monkeypatch.setattr(softmax_regression, "_PROBABILITIES", {"cpu": 20 * 64})  # several chunks, the last shorter
    fast = solve(features, labels, tol=tol)
    assert fast.converged and slow.converged
    assert precisions[0] == torch.float32
    # 1e-5 of the first gradient is about 1e-7: below it float64 takes over
    assert (precisions[-1] == torch.float64) == (tol < 1e-7)
    assert fast.objective == pytest.approx(slow.objective, rel=1e-5 if tol > 1e-8 else 1e-9)
    if tol < 1e-8:
        torch.testing.assert_close(fast.weights, slow.weights, atol=1e-6, rtol=1e-6)


def test_reduced_precision_products_are_not_used(monkeypatch, precisions):
    features, labels = problem(100, 20, 5)
    monkeypatch.setattr(softmax_regression, "_SMALL", 0)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert solve(features, labels).converged
    assert set(precisions) == {torch.float64}


def test_tolerance_below_rounding_ends_without_convergence():
    features, labels = problem(50, 20, 5)
    solution = solve(features, labels, tol=1e-300)
    assert not solution.converged and solution.largest_gradient < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_finds_the_same_minimum_twice():
    features, labels = problem(3000, 128, 100)
    slow = LogisticProbe(device="cpu").fit(features, labels)
    fast, again = (LogisticProbe(device="cuda").fit(features, labels) for _ in range(2))
    np.testing.assert_array_equal(fast.coef_, again.coef_)
    assert fast.fit_report["objective"] == pytest.approx(slow.fit_report["objective"], rel=1e-7)
    np.testing.assert_array_equal(fast.predict_scores(features).argmax(1), slow.predict_scores(features).argmax(1))
