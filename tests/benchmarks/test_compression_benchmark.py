"""scripts/benchmarks/compression.py on a few digits."""

import json

import compression
import pytest

from hf_msn import load_images


@pytest.mark.slow
def test_cost_falls_and_the_table_has_every_run(run, tmp_path, monkeypatch):
    parts = load_images("digits").select(range(60)), load_images("digits", split="test").select(range(20))
    monkeypatch.setattr(compression, "load", lambda name: parts)
    arguments = ["--methods", "msn", "--schedules", "plain", "half", "dropout 0.75, then plain", "--seeds", "2"]
    arguments += "--max_steps 8 --images_per_class 2 --flags hidden_size=16 num_hidden_layers=1".split()
    shown = run(compression, *arguments, "--output", tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    plain, half, compressed = (entry["teraflops"] for entry in results)
    assert half == pytest.approx(plain / 2) and compressed < plain  # heads as large as the encoder
    for entry in results:
        first, second = (run["low_shot/2_per_class/top1"] for run in entry["runs"])
        assert f"{(first + second) / 2:.1f} ± {abs(first - second) / 2**0.5:.1f}" in shown
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"`schedules`.*'dropout'"):
        compression.BenchmarkArguments(schedules=["dropout"])
