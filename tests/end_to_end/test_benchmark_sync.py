"""scripts/benchmark_sync.py and the slow network that it builds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
ROOT_ON_LINUX = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_sync

    return benchmark_sync


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["ddp", "fedavg"]}, "fedavg is not"),
        ({"methods": ["slowmo"]}, "must have ddp"),
        ({"ranks": [1]}, "`ranks` must be >= 2"),
        ({"waiting": 1.0}, "in \\(0, 1\\), but is 1.0"),
        ({"straggler": 0.5}, "`straggler` >= 1"),
    ],
)
def test_bad_arguments_are_errors(script, arguments, message):
    with pytest.raises(ValueError, match=message):
        script.BenchmarkArguments(**arguments)


def _row(method, rank, repeat, speed, reached):
    return {
        "ranks": 2,
        "hidden_size": 8,
        "method": method,
        "rank": rank,
        "repeat": repeat,
        "steps_per_second": speed,
        "seconds_to_loss": reached,
        "bytes_per_step": 2e6,
        "model_bytes": 4_000_000,
        "seconds_waiting_per_step": 0.01,
        "compute_seconds": 0.1,
    }


def test_ratios_are_of_the_same_run_and_leave_the_slowest_rank_out(script):
    rows = [_row("ddp", rank, repeat, 2.0 + repeat, 5.0) for rank in range(2) for repeat in range(3)]
    rows += [_row("slowmo", 0, repeat, 6.0 + 3 * repeat, 1.0 + repeat) for repeat in range(3)]
    rows += [_row("slowmo", 1, repeat, 1.0, None if repeat == 2 else 2.0) for repeat in range(3)]
    ddp, slowmo = script.summarize(rows)
    assert (ddp["times_ddp"], ddp["steps_per_second"], ddp["seconds_to_loss"]) == (1.0, 3.0, 5.0)
    assert slowmo["times_ddp"] == 3.0 and slowmo["times_ddp_range"] == (3.0, 3.0)
    assert (slowmo["steps_per_second"], slowmo["slowest_rank"], slowmo["megabytes_per_step"]) == (9.0, 1.0, 2.0)
    assert slowmo["seconds_to_loss"] is None  # not every run of every rank came there
    assert "| 2 | 4.0 MB | slowmo | 9.00 | 1.00 | 3.00 (3.00-3.00) | 2.00 | - |" in script.as_table([ddp, slowmo])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "rate",
    [None, pytest.param("200mbit", marks=pytest.mark.skipif(not ROOT_ON_LINUX, reason="needs root, ip and tc"))],
)
def test_two_ranks_make_a_table_and_a_plot(tmp_path, rate):
    command = [sys.executable, str(SCRIPTS / "benchmark_sync.py"), "--methods", "none", "ddp", "local_sgd", "sgp"]
    command += "--ranks 2 --hidden_sizes 96 --compute_ms 1 --steps 12 --warmup_steps 0 --repeats 1".split()
    command += ["--output", str(tmp_path), *(["--rate", rate] if rate else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if rate and "could not be built" in done.stderr:
        pytest.skip(done.stderr[-500:])
    assert done.returncode == 0, done.stderr[-4000:]
    found = {row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())["summary"]}
    payload = 4 * (64 * 96 + 96 + 2 * (96 * 96 + 96) + 96 * 10 + 10)
    megabytes = {name: row["megabytes_per_step"] for name, row in found.items()}
    # A ring of two sends the model once; Local SGD in one of twelve steps; SGP one share to one peer.
    expected = {"none": 0.0, "ddp": payload / 1e6, "local_sgd": payload / 12e6, "sgp": payload / 1e6}
    assert megabytes == pytest.approx(expected, rel=1e-6)
    assert "| 2 | 0.1 MB | sgp |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_slow_network_without_root_says_what_it_needs(script, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    with pytest.raises(RuntimeError, match=r"needs root on Linux .* Leave `--rate` out"):
        script.SlowNetwork(2, "200mbit").__enter__()


@pytest.mark.skipif(not ROOT_ON_LINUX, reason="needs root, ip and tc")
def test_a_rate_that_tc_does_not_know_leaves_no_namespace(script):
    network = script.SlowNetwork(2, "fast")
    with pytest.raises(RuntimeError, match="could not be built"):
        network.__enter__()
    present = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(namespace in present for namespace in network.namespaces)
