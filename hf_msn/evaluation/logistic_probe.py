"""The classifier that the MSN paper evaluates with."""

import math
from typing import Any

import numpy as np
import torch

from .probe_inputs import centre_and_normalize, checked, checked_features
from .softmax_regression import fit_softmax_regression


class LogisticProbe:
    r"""Multinomial logistic regression without intercept, as the MSN paper evaluates (arXiv 2204.07141).

    Features are centred (each vector minus its own mean) and l2-normalised; then, over the `N` labelled images,

    $$\min_W \frac{1}{N} \sum_i -\log \mathrm{softmax}(W x_i)_{y_i} + \frac{\lambda}{N} \frac{1}{2} \lVert W \rVert^2$$

    to the minimum that `sklearn.linear_model.LogisticRegression(C=1 / l2, fit_intercept=False)` finds, in fewer and
    cheaper iterations: see `hf_msn.evaluation.softmax_regression`. It starts at `W = 0` and draws nothing at random.
    For two classes scikit-learn fits one weight vector `w` in place of two rows; the minimum above has
    `W = (-w / 2, w / 2)`, so `C = 2 / l2` there makes it the same objective.

    Args:
        l2 (`float`, *optional*):
            The penalty lambda. By default 0.0025 up to 10 images a class on average and 0.075 above: the paper gives
            0.0025 for 5 images a class and 0.075 for 1 % of ImageNet, which is 13 images a class.
        max_iter (`int`, *optional*, defaults to 300):
            Most L-BFGS iterations. Stopping here is part of the protocol; `fit_report["converged"]` tells.
        tol (`float`, *optional*, defaults to 1e-8):
            Stops when no entry of the gradient of the objective above exceeds this. (The paper's 1e-3 is the tolerance
            of another solver. With 1000 classes these entries are tiny from the start: 1e-5 stops after 3 iterations.)
        device (`str` or `torch.device`, *optional*):
            Where to fit and predict; CUDA where there is one, else the CPU.

    After `fit`, `coef_` (C, D) holds W in float64, rows in the order of `classes_`, and `fit_report` the penalty `l2`,
    `iterations`, `converged` (within `tol`), `objective` (as above) and `largest_gradient` (its largest entry).

    Example:

    ```python
    >>> probe = LogisticProbe().fit(train_features, train_labels)
    >>> scores = probe.predict_scores(test_features)  # (N, C): log-odds, columns in the order of probe.classes_
    ```
    """

    def __init__(
        self,
        l2: float | None = None,
        max_iter: int = 300,
        tol: float = 1e-8,
        device: str | torch.device | None = None,
    ):
        if l2 is not None and not (math.isfinite(l2) and l2 > 0):
            raise ValueError(f"`l2` is a penalty and must be finite and > 0, but is {l2}. The paper uses 0.0025.")
        if max_iter < 1:
            raise ValueError(f"`max_iter` counts iterations and must be >= 1, but is {max_iter}. The paper uses 300.")
        if not tol > 0:
            raise ValueError(f"`tol` bounds the gradient and must be > 0, but is {tol}. The default is 1e-8.")
        self.l2, self.max_iter, self.tol = l2, max_iter, tol
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as results record it."""
        l2 = self.l2 if self.l2 is not None else "0.0025 up to 10 images a class on average, else 0.075"
        return {"probe": "logistic", "l2": l2, "max_iter": self.max_iter, "tol": self.tol}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "LogisticProbe":
        """Fits the probe anew.

        Args:
            features (`np.ndarray` of shape `(N, D)`): As extracted; centred and normalised in here.
            labels (`np.ndarray` of shape `(N,)`): Integers.

        Raises:
            `ValueError`: without rows, with features that are not finite, labels of another shape, one class only.
        """
        features, labels = checked(features, labels)
        self.classes_, targets = np.unique(labels, return_inverse=True)
        images_per_class = len(labels) / len(self.classes_)
        l2 = self.l2 if self.l2 is not None else (0.0025 if images_per_class <= 10 else 0.075)
        solution = fit_softmax_regression(
            torch.from_numpy(centre_and_normalize(features)).to(self.device),
            torch.from_numpy(targets).to(self.device),
            len(self.classes_),
            l2,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        self.coef_ = solution.weights.cpu().numpy()
        self.fit_report = {
            "l2": l2,
            "iterations": solution.iterations,
            "converged": solution.converged,
            "objective": solution.objective,
            "largest_gradient": solution.largest_gradient,
        }
        return self

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C) log-odds `W x`, columns in the order of `classes_`."""
        inputs = torch.from_numpy(centre_and_normalize(checked_features(features))).to(self.device)
        return (inputs @ torch.from_numpy(self.coef_).to(self.device).T).cpu().numpy()
