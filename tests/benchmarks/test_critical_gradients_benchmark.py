"""scripts/benchmarks/critical_gradients.py."""

import json
import math

import critical_gradients
import numpy as np
import pytest


@pytest.mark.slow
def test_the_table_has_the_means_of_the_runs_in_the_json(run, tmp_path):
    output = tmp_path / "critical_gradients.json"
    printed = run(critical_gradients, "--parts", "mlp", "--steps", 20, "--seeds", 2, "--output", output)
    results = json.loads(output.read_text())
    runs = results["losses"]["mlp"]["SGD"]["0.1"]
    for capacity in ("0", "5"):
        ends = [np.mean(losses[-2:]) for losses in runs[capacity]]
        assert f"{np.mean(ends):.4f} ± {np.std(ends, ddof=1):.4f}" in printed
    assert runs["0"][0][:1] == runs["5"][0][:1] and runs["0"][0] != runs["5"][0]  # equal until the buffer has one
    assert output.with_suffix(".png").stat().st_size > 0


def test_a_run_that_diverged_counts_as_infinite():
    assert critical_gradients.final([1.0] * 18 + [2.0, 4.0]) == 3.0
    assert critical_gradients.final([1.0, math.nan]) == math.inf
