"""The notebooks of docs/notebooks/ run from the first to the last cell. Outputs are not kept: they would age."""

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hub_server import HubServer
from launch import run_ranks
from torch.distributed.run import get_args_parser

pytestmark = pytest.mark.slow
NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(name)` runs a notebook in this process, which saves the imports of a kernel, and returns its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(name, steps=None):
        notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] for cell in cells)
        variables = {}
        for number, cell in enumerate(cells):
            source = "".join(cell["source"]).replace("--report_to none", "--report_to none --use_cpu true")
            if steps is not None:
                source = source.replace(steps[0], steps[1])
            exec(compile(source, f"{name}, cell {number}", "exec"), variables)
        return variables

    return run


def test_msn_on_a_folder_is_better_than_the_untrained_network(run):
    found = run("msn_on_a_folder", steps=("--max_steps 200", "--max_steps 60"))
    assert found["features"].shape == (1, 64)
    metrics = found["metrics"]
    assert metrics["low_shot/5_per_class/top1"] > metrics["low_shot/5_per_class/untrained_top1"] + 3


def test_paws_with_50_labels_learns_the_classes(run):
    scores = list(run("paws_with_50_labels", steps=("steps = 250", "steps = 60"))["scores"].values())
    assert scores[0] > 45 and scores[2] > 75


def run_script(rank, script, arguments) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def torchrun(command, **options) -> subprocess.CompletedProcess:
    """Run a command line of torchrun on `run_ranks`, whose ranks need no imports."""
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    given = get_args_parser().parse_args(command[3:])
    run_ranks(run_script, int(given.nproc_per_node), given.training_script, given.training_script_args, timeout=200.0)
    return subprocess.CompletedProcess(command, 0, stdout="")


@pytest.mark.distributed
def test_slowmo_on_two_processes_learns_the_digits(run, monkeypatch):
    monkeypatch.setattr(subprocess, "run", torchrun)
    result = run("slowmo_two_processes")["result"]
    assert result["processes"] == 2 and result["accuracy"] > 0.8


def test_what_is_published_is_what_is_loaded(run, tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.use_in_this_process(monkeypatch, tmp_path)
        found = run("publish_and_load")
        weights = found["trainer"].model.target_encoder.state_dict()
        for name, value in found["encoder"].state_dict().items():
            assert value.equal(weights[name]), name
        assert hub.repos["alice/msn-digits-notebook"].private
        assert "README.md" in hub.files("alice/msn-digits-notebook")
