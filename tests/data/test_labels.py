import datasets
import numpy as np
import pytest
import torch

from hf_msn import LowShotEvaluator, pixel_features
from hf_msn.data.labels import check_class_names, class_numbers, draw_labelled_rows, labelled_rows, numbered_as
from hf_msn.data.sources import load_images
from hf_msn.data.splits import check_labels, low_shot_indices

NAMES = ["cat", "dog", "fox"]


class WithoutLabels:
    """A dataset that returns its length, its features and parts of itself, but no row."""

    def __init__(self, dataset: datasets.Dataset):
        self._dataset = dataset
        self.selected = []

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def features(self) -> datasets.Features:
        return self._dataset.features

    def select(self, rows) -> datasets.Dataset:
        self.selected.append([int(row) for row in rows])
        return self._dataset.select(rows)

    def select_columns(self, columns) -> datasets.Dataset:
        assert columns == "image"
        return self._dataset.select_columns(columns)


def _labelled(labels: list, names: list[str] | None = None) -> datasets.Dataset:
    feature = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    images = [{"bytes": None, "path": f"train/n0{row % 3}_{row}.png"} for row in range(len(labels))]
    features = datasets.Features(image=datasets.Image(decode=False), label=feature)
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features)


@pytest.mark.parametrize(
    "mask",
    [
        [False, True, False, False, True, True],
        np.array([0, 1, 0, 0, 1, 1], dtype=bool),
        torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.bool),
        [5, 1, 4],
        np.array([4, 5, 1], dtype=np.uint8),
        torch.tensor([1, 4, 5]),
    ],
)
def test_masks_and_numbers_give_the_same_rows(mask):
    rows = labelled_rows(_labelled([0] * 6), mask=mask)
    assert (rows.dtype, rows.tolist()) == (np.int64, [1, 4, 5])


def test_no_label_is_read_to_find_the_rows(tmp_path):
    (tmp_path / "subset.txt").write_text("n02_5.JPEG\nn01_1.JPEG\n")
    dataset = WithoutLabels(_labelled([0] * 6))
    assert labelled_rows(dataset, mask=[1, 5]).tolist() == [1, 5]
    assert labelled_rows(dataset, list_file=tmp_path / "subset.txt").tolist() == [1, 5]
    assert dataset.selected == []


def test_required_classes_are_searched_in_the_labelled_rows_alone():
    dataset = WithoutLabels(_labelled([0, 2, -1, 0, 1, -1], NAMES))
    assert labelled_rows(dataset, mask=[0, 1], classes=["cat", "fox"]).tolist() == [0, 1]
    assert labelled_rows(dataset, mask=[0, 1], classes=[0, 2]).tolist() == [0, 1]
    # row 4 is a dog, but not among the labelled rows
    with pytest.raises(ValueError, match="1 have none: dog"):
        labelled_rows(dataset, mask=[0, 1], classes=["cat", "dog"])
    with pytest.raises(ValueError, match="2 have none: 1, 7"):
        labelled_rows(dataset, mask=[0, 1], classes=[0, 1, 7])
    assert dataset.selected == [[0, 1]] * 4
    with pytest.raises(ValueError, match="cat"):
        labelled_rows(_labelled([0, 1]), mask=[0, 1], classes=["cat"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither"),
        ({"mask": [0], "list_file": "list.txt"}, "both"),
        ({"mask": []}, r"\(0,\)"),
        ({"mask": [True] * 5}, r"\(6,\), but has shape \(5,\)"),
        ({"mask": [0, 6, -1]}, "from 0 to 5, but holds -1, 6"),
        ({"mask": [0, 1, 1, 0, 2]}, "0, 1 more than once"),
        ({"mask": [0.0, 1.0]}, "float64"),
        ({"mask": [[True] * 6]}, r"\(1, 6\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        labelled_rows(_labelled([0] * 6), **settings)


def test_drawn_rows_are_those_of_the_low_shot_split():
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0]
    dataset = _labelled(labels, NAMES)
    for settings in ({"images_per_class": 2, "seed": 4}, {"fraction": 0.5, "seed": 1}):
        np.testing.assert_array_equal(draw_labelled_rows(dataset, **settings), low_shot_indices(labels, **settings))
    with pytest.raises(ValueError, match="dog has 3, fox has 3"):
        draw_labelled_rows(dataset, images_per_class=4, seed=0)
    for other, named in (
        (dataset.select_columns("image"), r"\['image'\]"),
        (dataset.to_iterable_dataset(), "streaming"),
    ):
        with pytest.raises(ValueError, match=named):
            draw_labelled_rows(other, images_per_class=1, seed=0)


def test_same_or_missing_class_names_agree():
    named = _labelled([0], NAMES)
    for other in (named, _labelled([0]), named.select_columns("image"), named.to_iterable_dataset()):
        assert check_class_names(WithoutLabels(named), other) == NAMES
        check_class_names(other, WithoutLabels(named))


def test_different_class_names_are_refused():
    named = _labelled([0], NAMES)
    with pytest.raises(ValueError, match="class 1 is 'dog' and 'fox'"):
        check_class_names(named, _labelled([0], ["cat", "fox", "dog"]))
    with pytest.raises(ValueError, match="3 and 2 classes"):
        check_class_names(named, _labelled([0], ["cat", "dog"]))


def test_test_data_that_lacks_a_class_is_numbered_as_the_train_data(tmp_path, encoded):
    def text(labels, split):
        images = [{"bytes": encoded(row), "path": None} for row in range(len(labels))]
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
        part = datasets.Dataset.from_dict({"image": images, "label": labels}, features)
        (tmp_path / "data").mkdir(exist_ok=True)
        part.to_parquet(str(tmp_path / "data" / f"{split}-0.parquet"))
        return load_images(tmp_path / "data", split=split)

    train, test = text(["dog", "cat", "fox"], "train"), text(["fox", "cat", "fox"], "test")
    assert (test.features["label"].names, test["label"][:]) == (["cat", "fox"], [1, 0, 1])
    same = numbered_as(train, test)
    assert (same.features["label"].names, same["label"][:]) == (["cat", "dog", "fox"], [2, 0, 2])
    assert same["image"][:] == test["image"][:] and same.info.dataset_name == test.info.dataset_name
    assert same._fingerprint == numbered_as(train, test)._fingerprint
    assert numbered_as(train, train) is train
    evaluator = LowShotEvaluator(train, test, images_per_class=(1,))
    metrics = evaluator.evaluate_features(pixel_features(train), pixel_features(evaluator.test_dataset))
    assert evaluator.results.data["class_names"] == ["cat", "dog", "fox"] and metrics["low_shot/1_per_class/top1"] >= 0
    with pytest.raises(ValueError, match="dog, which the first lacks"):
        numbered_as(test, train)


@pytest.mark.parametrize(
    ("labels", "row"),
    [
        ([], "shape"),
        ([3, None], "row 1 has label None"),
        ([3, 2, -1], "row 2 has label -1"),
        (["cat", "dog"], "row 0 has label 'cat'"),
        (np.array([1, True, 2], dtype=object), "row 1 has label True"),
        ([[1], [2]], r"\(2, 1\)"),
    ],
)
def test_labels_must_be_class_numbers(labels, row):
    with pytest.raises(ValueError, match=row):
        check_labels(labels)


def test_labels_are_read_of_the_given_rows_and_below_the_number_of_names():
    dataset = WithoutLabels(_labelled([0, 2, -1, 0, 1, -1], NAMES))
    np.testing.assert_array_equal(class_numbers(dataset, np.array([0, 1, 4])), [0, 2, 1])
    assert dataset.selected == [[0, 1, 4]]
    with pytest.raises(ValueError, match="row 5 has label -1"):
        class_numbers(dataset, np.array([1, 5]))
