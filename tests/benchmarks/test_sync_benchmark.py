"""scripts/benchmarks/sync.py and the slow network that it builds."""

import json
import os
import shutil
import subprocess

import pytest
import sync

ROOT_ON_LINUX = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")


def _row(method, rank, repeat, speed, reached):
    return {
        **{"ranks": 2, "hidden_size": 8, "method": method, "rank": rank, "repeat": repeat},
        **{"steps_per_second": speed, "seconds_to_loss": reached, "model_bytes": 4_000_000},
        **{"bytes_per_step": 2e6, "peak_bytes": 3e6},
        **{"seconds_waiting_per_step": 0.01, "seconds_in_sync_per_step": 0.03, "compute_seconds": 0.1},
    }


def test_ratios_are_of_the_same_run_and_leave_the_slowest_rank_out():
    rows = [_row("ddp", rank, repeat, 2.0 + repeat, 5.0) for rank in range(2) for repeat in range(3)]
    rows += [_row("slowmo", 0, repeat, 6.0 + 3 * repeat, 1.0 + repeat) for repeat in range(3)]
    rows += [_row("slowmo", 1, repeat, 1.0, None if repeat == 2 else 2.0) for repeat in range(3)]
    ddp, slowmo = sync.summarize_runs(rows)
    assert (ddp["times_ddp"]["median"], ddp["steps_per_second"]["median"], ddp["seconds_to_loss"]) == (1.0, 3.0, 5.0)
    assert slowmo["times_ddp"]["range"] == [3.0, 3.0] and slowmo["own_ms_per_step"] == pytest.approx(20)
    assert slowmo["steps_per_second"]["median"] == 9.0
    assert (slowmo["slowest_rank"], slowmo["megabytes_per_step"]) == (1.0, 2.0)
    assert slowmo["seconds_to_loss"] is None  # not every run of every rank came there
    assert "3.00 (3.00 - 3.00) | 2.00             | 3.00" in sync.as_table([ddp, slowmo])


@pytest.mark.parametrize("arguments", [{"methods": ["sgp"]}, {"ranks": [1]}, {"steps": 0}, {"repeats": 0}])
def test_arguments_outside_of_their_rule_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sync.BenchmarkArguments(**arguments)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_make_a_table_and_a_picture(run, tmp_path):
    output = tmp_path / "sync.json"
    command = "--methods none ddp local_sgd sgp --ranks 2 --hidden_sizes 96 --compute_ms 1 --steps 12 --warmup_steps 0"
    printed = run(
        sync, *command.split(), "--repeats", 1, "--output", output, *(["--rate", "200mbit"] if ROOT_ON_LINUX else [])
    )
    found = {row["method"]: row for row in json.loads(output.read_text())["summary"]}
    payload = 4 * (64 * 96 + 96 + 2 * (96 * 96 + 96) + 96 * 10 + 10)
    megabytes = {name: row["megabytes_per_step"] for name, row in found.items()}
    # A ring of two sends the model once; Local SGD in one of twelve steps; SGP one share to one peer.
    expected = {"none": 0.0, "ddp": payload / 1e6, "local_sgd": payload / 12e6, "sgp": payload / 1e6}
    assert megabytes == pytest.approx(expected, rel=1e-6)
    assert found["local_sgd"]["megabytes_peak"] == pytest.approx(payload / 1e6)
    assert "| sgp " in printed and output.with_suffix(".png").stat().st_size > 5000


def test_a_slow_network_without_root_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    with pytest.raises(RuntimeError, match="--rate"):
        sync.SlowNetwork(2, "200mbit").__enter__()


@pytest.mark.skipif(not ROOT_ON_LINUX, reason="needs root, ip and tc")
def test_a_rate_that_tc_does_not_know_leaves_no_namespace():
    network = sync.SlowNetwork(2, "fast")
    with pytest.raises(RuntimeError, match="could not be built"):
        network.__enter__()
    present = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(namespace in present for namespace in network.namespaces)
