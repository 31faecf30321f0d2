"""scripts/benchmarks/sync_accuracy.py: its parts do not overlap, and the best rate is chosen by other seeds."""

import json

import pytest
import sync_accuracy


def test_the_parts_of_the_text_have_no_block_in_common():
    parts = {name: {tuple(row["input_ids"].tolist()) for row in rows} for name, rows in sync_accuracy.text().items()}
    assert len(parts["test"]) == len(parts["validation"]) == 400
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["validation"]
    assert 300_000 < sync_accuracy.language_model().num_parameters() < 400_000


@pytest.mark.parametrize("arguments", [{"methods": ["adam"]}, {"ranks": 1}, {"seeds": 1}, {"learning_rates": [0.0]}])
def test_arguments_outside_of_their_rule_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sync_accuracy.BenchmarkArguments(**arguments)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_table_of_the_test_part_at_the_rate_that_validation_chose(run, tmp_path):
    output = tmp_path / "accuracy.json"
    command = "--tasks digits --methods ddp local_sgd --ranks 2 --max_steps 4 --sync_every 1 --batch_size 16"
    printed = run(sync_accuracy, *command.split(), "--learning_rates", 0.0001, 0.01, "--seeds", 2, "--output", output)
    found = json.loads(output.read_text())
    assert {run["seed"] for run in found["tuning"]}.isdisjoint(run["seed"] for run in found["runs"])
    losses = {name: [run for run in found["runs"] if run["method"] == name] for name in ("ddp", "local_sgd")}
    for runs in losses.values():
        assert [run["learning_rate"] for run in runs] == [0.01, 0.01]
        assert runs[0]["test_loss"] != runs[1]["test_loss"] and all(run["test_loss"] < 2.31 for run in runs)
    assert losses["ddp"][0]["test_loss"] != losses["local_sgd"][0]["test_loss"]  # AdamW sees other gradients
    assert "| local_sgd " in printed and output.with_suffix(".png").stat().st_size > 5000
