"""The rows that tasks take. That each task is measured with its rows is held by test_low_shot.py."""

import datasets
import numpy as np
import pytest

from hf_msn.evaluation.low_shot import LowShotEvaluator


def test_a_given_row_without_a_label_is_named(few):
    labels = np.array(few[0]["label"][:])
    labels[[17, 30]] = -1
    train = few[0].cast_column("label", datasets.Value("int64")).remove_columns("label").add_column("label", labels)
    test = few[1].cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"1 of 3 rows of the train data have none .* the first is row 17"):
        LowShotEvaluator(train, test, images_per_class=(), rows={"support": [3, 17, 20]})


def test_a_class_that_the_given_rows_lack_is_named_before_any_image_is_read(few):
    labels = np.array(few[0]["label"][:])
    with pytest.raises(ValueError, match="among the rows of 'support', but 2 are not: 4, 7"):
        LowShotEvaluator(*few, rows={"support": np.flatnonzero((labels != 4) & (labels != 7))})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"support": [0, 120]}, "`rows` of 'support' must be below 120, .* but one is 120"),
        ({"support": [-1, 3]}, "but holds -1"),
        ({"support": [5, 3, 5]}, "but holds 5 more than once"),
        ({"support": []}, "at least one row number, but has shape .0,."),
        ({"support": [True] * 120}, r"type bool. Of a mask take `np.flatnonzero\(mask\)`"),
        ({"support": [0.5]}, "type float64"),
        ([1, 2, 3], "must map names of tasks to row numbers, but is list"),
        ({"1_per_class": [1]}, r"\['1_per_class'\] are there twice"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(few, rows, message):
    with pytest.raises(ValueError, match=message):
        LowShotEvaluator(*few, rows=rows)


def test_rows_of_a_stream_are_refused(few):
    with pytest.raises(ValueError, match="streaming=False"):
        LowShotEvaluator(few[0].to_iterable_dataset(), few[1], images_per_class=(), rows={"support": [1]})
