"""The notebooks of docs/notebooks/ run from the first to the last cell. Outputs are not kept: they would age."""

from pathlib import Path

import pytest
from hub_server import HubServer

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


@pytest.fixture
def run(tmp_path):
    """`run(name, expression)` runs a notebook in a kernel of its own and returns the value at its end."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")

    def run(name, expression, replace=(), **environment):
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
        for old, new in replace:
            (cell,) = (cell for cell in notebook.cells if old in cell.source)
            cell.source = cell.source.replace(old, new)
        notebook.cells.append(nbformat.v4.new_code_cell(f"print({expression})"))
        environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", **environment}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
        return eval(notebook.cells[-1].outputs[-1].text)

    return run


@pytest.mark.slow
def test_msn_on_a_folder_is_better_than_the_untrained_network(run):
    metrics, shape = run("msn_on_a_folder", "(metrics, tuple(features.shape))")
    assert shape == (1, 64)
    assert metrics["low_shot/5_per_class/top1"] > metrics["low_shot/5_per_class/untrained_top1"] + 5


@pytest.mark.slow
def test_paws_with_50_labels_learns_the_classes(run):
    scores = run("paws_with_50_labels", "list(scores.values())", replace=[("steps = 250", "steps = 60")])
    assert scores[0] > 45 and scores[2] > 75


@pytest.mark.slow
@pytest.mark.distributed
def test_slowmo_on_two_processes_learns_the_digits(run):
    result = run("slowmo_two_processes", "result")
    assert result["processes"] == 2 and result["accuracy"] > 0.8


@pytest.mark.slow
def test_what_is_published_is_what_is_loaded(run, tmp_path):
    with HubServer() as hub:
        same = "all((value == trainer.model.target_encoder.state_dict()[name]).all().item() for name, value in "
        assert run("publish_and_load", same + "encoder.state_dict().items())", **hub.environment(tmp_path))
        files = hub.files("alice/msn-digits-notebook")
        assert hub.repos["alice/msn-digits-notebook"].private and "README.md" in files
