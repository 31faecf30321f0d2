"""scripts/compare_codistillation.py: codistillation against DDP on digits."""

import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from launch import PRELOADED

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_codistillation

    return compare_codistillation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"methods": ["ddp", "local_sgd"]}, "methods.*local_sgd"),
        ({"methods": ["checkpoints"]}, "methods.*ddp"),
        ({"batch_size": 63}, "batch_size.*63"),
        ({"weight_decays": []}, "weight_decays"),
        ({"exchange_every": 0}, "exchange_every.*0"),
        ({"alpha": -1.0}, "alpha.*-1"),
    ],
)
def test_arguments_outside_of_their_rule_are_refused(script, arguments, words):
    with pytest.raises(ValueError, match=words):
        script.ComparisonArguments(**arguments)


def _ranks(method, seed, falling, accuracies, sent):
    run = {"method": method, "seed": seed, "falling": falling, "weight_decay": 0.01, "accuracy_of_mean": 97.0}
    return [{**run, "accuracy": accuracy, "bytes_sent": sent, "seconds": 2.0} for accuracy in accuracies]


def test_rows_are_means_over_replicas_and_seeds_next_to_ddp(script):
    found = [_ranks("ddp", seed, False, [96.0 + seed, 96.0 + seed], 4_000_000) for seed in range(3)]
    found += [_ranks("predictions", seed, False, [94.0 + seed, 97.0 + seed], 20_000) for seed in range(3)]
    found += [_ranks("predictions", seed, True, [95.5 + seed, 96.5 + seed], 20_000) for seed in range(3)]
    found += [_ranks("alone", seed, False, [95.0, 95.0], 0) for seed in range(3)]
    summary = script.summarize(found)
    ddp, unchanged, falling, alone = summary
    assert ddp["replicas"] == (97.0, 1.0) and ddp["points_to_ddp"] == 0.0
    assert unchanged["first_replica"] == (95.0, 1.0) and unchanged["replicas"] == (96.5, 1.0)
    assert (unchanged["points_to_ddp"], unchanged["times_fewer_bytes"]) == (-0.5, 200.0)
    assert falling["points_to_ddp"] == 0.0 and falling["mean_of_predictions"] == (97.0, 0.0)
    assert (alone["points_to_ddp"], alone["times_fewer_bytes"]) == (-2.0, None)
    lines = "\n".join(script.verdict(summary))
    assert "predictions, 0.01 unchanged: within 1 point of DDP (-0.50)" in lines
    assert "alone, 0.01 unchanged: NOT within 1 point of DDP (-2.00)" in lines
    assert "predictions, weight decay 0.01: falling changes +0.50" in lines
    cells = "0.01 unchanged|predictions|95.00 ± 1.00|96.50 ± 1.00|97.00 ± 0.00|-0.50|0.02|200|2.0".split("|")
    row = script.as_table(summary).splitlines()[3]
    assert [cell.strip() for cell in row.strip("|").split("|")] == cells


@pytest.mark.slow
@pytest.mark.distributed
def test_a_small_comparison_has_all_rows_and_the_computed_bytes(script, tmp_path, monkeypatch):
    multiprocessing.set_forkserver_preload(PRELOADED)
    settings = "--steps 60 --seeds 1 --batch_size 16 --hidden_size 24 --exchange_every 8 --weight_decays 0.01"
    forkserver = partial(torch.multiprocessing.start_processes, start_method="forkserver")  # imports once
    monkeypatch.setattr(torch.multiprocessing, "spawn", forkserver)
    monkeypatch.setattr(sys, "argv", ["compare_codistillation.py", "--output", str(tmp_path), *settings.split()])
    script.main()
    results = json.loads((tmp_path / "results.json").read_text())
    found = {(row["method"], row["falling"]): row for row in results["summary"]}
    assert [*found] == [
        (method, falling) for method in ("ddp", "alone", "predictions", "checkpoints") for falling in (False, True)
    ]
    payload = 4 * (64 * 24 + 24 + 24 * 24 + 24 + 24 * 10 + 10)
    expected = {
        "ddp": 60 * payload,  # a ring of two sends the model once a step
        "alone": 0,
        "predictions": 60 * (8 * 10 * 4 + 16),  # and a digest of the batch
        "checkpoints": 60 // 8 * payload,
    }
    assert {key: row["bytes_sent"] for key, row in found.items()} == {key: expected[key[0]] for key in found}
    assert all(row["replicas"][0] > 50.0 for row in found.values())  # by chance 10
    # DDP's ranks hold one model, replicas do not: each began elsewhere.
    by_method = {method: [] for method in script.METHODS}
    for ranks in results["runs"]:
        by_method[ranks[0]["method"]].append(len({row["accuracy"] for row in ranks}))
    assert by_method.pop("ddp") == [1, 1]
    assert any(count > 1 for counts in by_method.values() for count in counts)
    assert len((tmp_path / "table.md").read_text().split("\n\n")[1].splitlines()) == 2 + len(found)
    assert (tmp_path / "plot.png").stat().st_size > 5000
