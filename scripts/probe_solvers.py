"""Made-up features, and the solvers that `benchmark_eval.py` compares on them: ours, scikit-learn's and cyanure's."""

import importlib.util
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from hf_msn import LogisticProbe

# (max_iter, normalised features float64, raw features, labels) -> W (C, D)
Solver = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def made_up_features(
    rows: int, dimension: int, classes: int, noise: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Class centres plus noise, float32 (rows, dimension), and labels (rows,), of all classes alike.

    As in features of a network, all share an offset and the variance falls along the directions, here as 1 / k.
    """
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(rows) % classes)
    scale = np.arange(1, dimension + 1) ** -0.5
    directions = np.linalg.qr(random.standard_normal((dimension, dimension)))[0]
    centres = random.standard_normal((classes, dimension))
    features = ((centres[labels] + noise * random.standard_normal((rows, dimension))) * scale) @ directions
    offset = np.sqrt((scale**2).mean()) * random.standard_normal(dimension)
    return (features + offset).astype(np.float32), labels


def centred_to_unit_length(features: np.ndarray) -> np.ndarray:
    """What the objective takes as x: each vector minus its own mean, of unit length, float64."""
    centred = features.astype(np.float64) - features.mean(axis=1, keepdims=True, dtype=np.float64)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def objective(weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray, l2: float) -> float:
    """(1/N) sum_i -log softmax(W x_i)[y_i] + (l2/N)/2 ||W||^2 in float64, for whichever solver found W."""
    weights = np.asarray(weights, dtype=np.float64)
    total = 0.0
    for start in range(0, len(inputs), 2048):
        scores = inputs[start : start + 2048] @ weights.T
        largest = scores.max(axis=1)
        own = scores[np.arange(len(scores)), labels[start : start + 2048]]
        total += float((largest + np.log(np.exp(scores - largest[:, None]).sum(axis=1)) - own).sum())
    return total / len(inputs) + l2 / len(inputs) / 2 * float((weights**2).sum())


def has_cyanure() -> bool:
    """Whether cyanure is installed: `pip install cyanure`."""
    return importlib.util.find_spec("cyanure") is not None


def ours(l2: float, device: str, tol: float = 1e-12) -> Solver:
    """`LogisticProbe`, from the raw features: it normalises them itself, which the others are spared."""

    def solve(max_iter: int, inputs: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return LogisticProbe(l2=l2, max_iter=max_iter, tol=tol, device=device).fit(features, labels).coef_

    return solve


def scikit_learn(l2: float, dtype: str) -> Solver:
    """L-BFGS of scikit-learn, which computes in the precision of its input."""

    def solve(max_iter: int, inputs: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        two = len(np.unique(labels)) == 2
        solver = LogisticRegression(C=(2 if two else 1) / l2, fit_intercept=False, max_iter=max_iter, tol=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            coefficients = solver.fit(inputs.astype(dtype), labels).coef_
        return np.concatenate([-coefficients / 2, coefficients / 2]) if two else coefficients

    return solve


def cyanure(l2: float, threads: int, dtype: str = "float32") -> Solver:
    """The solver that the paper's code uses, with its own choice of algorithm; iterations are passes over the data.

    Its objective is the mean loss plus `lambda_1 / 2 ||W||^2`, so `lambda_1 = l2 / N`; its W is (D, C). Duality gaps,
    which cost time and would only stop it, are computed at the end.
    """
    from cyanure.estimators import Classifier

    def solve(max_iter: int, inputs: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        solver = Classifier(
            loss="multiclass-logistic",
            penalty="l2",
            fit_intercept=False,
            lambda_1=l2 / len(inputs),
            max_iter=max_iter,
            tol=1e-12,
            duality_gap_interval=max_iter,
            n_threads=threads,
            verbose=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that `max_iter` was reached is the point
            solver.fit(np.ascontiguousarray(inputs, dtype=dtype), labels)
        return solver.coef_.T

    return solve


def time_solvers(
    solvers: dict[str, Solver],
    features: np.ndarray,
    labels: np.ndarray,
    l2: float,
    *,
    within: float,
    iterations: list[int],
    repeats: int,
    threads: int,
) -> dict[str, dict]:
    """For each solver the fewest iterations of a grid whose run ends within `within` of the minimum, and its time.

    The minimum is the lowest objective of all runs and of our own solver run to the end. All run from zero with ever
    more iterations, each once (the curve); then those that got there are run `repeats` times, turn by turn.

    Returns:
        By solver: `curve`, a list of (iterations, seconds, objective relative to the minimum, minus 1);
        `iterations` and `seconds` (a list), `None` if no run got there.
    """
    inputs = centred_to_unit_length(features)
    best = objective(ours(l2, "cpu", tol=1e-8)(300, inputs, features, labels), inputs, labels, l2)

    def run(name: str, max_iter: int) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        weights = solvers[name](max_iter, inputs, features, labels)
        return time.perf_counter() - start, objective(weights, inputs, labels, l2)

    with threadpool_limits(threads):
        curves = {}
        for name in solvers:
            run(name, 1)  # imports, kernels and memory of a first call
            curves[name] = []
            for max_iter in iterations:
                curves[name].append((max_iter, *run(name, max_iter)))
                if curves[name][-1][2] <= best * (1 + within):
                    break
        best = min(best, *(value for curve in curves.values() for *_, value in curve))
        results = {}
        for name, curve in curves.items():
            curve = [(max_iter, seconds, value / best - 1) for max_iter, seconds, value in curve]
            there = [max_iter for max_iter, _, excess in curve if excess <= within]
            results[name] = {"curve": curve, "iterations": min(there, default=None), "seconds": []}
        for _ in range(repeats):
            for name, result in results.items():
                if result["iterations"] is not None:
                    result["seconds"].append(run(name, result["iterations"])[0])
    return {name: {**result, "minimum": best} for name, result in results.items()}
