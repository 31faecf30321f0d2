"""scripts/benchmarks/evaluation.py, and that the compared solvers do the same work."""

import json

import evaluation
import numpy as np
import pytest

TINY = (
    "--model vit_tiny --image_size 32 --images 4 --batch_size 2 --rows 120 --dimension 16 --classes 6 --repeats 2 "
    "--threads 1 --device cpu"
).split()


def test_all_solvers_end_at_one_minimum():
    features, labels = evaluation.made_up_features(120, 16, 6, 2.0)
    inputs, l2 = evaluation.centre_and_normalize(features), 0.075
    candidates = [
        evaluation.ours(l2, "cpu"),
        evaluation.scikit_learn(l2, "float64"),
        evaluation.scikit_learn(l2, "float32"),
    ]
    values = [evaluation.objective(solve(300, inputs, features, labels), inputs, labels, l2) for solve in candidates]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-4)


def test_the_objective_is_that_of_the_definition():
    features, labels = evaluation.made_up_features(12, 5, 3, 1.0)
    weights = np.random.default_rng(1).standard_normal((3, 5))
    inputs = evaluation.centre_and_normalize(features)
    losses = [
        -np.log(np.exp(weights[y] @ x) / sum(np.exp(row @ x) for row in weights)) for x, y in zip(inputs, labels)
    ]
    expected = np.mean(losses) + 0.3 / 12 / 2 * (weights**2).sum()
    assert evaluation.objective(weights, inputs, labels, 0.3) == pytest.approx(expected, rel=1e-12)


def test_the_json_holds_the_numbers_of_the_table(run, tmp_path):
    output = tmp_path / "evaluation.json"
    printed = run(evaluation, *TINY, "--output", output)
    results = json.loads(output.read_text())
    assert results["features"]["largest_difference"] < 1e-5
    assert f"{results['features']['ratio']['median']:.2f}" in printed
    for name, result in results["probe"].items():
        assert name in printed
        if result["iterations"] is not None:
            assert f"{result['seconds']['median']:.2f}" in printed
            assert result["curve"][-1][2] <= results["arguments"]["within"]
    assert results["probe"]["hf_msn (cpu)"]["iterations"] <= results["probe"]["scikit-learn, float64"]["iterations"]
