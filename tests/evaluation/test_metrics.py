import numpy as np
import pytest

from hf_msn.evaluation.metrics import ranks_of_labels


def test_rank_of_a_label_counts_higher_scores_and_equal_ones_of_lower_classes():
    random = np.random.RandomState(0)
    scores, labels = random.normal(size=(50, 8)).round(0), random.randint(0, 8, 50)
    scores[0, :3] = -np.inf
    expected = []
    for row, label in zip(scores, labels):
        before = [c for c, score in enumerate(row) if score > row[label] or (score == row[label] and c < label)]
        expected.append(len(before))
    assert ranks_of_labels(scores, labels).tolist() == expected and set(expected) == set(range(8))
    order = np.argsort(-scores, axis=1, kind="stable")
    assert expected == [list(of_row).index(label) for of_row, label in zip(order, labels)]


def test_nan_is_refused():
    with pytest.raises(ValueError, match="row 1"):
        ranks_of_labels(np.array([[0.0, 1.0], [np.nan, 1.0]]), np.array([0, 0]))
