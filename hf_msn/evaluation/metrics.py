"""Top-k accuracy of scores of classes."""

import numpy as np


def ranks_of_labels(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes rank before the label (N,) of each image by scores (N, C); below k it is in the top k.

    Of equal scores the lower column ranks first.

    Raises:
        ValueError: If `scores` holds NaN.
    """
    if np.isnan(scores).any():
        row = int(np.isnan(scores).any(axis=1).argmax())
        raise ValueError(
            f"`scores` must hold no NaN, but row {row} does. Look for NaN in the features or the weights."
        )
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    is_before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return is_before.sum(axis=1)
