"""Classifiers on frozen features, which low-shot evaluation fits on a few labelled images."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from ..checks import check_integer, check_number
from ..losses.assignments import log_assignments
from .softmax_regression import fit_softmax_regression

# similarities held at a time: 64 MiB in float64, whatever the number of images
_SIMILARITIES = 2**23


class Probe(Protocol):
    """The interface of a probe for `LowShotEvaluator`, and the base of those below.

    `fit` learns anew at each call and sets `classes_`, the sorted labels; `predict_scores` returns one column per
    class, in that order, and `predict` the label of the largest score. `settings` and `fit_report` describe the probe
    and its last fit in the results; both must be JSON-serialisable.
    """

    classes_: np.ndarray
    fit_report: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]: ...

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "Probe": ...

    def predict_scores(self, features: np.ndarray) -> np.ndarray: ...

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N,) labels: the class of the largest score, of equal ones the lowest."""
        scores = self.predict_scores(features)
        return self.classes_[scores.argmax(axis=1)]


class LogisticProbe(Probe):
    r"""Multinomial logistic regression without intercept, the classifier of the MSN paper (arXiv 2204.07141).

    Features are centred (each vector minus its own mean) and l2-normalised; then, over the `N` labelled images,

    $$\min_W \frac{1}{N} \sum_i -\log \mathrm{softmax}(W x_i)_{y_i} + \frac{\lambda}{N} \frac{1}{2} \lVert W \rVert^2$$

    to the minimum that `sklearn.linear_model.LogisticRegression(C=1 / l2, fit_intercept=False)` finds, in fewer and
    cheaper iterations: see `hf_msn.evaluation.softmax_regression`. It starts at `W = 0` and draws nothing at random.
    For two classes scikit-learn fits one weight vector `w` in place of two rows; the minimum above has
    `W = (-w / 2, w / 2)`, so `C = 2 / l2` there makes it the same objective.

    Args:
        l2 (`float`, *optional*):
            The penalty lambda. By default 0.0025, the paper's for 5 images per class; from 1,000 classes on with more
            than 10 images per class on average 0.075, the paper's for 1 % of ImageNet. (With few classes that is too
            much: docs/evaluation.md has a table.)
        max_iter (`int`, *optional*, defaults to 300):
            Most L-BFGS iterations, part of the protocol. `fit_report["converged"]` tells whether they sufficed.
        tol (`float`, *optional*, defaults to 1e-8):
            Stops when no entry of the gradient of the objective above exceeds this. (The paper's 1e-3 is the tolerance
            of another solver. With 1000 classes these entries are tiny from the start: 1e-5 stops after 3 iterations.)
        device (`str` or `torch.device`, *optional*):
            Device to fit and predict on; by default CUDA if available, else the CPU.

    After `fit`, `coef_` (C, D) holds W in float64, rows in the order of `classes_`, and `fit_report` the penalty `l2`,
    `iterations`, `converged` (within `tol`), `objective` (as above) and `largest_gradient` (its largest entry).
    """

    def __init__(
        self,
        l2: float | None = None,
        max_iter: int = 300,
        tol: float = 1e-8,
        device: str | torch.device | None = None,
    ):
        if l2 is not None:
            check_number("l2", l2, above=0, meaning="is a penalty", remedy="The paper uses 0.0025.")
        check_integer("max_iter", max_iter, meaning="counts iterations", remedy="The paper uses 300.")
        check_number("tol", tol, above=0, meaning="bounds the gradient", remedy="The default is 1e-8.")
        self.l2, self.max_iter, self.tol = l2, max_iter, tol
        self.device = _device(device)

    @property
    def settings(self) -> dict[str, Any]:
        l2 = self.l2 if self.l2 is not None else "0.0025, or 0.075 for 1,000 classes with over 10 images on average"
        return {"probe": "logistic", "l2": l2, "max_iter": self.max_iter, "tol": self.tol}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "LogisticProbe":
        """Fit the probe anew.

        Args:
            features (`np.ndarray` of shape `(N, D)`): Unnormalised features.
            labels (`np.ndarray` of shape `(N,)`): Integers.

        Raises:
            ValueError: If features are not finite, labels have another shape, or there are fewer than 2 classes.
        """
        features, self.classes_, targets = _check_inputs(features, labels)
        self._width = features.shape[1]
        l2 = self.l2
        if l2 is None:
            classes = len(self.classes_)
            l2 = 0.075 if classes >= 1000 and len(targets) > 10 * classes else 0.0025
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
            **{name: getattr(solution, name) for name in ("iterations", "converged", "objective", "largest_gradient")},
        }
        return self

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C) log-odds `W x`, columns in the order of `classes_`."""
        inputs = torch.from_numpy(centre_and_normalize(_check_queries(self, features))).to(self.device)
        return (inputs @ torch.from_numpy(self.coef_).to(self.device).T).cpu().numpy()


class KNNProbe(Probe):
    r"""Weighted vote of the `k` nearest labelled images by cosine similarity.

    The score of class c is `sum over the k nearest with label c of exp(similarity / temperature)`, divided by the sum
    over all k: a distribution over classes. With fewer than `k` labelled images all of them vote.

    Args:
        k (`int`, *optional*, defaults to 20): Number of neighbours.
        temperature (`float`, *optional*, defaults to 0.07):
            Temperature of the weights; a smaller one favours the nearest neighbours more.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07):
        self.k = check_integer("k", k, meaning="counts neighbours", remedy="20 is usual.")
        self.temperature = check_number("temperature", temperature, above=0, remedy="0.07 is usual.")

    @property
    def settings(self) -> dict[str, Any]:
        return {"probe": "knn", "k": self.k, "temperature": self.temperature}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "KNNProbe":
        """Fit the probe anew. Arguments and errors are those of [`LogisticProbe.fit`]."""
        features, self.classes_, columns = _check_inputs(features, labels)
        self._width = features.shape[1]
        neighbours = min(self.k, len(features))
        vote = KNeighborsClassifier(neighbours, weights=self._weights, metric="cosine", algorithm="brute")
        self._vote = vote.fit(features.astype(np.float64), columns)
        self.fit_report = {"k": neighbours}
        return self

    def _weights(self, distances: np.ndarray) -> np.ndarray:
        # relative to the nearest neighbour: the ratio is the same and cannot overflow
        return np.exp((distances[:, :1] - distances) / self.temperature)

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C): the share of each class in the weighted vote; rows sum to 1."""
        features = _check_queries(self, features)
        return self._vote.predict_proba(features.astype(np.float64))


class SoftNearestNeighborProbe(Probe):
    r"""A vote of all labelled images, the classifier that PAWS trains with (arXiv 2104.13963, equation 1).

    $$d(z, S) = \sum_i \frac{\exp(z^\top s_i / \tau)}{\sum_j \exp(z^\top s_j / \tau)} y_i$$

    with l2-normalised `z` and supports `s`, and one-hot labels `y`. Nothing is learned: fitting stores the supports.
    Scores are the logarithms of `d`, in float64, so that classes still rank where every term but one underflows.

    Args:
        temperature (`float`, *optional*, defaults to 0.1): tau; a smaller one favours the nearest supports more.
    """

    def __init__(self, temperature: float = 0.1):
        # below the smallest normal number, the inverse overflows and similarities would be NaN
        tiny = float(np.finfo(np.float64).tiny)
        self.temperature = check_number("temperature", temperature, minimum=tiny, remedy="PAWS uses 0.1.")

    @property
    def settings(self) -> dict[str, Any]:
        return {"probe": "soft_nearest_neighbor", "temperature": self.temperature}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "SoftNearestNeighborProbe":
        """Store the supports. Arguments and errors are those of [`LogisticProbe.fit`]."""
        features, self.classes_, columns = _check_inputs(features, labels)
        self._width = features.shape[1]
        # the supports of a class are contiguous, so that one reduction gives the sums of all classes
        order = np.argsort(columns, kind="stable")
        self._supports = torch.from_numpy(features[order].astype(np.float64))
        self._counts = np.bincount(columns)
        self._first = np.cumsum(self._counts) - self._counts
        self.fit_report = {"num_supports": len(features)}
        return self

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C) log-probabilities, columns in the order of `classes_`."""
        queries = torch.from_numpy(_check_queries(self, features).astype(np.float64))
        chunks = queries.split(max(1, _SIMILARITIES // len(self._supports)))
        return np.concatenate([self._log_probabilities(chunk) for chunk in chunks])

    def _log_probabilities(self, queries: torch.Tensor) -> np.ndarray:
        of_supports = log_assignments(queries, self._supports, self.temperature).numpy()
        largest = np.maximum.reduceat(of_supports, self._first, axis=1)
        relative = np.exp(of_supports - np.repeat(largest, self._counts, axis=1))
        return largest + np.log(np.add.reduceat(relative, self._first, axis=1))


class LinearProbe(Probe):
    r"""Softmax classifier trained by SGD: the paper's protocol for all labels, on cached features.

    Each vector passes a LayerNorm, whose scale and shift are learned too, and is l2-normalised; Nesterov SGD, learning
    rate on a half cosine to 0, batches drawn anew each epoch. As in the authors' code the learning rate is inside of
    the momentum,

    $$v \leftarrow \mu v + \eta_t g, \qquad w \leftarrow w - (\eta_t g + \mu v),$$

    so that a step keeps the learning rate at which it was taken. Weights start at 0, so that only the order of the
    batches is random, and that is seeded.

    With fewer images than `batch_size` a step takes all of them and an epoch is one step. The learning rate stays: it
    is bounded by the curvature of the loss, which a full batch shares with the paper's batches.

    Args:
        batch_size (`int`, *optional*, defaults to 16384): Images per step.
        learning_rate (`float`, *optional*, defaults to 6.4): Learning rate of the first step.
        epochs (`int`, *optional*, defaults to 100): Passes over the labelled images.
        momentum (`float`, *optional*, defaults to 0.9): Nesterov momentum.
        weight_decay (`float`, *optional*, defaults to 0.0): l2 penalty on all that is learned.
        affine (`bool`, *optional*, defaults to `True`):
            Learn scale and shift of the LayerNorm. They are before the l2 norm: without them the probe is a linear
            classifier on the normalised vectors, which `export_classifier` can write.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order of the batches. The global random state is neither read nor changed.
        device (`str` or `torch.device`, *optional*): Device to train on; by default CUDA if available, else the CPU.
    """

    def __init__(
        self,
        batch_size: int = 16384,
        learning_rate: float = 6.4,
        epochs: int = 100,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        affine: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
    ):
        self.affine = affine
        self.batch_size = check_integer("batch_size", batch_size)
        self.learning_rate = check_number("learning_rate", learning_rate, above=0, remedy="The paper uses 6.4.")
        self.epochs = check_integer("epochs", epochs)
        self.momentum = check_number("momentum", momentum, above=0, below=1, remedy="0.9 is usual.")
        self.weight_decay = check_number("weight_decay", weight_decay, minimum=0)
        self.seed, self.device = seed, _device(device)

    @property
    def settings(self) -> dict[str, Any]:
        names = ("batch_size", "learning_rate", "epochs", "momentum", "weight_decay", "affine", "seed")
        return {"probe": "linear", **{name: getattr(self, name) for name in names}}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "LinearProbe":
        """Fit the probe anew. Arguments and errors are those of [`LogisticProbe.fit`], and an infinite loss."""
        features, self.classes_, columns = _check_inputs(features, labels)
        self._width = features.shape[1]
        inputs, targets = self._normalize(features), torch.from_numpy(columns).to(self.device)
        dimension, num_classes = inputs.shape[1], len(self.classes_)
        self.weight_ = torch.zeros(num_classes, dimension, device=self.device, requires_grad=True)
        self.bias_ = torch.zeros(num_classes, device=self.device, requires_grad=True)
        self.scale_ = torch.ones(dimension, device=self.device, requires_grad=self.affine)
        self.shift_ = torch.zeros(dimension, device=self.device, requires_grad=self.affine)
        learned = [self.weight_, self.bias_] + [self.scale_, self.shift_] * self.affine
        velocities = [torch.zeros_like(parameter) for parameter in learned]
        generator = torch.Generator().manual_seed(self.seed)
        num_steps = self.epochs * math.ceil(len(inputs) / self.batch_size)
        step = 0
        for _ in range(self.epochs):
            for rows in torch.randperm(len(inputs), generator=generator).split(self.batch_size):
                rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
                rows = rows.to(self.device)
                loss = F.cross_entropy(self._logits(inputs[rows]), targets[rows])
                gradients = torch.autograd.grad(loss, learned)
                with torch.no_grad():
                    for parameter, gradient, velocity in zip(learned, gradients, velocities):
                        change = rate * (gradient + self.weight_decay * parameter)
                        velocity.mul_(self.momentum).add_(change)
                        parameter.sub_(change + self.momentum * velocity)
                step += 1
        for parameter in learned:
            parameter.requires_grad_(False)
        self.fit_report = {"steps": step, "last_loss": loss.item()}
        if not math.isfinite(self.fit_report["last_loss"]):
            raise ValueError(
                f"The loss of the linear probe must stay finite, but is {loss} after {step} steps. "
                f"Lower `learning_rate`, which is {self.learning_rate}."
            )
        return self

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C) logits, columns in the order of `classes_`."""
        return self._logits(self._normalize(_check_queries(self, features))).cpu().numpy()

    def _normalize(self, features: np.ndarray) -> torch.Tensor:
        inputs = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)).to(self.device)
        return F.layer_norm(inputs, inputs.shape[1:])

    def _logits(self, normalized: torch.Tensor) -> torch.Tensor:
        inputs = F.normalize(normalized * self.scale_ + self.shift_, dim=1)
        return F.linear(inputs, self.weight_, self.bias_)


def centre_and_normalize(features: np.ndarray) -> np.ndarray:
    """Return each vector minus its own mean, at unit length: `x <- x - mean(x); x <- x / ||x||_2`, in float64.

    A constant vector has no direction and becomes 0.
    """
    centred = np.asarray(features, dtype=np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    # the rest of a constant vector is rounding, which must not be scaled to unit length
    rounding = np.finfo(np.float32).eps * np.abs(features).max(axis=1, keepdims=True)
    return np.where(lengths > rounding, centred / np.maximum(lengths, np.finfo(np.float64).tiny), 0.0)


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _check_features(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"`features` must have shape (images, dimensions), images >= 1, but has {features.shape}.")
    broken = ~np.isfinite(features).all(axis=1)
    if broken.any():
        raise ValueError(
            f"`features` must be finite, but {int(broken.sum())} of {len(features)} rows hold NaN or infinity, the "
            f"first is row {int(broken.argmax())}. Look for NaN in the weights, or extract with dtype=torch.float32."
        )
    return features


def _check_queries(probe: Probe, features: np.ndarray) -> np.ndarray:
    """Return the features, where the probe has been fitted on others of their width."""
    width = getattr(probe, "_width", None)
    if width is None:
        raise ValueError(f"A {type(probe).__name__} must be fitted before it predicts. Call `fit` first.")
    features = _check_features(features)
    if features.shape[1] != width:
        raise ValueError(
            f"`features` must have {width} dimensions, as those of `fit`, but has {features.shape[1]}. Extract both "
            "with the same model and layers."
        )
    return features


def _check_inputs(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features, the sorted classes, and the class of each row as an index into them."""
    features, labels = _check_features(features), np.asarray(labels)
    if labels.shape != (len(features),):
        raise ValueError(
            f"`labels` must have shape ({len(features)},), as `features` has rows, but has {labels.shape}."
        )
    classes, columns = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"`labels` must hold at least 2 classes, but all {len(labels)} are {classes[0]}.")
    return features, classes, columns
