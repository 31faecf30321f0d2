import json
import math

import numpy as np
import pytest

from hf_msn.evaluation.results import LowShotResults, SplitResult, TaskResult, mean_std_ci95


def split(top1, top5=None, seed=0, list_file=None):
    return SplitResult(seed, list_file, 10, 1, 1, num_skipped=0, fit={"l2": 0.0025}, top1=top1, top5=top5)


@pytest.fixture
def results():
    tasks = [
        TaskResult("1_per_class", 10, [split(60.0, 90.0), split(70.0, 94.0), split(62.0, 92.0)]),
        TaskResult("published", 3, [split(80.5, list_file="/home/someone/lists/published.txt")]),
    ]
    return LowShotResults(name="low_shot", primary_metric="low_shot/1_per_class/top1", tasks=tasks)


def test_mean_deviation_and_interval_are_those_of_the_textbook():
    mean, std, half_width = mean_std_ci95([60.0, 70.0, 62.0])
    assert mean == pytest.approx(64)
    assert std == pytest.approx(math.sqrt((16 + 36 + 4) / 2))
    # 4.302653 is the 97.5 % point of Student's t with 2 degrees of freedom
    assert half_width == pytest.approx(4.302653 * std / math.sqrt(3), rel=1e-6)


def test_one_split_has_no_deviation():
    assert mean_std_ci95([81.0]) == (81.0, 0.0, 0.0)


def test_metrics_are_flat_and_in_percent(results):
    assert results.metrics["low_shot/1_per_class/top1"] == pytest.approx(64)
    assert results.metrics["low_shot/1_per_class/top5"] == pytest.approx(92)
    assert results.metrics["low_shot/1_per_class/num_splits"] == 3
    published = {name: value for name, value in results.metrics.items() if "published" in name}
    assert published == {
        "low_shot/published/top1": 80.5,
        "low_shot/published/top1_std": 0.0,
        "low_shot/published/top1_ci95": 0.0,
        "low_shot/published/num_splits": 1.0,
    }


def test_table_is_aligned_and_omits_undefined_numbers(results):
    lines = results.table().splitlines()
    assert lines[2].split("  ")[0] == "1 per class"
    assert "64.0 ± 5.3" in lines[2] and "50.9 to 77.1" in lines[2] and "92.0" in lines[2]
    assert lines[3].split() == ["published", "80.5", "-", "-", "1"]
    assert len({line.index(cell) for line, cell in zip(lines[2:], ("64.0", "80.5"))}) == 1


def test_interval_in_the_table_is_clipped():
    tasks = [TaskResult("low", 9, [split(1.0), split(9.0)]), TaskResult("high", 9, [split(99.0), split(91.0)])]
    results = LowShotResults(name="low_shot", primary_metric="low_shot/low/top1", tasks=tasks)
    low, high = results.table().splitlines()[2:]
    # 5 and 95, half-width 12.706 * 4: -45.8 and 145.8 without clipping
    assert "0.0 to 55.8" in low and "44.2 to 100.0" in high
    assert results.metrics["low_shot/low/top1_ci95"] == pytest.approx(50.82, abs=0.01)


def test_saved_json_holds_every_split(results, tmp_path):
    path = tmp_path / "new" / "results.json"
    results.save(path)
    saved = json.loads(path.read_text())
    assert [one["top1"] for one in saved["tasks"][0]["splits"]] == [60.0, 70.0, 62.0]
    assert saved["metrics"] == results.metrics
    assert saved["tasks"][1]["summary"]["top1"] == 80.5
    assert saved["tasks"][1]["splits"][0]["list_file"] == "published.txt"
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_results_that_are_not_finite_leave_the_old_file(results, tmp_path):
    path = tmp_path / "results.json"
    results.save(path)
    before = path.read_text()
    results.model["norm"] = np.float64("nan")
    with pytest.raises(ValueError, match="JSON"):
        results.save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_the_table_tells_how_many_images_were_read_where_some_were_skipped():
    skipped = [
        SplitResult(0, None, 13, fewest, most, num_skipped=7, fit={}, top1=50.0, top5=None)
        for fewest, most in [(4, 5), (5, 7)]
    ]
    results = LowShotResults(name="low_shot", primary_metric="", tasks=[TaskResult("8_per_class", 3, skipped)])
    assert "8 per class (4 to 7 read per class)" in results.table()
