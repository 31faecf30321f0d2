"""What probes ask of features and labels, and how the paper normalises features."""

import numpy as np


def centre_and_normalize(features: np.ndarray) -> np.ndarray:
    """Each vector minus its own mean, then of unit length: `x <- x - mean(x); x <- x / ||x||_2`, in float64.

    A vector that is constant has no direction and becomes 0.
    """
    centred = np.asarray(features, dtype=np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    # what is left of a constant vector is rounding, which must not be blown up to unit length
    rounding = np.finfo(np.float32).eps * np.abs(features).max(axis=1, keepdims=True)
    return np.where(lengths > rounding, centred / np.maximum(lengths, np.finfo(np.float64).tiny), 0.0)


def checked_features(features: np.ndarray) -> np.ndarray:
    """Features (N, D), or a `ValueError` if they have another shape, no rows or values that are not finite."""
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"`features` must have shape (images, dimensions), but has shape {features.shape}.")
    if len(features) == 0:
        raise ValueError("`features` has no rows: a probe needs at least one image. Look at the split it came from.")
    broken = ~np.isfinite(features).all(axis=1)
    if broken.any():
        raise ValueError(
            f"`features` must be finite, but {int(broken.sum())} of {len(features)} rows hold NaN or infinity, the "
            f"first is row {int(broken.argmax())}. Look for NaN in the weights, or extract with dtype=torch.float32."
        )
    return features


def checked(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features as above and labels (N,), or a `ValueError` if labels have another shape or are all the same."""
    features, labels = checked_features(features), np.asarray(labels)
    if labels.shape != (len(features),):
        raise ValueError(
            f"`labels` must hold one integer for each of the {len(features)} rows of `features`, but has shape "
            f"{labels.shape}."
        )
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(
            f"A probe tells classes apart and needs at least 2, but all {len(labels)} labels are {classes[0]}. "
            "Give labelled images of more classes."
        )
    return features, labels
