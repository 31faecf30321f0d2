"""Accuracies as an `evaluate.Metric` that needs no download."""

import datasets
import evaluate
import numpy as np


def rank_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """The `k` best classes of each row, best first. Equal scores rank the lower column first, as `argmax` does.

    Args:
        scores (`np.ndarray` of shape `(N, C)`): Any real scores; higher is better.
        k (`int`): How many classes to keep; at most `C` are there.

    Returns:
        `np.ndarray` of shape `(N, min(k, C))`, int64: column numbers.

    Raises:
        `ValueError`: if `scores` is not two-dimensional or holds NaN, or `k < 1`.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"`scores` must have shape (images, classes), but has shape {scores.shape}.")
    if k < 1:
        raise ValueError(f"`k` counts classes and must be >= 1, but is {k}.")
    if np.isnan(scores).any():
        row = int(np.isnan(scores).any(axis=1).argmax())
        raise ValueError(
            f"`scores` must hold no NaN, but row {row} does. Look for NaN in the features or the weights."
        )
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)


class TopKAccuracy(evaluate.Metric):
    """Share of images whose label is among the `k` classes ranked first, in [0, 1].

    `predictions` are ranked classes, best first (`rank_classes` makes them of scores), not scores: a score for each of
    1000 classes costs `evaluate` minutes on 50,000 images, five ranked classes a second.

    Example:

    ```python
    >>> from hf_msn.evaluation import TopKAccuracy, rank_classes

    >>> TopKAccuracy().compute(predictions=[[2, 0], [1, 0]], references=[2, 0], k=1)
    {'top1_accuracy': 0.5}
    ```
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs):
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of images whose label is among the k classes ranked first.",
            citation="",
            inputs_description="predictions: ranked classes (N, >= k), best first. references: labels (N,). k: int.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int], k: int = 1) -> dict[str, float]:
        ranked = np.asarray(predictions)
        if k < 1 or ranked.shape[1] < k:
            raise ValueError(
                f"`k` must be between 1 and the {ranked.shape[1]} ranked classes given for each image, but is {k}. "
                "Rank more classes with `rank_classes(scores, k)`."
            )
        hits = (ranked[:, :k] == np.asarray(references)[:, None]).any(axis=1)
        return {f"top{k}_accuracy": float(hits.mean())}
