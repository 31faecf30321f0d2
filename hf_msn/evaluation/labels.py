"""Labels of the data sets that an evaluation compares: read, checked, and the same classes on both sides."""

import datasets
import numpy as np

_SHOWN = 5


def common_class_names(
    train: datasets.Dataset | datasets.IterableDataset, test: datasets.Dataset | datasets.IterableDataset
) -> list[str] | None:
    """The class names of the train data, `None` if it has none.

    Raises:
        `ValueError`: if the test data has other names or another order.
    """
    names, test_names = _class_names(train), _class_names(test)
    if names and test_names and names != test_names:
        position = next((i for i, pair in enumerate(zip(names, test_names)) if pair[0] != pair[1]), None)
        which = (
            f"{len(names)} and {len(test_names)} classes"
            if position is None
            else f"{names[position]!r} and {test_names[position]!r} at number {position}"
        )
        raise ValueError(
            "Train and test data must have the same class names in the same order, but have "
            f"{which}. Load both splits from one source, or cast one's label column to the other's names."
        )
    return names


def read_labels(
    dataset: datasets.Dataset | datasets.IterableDataset, which: str, rows: np.ndarray | None = None
) -> np.ndarray | None:
    """The labels of a data set; `None` for a stream, whose labels come with its features.

    Args:
        dataset: With a column `label`.
        which (`str`): "train" or "test", for the errors.
        rows (`np.ndarray`, *optional*): Reads the labels of these rows and of no other, in this order.

    Raises:
        `ValueError`: if there is no column or no row, or a row has no label.
    """
    columns = dataset.column_names
    if columns is not None and "label" not in columns:
        raise ValueError(
            f"Low-shot evaluation needs labels, but the {which} data is unlabelled: its columns are {columns}. Name "
            "the column with `load_images(..., label_column=...)`, or put the images into one folder a class."
        )
    if isinstance(dataset, datasets.IterableDataset):
        return None
    if len(dataset) == 0:
        raise ValueError(
            f"Low-shot evaluation needs {which} images, but the {which} data has no rows. Look at its split."
        )
    labels = np.asarray((dataset if rows is None else dataset.select(rows))["label"][:])
    missing = np.array([label is None or label < 0 for label in labels]) if labels.dtype == object else labels < 0
    if missing.any():
        first = int(missing.argmax()) if rows is None else int(rows[missing.argmax()])
        raise ValueError(
            f"Low-shot evaluation needs a label of every image, but {int(missing.sum())} of {len(labels)} rows of the "
            f"{which} data have none (None or -1), the first is row {first}. Use a labelled split."
        )
    return labels.astype(np.int64)


def check_every_class_is_learnt(
    train_labels: np.ndarray, test_labels: np.ndarray, where: str, class_names: list[str] | None
) -> None:
    """Raises a `ValueError` that names the classes of `test_labels` which `train_labels`, those of `where`, lack."""
    unseen = np.setdiff1d(test_labels, train_labels)
    if len(unseen):
        names = dict(enumerate(class_names or ()))
        named = ", ".join(names.get(label, str(label)) for label in unseen[:_SHOWN].tolist())
        raise ValueError(
            f"Every class of the test data must be among the {where}, but {len(unseen)} are not: {named}"
            f"{', ...' if len(unseen) > _SHOWN else ''}. Give train and test data of the same classes."
        )


def _class_names(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    feature = (dataset.features or {}).get("label")
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
