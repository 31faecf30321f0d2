"""scripts/benchmark_eval.py, and that what it compares does the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_msn.evaluation.probes import centre_and_normalize

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = (
    "--model vit_tiny --image_size 32 --images 4 --batch_size 2 --rows 120 --dimension 16 --classes 6 --repeats 2 "
    "--threads 1 --device cpu"
).split()


@pytest.fixture
def solvers(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import probe_solvers

    return probe_solvers


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "benchmark_eval.py"), *TINY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("classes", [2, 6])
def test_all_solvers_end_at_one_minimum(solvers, classes):
    features, labels = solvers.made_up_features(120, 16, classes, 2.0)
    inputs, l2 = centre_and_normalize(features), 0.075
    candidates = [solvers.ours(l2, "cpu"), solvers.scikit_learn(l2, "float64"), solvers.scikit_learn(l2, "float32")]
    if solvers.has_cyanure() and classes > 2:
        candidates.append(solvers.cyanure(l2, 1))
    values = [solvers.objective(solve(300, inputs, features, labels), inputs, labels, l2) for solve in candidates]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-4)


def test_the_objective_is_that_of_the_definition(solvers):
    features, labels = solvers.made_up_features(12, 5, 3, 1.0)
    weights = np.random.default_rng(1).standard_normal((3, 5))
    inputs = centre_and_normalize(features)
    losses = [
        -np.log(np.exp(weights[y] @ x) / sum(np.exp(row @ x) for row in weights)) for x, y in zip(inputs, labels)
    ]
    expected = np.mean(losses) + 0.3 / 12 / 2 * (weights**2).sum()
    assert solvers.objective(weights, inputs, labels, 0.3) == pytest.approx(expected, rel=1e-12)


def test_the_json_holds_what_the_table_shows(tmp_path):
    output = tmp_path / "eval.json"
    done = run("--output", output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert output.with_suffix(".png").stat().st_size > 0
    assert results["features"]["largest_difference"] < 1e-5
    assert f"{results['features']['ratio']['median']:.2f}" in done.stdout
    assert list(results["probe"])[:2] == ["hf_msn (cpu)", "scikit-learn, float32"]
    for name, result in results["probe"].items():
        assert name in done.stdout
        if result["iterations"] is not None:
            assert f"{result['seconds']['median']:.2f}" in done.stdout
            assert result["curve"][-1][2] <= results["arguments"]["within"]
    assert results["probe"]["hf_msn (cpu)"]["iterations"] <= results["probe"]["scikit-learn, float64"]["iterations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--parts speed", "`parts` must be some of"),
        ("--model b32", "`model` must be one of"),
        ("--image_size 33", "must be a multiple of 16"),
        ("--classes 121", "must lie between 2 and the 120 rows"),
        ("--repeats 0", "`repeats` must be >= 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    done = run(*arguments.split())
    assert done.returncode != 0 and message in done.stderr
