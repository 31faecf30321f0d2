"""What a card is written to: whole or not at all, with its figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from card_runs import table
from huggingface_hub import ModelCard
from PIL import Image

from hf_msn import (
    plot_low_shot,
    save_model_card,
)

ROOT = Path(__file__).parents[2]


def test_figures_are_copied_beside_the_card_and_shown(made, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "my figure (1).png")
    out = tmp_path / "out"
    written = save_model_card(
        made["checkpoint"], made["results"], output=out, figures=[tmp_path / "my figure (1).png"], plot=True
    )
    names = ["figures/low_shot.png", "figures/my-figure-1.png", ".eval_results/hf_msn.yaml", "README.md"]
    assert [str(path.relative_to(out)) for path in written] == names
    shown = re.findall(r"!\[[^\]]*\]\((.*?)\)", (out / "README.md").read_text())
    assert shown == names[:2] and all(Image.open(out / name).size[0] >= 4 for name in shown)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(names)


def test_the_plot_is_the_same_each_time_and_needs_matplotlib(made, tmp_path, monkeypatch):
    first, second = (plot_low_shot(made["results"], tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_msn\[demo\]'"):
        save_model_card(made["checkpoint"], made["results"], output=tmp_path / "out", plot=True)
    assert not (tmp_path / "out").exists()


def test_a_card_of_someone_else_is_not_lost(made, tmp_path):
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.raises(ValueError, match="was not made by hf_msn"):
        save_model_card(made["checkpoint"], made["results"], output=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    save_model_card(made["checkpoint"], made["results"], output=tmp_path, overwrite=True)
    save_model_card(made["checkpoint"], made["results"], output=tmp_path)  # its own is replaced
    assert (tmp_path / "README.md").read_text().startswith("---")


def test_a_call_that_is_killed_leaves_the_card_as_it_was(made, tmp_path, monkeypatch):
    save_model_card(made["checkpoint"], made["results"], output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def die(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelCard, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_model_card(made["checkpoint"], output=tmp_path, without_results=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_script_writes_the_card_here(made, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "make_model_card.py"), "--checkpoint", str(made["export"])]
    command += ["--results", str(made["results"]), "--output", str(tmp_path), "--name", "tiny", "--license", "mit"]
    said = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout
    assert said.split() == [str(tmp_path / ".eval_results" / "hf_msn.yaml"), str(tmp_path / "README.md")]
    assert ModelCard.load(tmp_path / "README.md").data.model_name == "tiny"


def test_the_finished_card_has_the_numbers_of_the_results_beside_it():
    folder = ROOT / "model_cards" / "msn-vit-digits"
    said = json.loads((folder / "low_shot.json").read_text())
    card = ModelCard.load(folder / "README.md")
    rows = table(card, "labelled images")
    for row, task in zip(rows, said["tasks"]):
        top1 = [split["top1"] for split in task["splits"]]
        assert row[1] == f"{np.mean(top1):.1f} ± {np.std(top1, ddof=1):.1f}"
    assert len(rows) == 4 and said["model"]["weights_sha256"] in card.text
    assert [one.metric_value for one in card.data.eval_results][::2] == [
        task["summary"]["top1"] for task in said["tasks"]
    ]
    entries = yaml.safe_load((folder / ".eval_results" / "hf_msn.yaml").read_text())
    assert [entry["value"] for entry in entries] == [task["summary"]["top1"] for task in said["tasks"]]
    shown = re.findall(r"!\[[^\]]*\]\((.*?)\)", card.text)
    assert shown and all((folder / name).is_file() for name in shown)
