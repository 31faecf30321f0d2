"""Classifiers on frozen features: what low-shot evaluation fits on a few labelled images."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from ..losses.assignments import log_assignments
from .logistic_probe import LogisticProbe
from .probe_inputs import centre_and_normalize, checked, checked_features

__all__ = [
    "KNNProbe",
    "LinearProbe",
    "LogisticProbe",
    "Probe",
    "SoftNearestNeighborProbe",
    "centre_and_normalize",
]

# similarities held at a time: 64 MiB in float64, whatever the number of images
_SIMILARITIES = 2**23


class Probe(Protocol):
    """What `LowShotEvaluator` asks of a probe: any object with these can take part.

    `fit` learns anew each time it is called and sets `classes_`, the sorted labels it saw; `predict_scores` returns
    one column for each of them, in that order. `settings` and `fit_report` are what results say about the probe and
    its last fit; both must be JSON-serialisable.
    """

    classes_: np.ndarray
    fit_report: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]: ...

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "Probe": ...

    def predict_scores(self, features: np.ndarray) -> np.ndarray: ...


class KNNProbe:
    r"""Weighted vote of the `k` nearest labelled images by cosine similarity.

    The score of class c is `sum over the k nearest with label c of exp(similarity / temperature)`, divided by the sum
    over all k: a distribution over classes. With fewer than `k` labelled images all of them vote.

    Args:
        k (`int`, *optional*, defaults to 20):
            Number of neighbours.
        temperature (`float`, *optional*, defaults to 0.07):
            Of the weights; smaller trusts the very nearest more.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07):
        if k < 1:
            raise ValueError(f"`k` counts neighbours and must be >= 1, but is {k}. 20 is usual.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be > 0, but is {temperature}. 0.07 is usual.")
        self.k, self.temperature = k, temperature

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as results record it."""
        return {"probe": "knn", "k": self.k, "temperature": self.temperature}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "KNNProbe":
        """Fits the probe anew.

        Args:
            features (`np.ndarray` of shape `(N, D)`): The labelled images.
            labels (`np.ndarray` of shape `(N,)`): Integers.

        Raises:
            `ValueError`: without rows, with features that are not finite, labels of another shape, one class only.
        """
        features, labels = checked(features, labels)
        self.classes_, self._columns = np.unique(labels, return_inverse=True)
        neighbours = min(self.k, len(labels))
        self._index = NearestNeighbors(n_neighbors=neighbours, metric="cosine", algorithm="brute")
        self._index.fit(features.astype(np.float64))
        self.fit_report = {"k": neighbours}
        return self

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C): the share of each class in the weighted vote; rows sum to 1."""
        distances, nearest = self._index.kneighbors(checked_features(features).astype(np.float64))
        # the nearest neighbour gets weight 1: the ratio is the same and cannot overflow
        weights = np.exp((distances[:, :1] - distances) / self.temperature)
        scores = np.zeros((len(distances), len(self.classes_)))
        np.add.at(scores, (np.arange(len(scores))[:, None], self._columns[nearest]), weights)
        return scores / scores.sum(axis=1, keepdims=True)


class SoftNearestNeighborProbe:
    r"""A vote of all labelled images, the classifier that PAWS trains with (arXiv 2104.13963, equation 1).

    $$d(z, S) = \sum_i \frac{\exp(z^\top s_i / \tau)}{\sum_j \exp(z^\top s_j / \tau)} y_i$$

    with l2-normalised `z` and supports `s`, and one-hot labels `y`. There is nothing to learn: fitting keeps the
    supports. Scores are the logarithms of `d`, in float64, so that classes still rank where every term but one
    underflows.

    Args:
        temperature (`float`, *optional*, defaults to 0.1):
            tau; smaller trusts the very nearest more.

    Example:

    ```python
    >>> probe = SoftNearestNeighborProbe().fit(train_features, train_labels)
    >>> probabilities = np.exp(probe.predict_scores(test_features))  # (N, C): rows sum to 1
    ```
    """

    def __init__(self, temperature: float = 0.1):
        # so small that its inverse overflows would make NaN of the similarities
        if not (math.isfinite(temperature) and temperature > 0 and math.isfinite(1 / temperature)):
            raise ValueError(
                f"`temperature` divides similarities and must be finite and > 0, but is {temperature}. PAWS uses 0.1."
            )
        self.temperature = temperature

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as results record it."""
        return {"probe": "soft_nearest_neighbor", "temperature": self.temperature}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "SoftNearestNeighborProbe":
        """Keeps the supports.

        Args:
            features (`np.ndarray` of shape `(N, D)`): The labelled images; normalised in here.
            labels (`np.ndarray` of shape `(N,)`): Integers.

        Raises:
            `ValueError`: without rows, with features that are not finite, labels of another shape, one class only.
        """
        features, labels = checked(features, labels)
        # the supports of a class lie together, so that one reduction gives the sums of all classes
        order = np.argsort(labels, kind="stable")
        self._supports = torch.from_numpy(features[order].astype(np.float64))
        self.classes_, self._starts, self._counts = np.unique(labels[order], return_index=True, return_counts=True)
        self.fit_report = {"num_supports": len(labels)}
        return self

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C) log-probabilities, columns in the order of `classes_`."""
        queries = torch.from_numpy(checked_features(features).astype(np.float64))
        chunks = queries.split(max(1, _SIMILARITIES // len(self._supports)))
        return np.concatenate([self._log_probabilities(chunk) for chunk in chunks])

    def _log_probabilities(self, queries: torch.Tensor) -> np.ndarray:
        of_supports = log_assignments(queries, self._supports, self.temperature).numpy()
        largest = np.maximum.reduceat(of_supports, self._starts, axis=1)
        relative = np.exp(of_supports - np.repeat(largest, self._counts, axis=1))
        return largest + np.log(np.add.reduceat(relative, self._starts, axis=1))


class LinearProbe:
    r"""Softmax classifier trained by SGD: the paper's protocol for all labels, on cached features.

    Each vector passes a LayerNorm without learned scale and shift (a learned scale before the l2 norm would train more
    than a linear classifier) and is l2-normalised; Nesterov SGD, learning rate on a half cosine to 0, batches drawn
    anew each epoch. Weights start at 0, so that only the order of the batches is random, and that is seeded.

    With fewer images than `batch_size` a step takes all of them and an epoch is one step. The learning rate stays: it
    is bounded by the curvature of the loss, which a full batch shares with the paper's batches.

    Args:
        batch_size (`int`, *optional*, defaults to 16384):
            Images a step.
        learning_rate (`float`, *optional*, defaults to 6.4):
            At the first step.
        epochs (`int`, *optional*, defaults to 100):
            Passes over the labelled images.
        momentum (`float`, *optional*, defaults to 0.9):
            Nesterov momentum.
        weight_decay (`float`, *optional*, defaults to 0.0):
            l2 penalty on weights and bias.
        seed (`int`, *optional*, defaults to 0):
            Of the order of the batches. The global random state is neither read nor changed.
        device (`str` or `torch.device`, *optional*):
            Where to train; CUDA where there is one, else the CPU.
    """

    def __init__(
        self,
        batch_size: int = 16384,
        learning_rate: float = 6.4,
        epochs: int = 100,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        seed: int = 0,
        device: str | torch.device | None = None,
    ):
        if batch_size < 1 or epochs < 1:
            raise ValueError(f"`batch_size` and `epochs` must be >= 1, but are {batch_size} and {epochs}.")
        if not learning_rate > 0:
            raise ValueError(f"`learning_rate` must be > 0, but is {learning_rate}. The paper uses 6.4.")
        if not 0 < momentum < 1:
            raise ValueError(f"`momentum` must lie in (0, 1) for Nesterov's method, but is {momentum}. 0.9 is usual.")
        if weight_decay < 0:
            raise ValueError(f"`weight_decay` must be >= 0, but is {weight_decay}. 0 turns it off.")
        self.batch_size, self.learning_rate, self.epochs = batch_size, learning_rate, epochs
        self.momentum, self.weight_decay, self.seed = momentum, weight_decay, seed
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as results record it."""
        names = ("batch_size", "learning_rate", "epochs", "momentum", "weight_decay", "seed")
        return {"probe": "linear", **{name: getattr(self, name) for name in names}}

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "LinearProbe":
        """Fits the probe anew.

        Args:
            features (`np.ndarray` of shape `(N, D)`): As extracted; normalised in here.
            labels (`np.ndarray` of shape `(N,)`): Integers.

        Raises:
            `ValueError`: without rows, with features that are not finite, labels of another shape, one class only;
                when the loss is not finite.
        """
        features, labels = checked(features, labels)
        self.classes_, columns = np.unique(labels, return_inverse=True)
        inputs, targets = self._prepare(features), torch.from_numpy(columns).to(self.device)
        weight = torch.zeros(len(self.classes_), inputs.shape[1], device=self.device, requires_grad=True)
        bias = torch.zeros(len(self.classes_), device=self.device, requires_grad=True)
        optimizer = torch.optim.SGD(
            [weight, bias],
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=True,
        )
        generator = torch.Generator().manual_seed(self.seed)
        num_steps = self.epochs * math.ceil(len(inputs) / self.batch_size)
        step = 0
        for _ in range(self.epochs):
            for rows in torch.randperm(len(inputs), generator=generator).split(self.batch_size):
                optimizer.param_groups[0]["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
                rows = rows.to(self.device)
                loss = F.cross_entropy(F.linear(inputs[rows], weight, bias), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
        self.weight_, self.bias_ = weight.detach(), bias.detach()
        self.fit_report = {"steps": step, "last_loss": loss.item()}
        if not math.isfinite(self.fit_report["last_loss"]):
            raise ValueError(
                f"The loss of the linear probe must stay finite, but is {loss} after {step} steps. "
                f"Lower `learning_rate`, which is {self.learning_rate}."
            )
        return self

    def predict_scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C) logits, columns in the order of `classes_`."""
        return F.linear(self._prepare(checked_features(features)), self.weight_, self.bias_).cpu().numpy()

    def _prepare(self, features: np.ndarray) -> torch.Tensor:
        inputs = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)).to(self.device)
        return F.normalize(F.layer_norm(inputs, inputs.shape[1:]), dim=1)
