"""scripts/benchmarks/sync_accuracy.py: its parts do not overlap, and the best rate is chosen by other seeds."""

import json

import pytest
import sync_accuracy


@pytest.mark.slow
def test_the_parts_of_the_text_have_no_block_in_common():
    parts = {name: {tuple(row["input_ids"].tolist()) for row in rows} for name, rows in sync_accuracy.text().items()}
    assert min(map(len, parts.values())) > 350
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["validation"]
    assert 300_000 < sync_accuracy.language_model().num_parameters() < 400_000


@pytest.mark.parametrize("arguments", [{"methods": ["adam"]}, {"ranks": 1}, {"seeds": 1}, {"learning_rates": [0.0]}])
def test_arguments_outside_of_their_rule_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sync_accuracy.BenchmarkArguments(**arguments)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_table_has_the_mean_of_the_test_part_at_the_rate_that_validation_chose(run, tmp_path):
    output = tmp_path / "accuracy.json"
    command = "--tasks digits --methods local_sgd --ranks 2 --max_steps 3 --sync_every 2 --batch_size 16 --seeds 2"
    printed = run(sync_accuracy, *command.split(), "--learning_rates", 0.0001, 0.01, "--output", output)
    found = json.loads(output.read_text())
    losses = {run["learning_rate"]: run["validation_loss"] for run in found["tuning"]}
    best = min(losses, key=losses.get)
    assert len(losses) == 2 and {run["seed"] for run in found["tuning"]}.isdisjoint({0, 1})
    first, second = found["runs"]
    assert (first["seed"], second["seed"], first["learning_rate"], second["learning_rate"]) == (0, 1, best, best)
    assert first["test_loss"] != second["test_loss"]
    mean = (first["test_loss"] + second["test_loss"]) / 2
    assert f"| local_sgd | {best:g} " in printed and f"{mean:.3f} ±" in printed
    assert output.with_suffix(".png").stat().st_size > 5000
