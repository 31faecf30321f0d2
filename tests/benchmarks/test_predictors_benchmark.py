"""scripts/benchmarks/predictors.py on a few digits."""

import json

import predictors
import pytest

from hf_msn import load_images


@pytest.mark.slow
def test_the_table_has_mean_and_deviation_over_the_seeds(run, tmp_path, monkeypatch):
    parts = load_images("digits").select(range(60)), load_images("digits", split="test").select(range(20))
    monkeypatch.setattr(predictors, "load", lambda name: parts)
    arguments = "--encoders resnet --predictors direct_copy --seeds 2 --steps 10 --batch_size 8".split()
    shown = run(predictors, *arguments, "--output", tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [(entry["encoder"], entry["ema"], entry["predictor"]) for entry in results] == [
        ("resnet", True, "untrained"),
        ("resnet", True, "direct_copy"),
        ("resnet", False, "direct_copy"),
    ]
    for entry in results:
        first, second = (run["all labels"] for run in entry["runs"])
        assert f"{(first + second) / 2:.1f} ± {abs(first - second) / 2**0.5:.1f}" in shown
    assert predictors.BenchmarkArguments().seeds == 3
    with pytest.raises(ValueError, match=r"`seeds`.*1"):
        predictors.BenchmarkArguments(seeds=1)
