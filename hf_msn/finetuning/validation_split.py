"""The labelled images that choose the best epoch and are not trained on."""

import numpy as np

from ..data.splits import random_stream

# low_shot_indices draws from (seed, class), the supports from (seed, step, 1): this keeps the streams apart
_STREAM = 2
_SHOWN = 5


def validation_split(
    rows: np.ndarray, labels: np.ndarray, fraction: float, seed: int, class_names: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split labelled rows class by class into those to train on and those that choose the best epoch.

    Of n images of a class, round(`fraction` * n) are held out, but at least one and at most n - 1. The draw depends on
    (`seed`, class, n) alone. Both parts are ascending.

    Raises:
        ValueError: If a class has a single labelled image.
    """
    if fraction == 0:
        return np.sort(rows), rows[:0]
    classes, counts = np.unique(labels, return_counts=True)
    alone = classes[counts < 2].tolist()
    if alone:
        shown = ", ".join(str(number) if class_names is None else class_names[number] for number in alone[:_SHOWN])
        raise ValueError(
            f"{len(alone)} of {len(classes)} classes have a single labelled image ({shown}"
            f"{', ...' if len(alone) > _SHOWN else ''}), which cannot both be trained on and choose the best epoch. "
            "Set `validation_fraction` to 0 and `num_train_epochs` to a fixed number, or label a second image."
        )
    held_out = []
    for number, count in zip(classes.tolist(), counts.tolist()):
        size = min(max(1, int(fraction * count + 0.5)), count - 1)
        order = random_stream(seed, number, _STREAM).permutation(count)
        held_out.append(np.sort(rows[labels == number])[order[:size]])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(rows, held_out), held_out
