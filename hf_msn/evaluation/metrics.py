"""Top-k accuracy, as an `evaluate.Metric` that needs no download."""

import datasets
import evaluate
import numpy as np

from ..checks import check_integer


def rank_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the `k` best classes (N, min(k, C)) of scores (N, C), best first. Ties rank the lower column first.

    Raises:
        ValueError: If `scores` holds NaN, or `k < 1`.
    """
    scores = np.asarray(scores)
    check_integer("k", k, meaning="counts classes")
    if np.isnan(scores).any():
        row = int(np.isnan(scores).any(axis=1).argmax())
        raise ValueError(
            f"`scores` must hold no NaN, but row {row} does. Look for NaN in the features or the weights."
        )
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)


class TopKAccuracy(evaluate.Metric):
    """Share of images whose label is among the `k` classes ranked first, in [0, 1].

    `predictions` are ranked classes, best first, from `rank_classes`, not scores: scores of 1000 classes cost
    `evaluate` minutes on 50,000 images, five ranked classes one second.
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
                f"`k` must be between 1 and {ranked.shape[1]}, the number of ranked classes, but is {k}. "
                "Rank more classes with `rank_classes(scores, k)`."
            )
        hits = (ranked[:, :k] == np.asarray(references)[:, None]).any(axis=1)
        return {f"top{k}_accuracy": float(hits.mean())}
