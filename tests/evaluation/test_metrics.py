import numpy as np
import pytest

from hf_msn.evaluation.metrics import TopKAccuracy, rank_classes


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_accuracy_counts_labels_among_the_k_best_scores(k):
    random = np.random.RandomState(0)
    scores, labels = random.normal(size=(50, 8)), random.randint(0, 8, 50)
    hits = 0
    for row, label in zip(scores, labels):
        better = sum(1 for score in row if score > row[label])
        hits += better < k
    result = TopKAccuracy(keep_in_memory=True).compute(predictions=rank_classes(scores, k), references=labels, k=k)
    assert result == {f"top{k}_accuracy": pytest.approx(hits / 50)}


def test_equal_scores_rank_the_lower_class_first():
    np.testing.assert_array_equal(rank_classes(np.zeros((1, 4)), 3), [[0, 1, 2]])


def test_nan_is_refused():
    with pytest.raises(ValueError, match="row 1"):
        rank_classes(np.array([[0.0, 1.0], [np.nan, 1.0]]), 1)


def test_metric_computes_without_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = TopKAccuracy(cache_dir=str(tmp_path), keep_in_memory=True)
    metric.add_batch(predictions=[[0], [1]], references=[0, 1])
    metric.add_batch(predictions=[[1]], references=[0])
    assert metric.compute(k=1) == {"top1_accuracy": pytest.approx(2 / 3)}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
