import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from transformers import ViTMSNConfig, ViTMSNModel

from hf_msn.data import evaluation_image_processor
from hf_msn.models import MSNConfig, MSNForPreTraining

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_low_shot.py"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 2,
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script in this process, which saves importing everything again; returns what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def msn_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("msn")
    torch.manual_seed(0)
    MSNForPreTraining(MSNConfig(**SMALL)).save_pretrained(folder)
    evaluation_image_processor(8, crop_fraction=1.0).save_pretrained(folder)
    return folder


def test_the_script_prints_a_table_and_writes_json(run, msn_folder, tmp_path):
    printed = run(
        "--model", msn_folder, "--images_per_class", 1, 5, "--fractions", 0.02, "--output", tmp_path / "r.json"
    )
    lines = [line for line in printed.splitlines() if line.strip()]
    assert [line[:11].strip() for line in lines] == ["task", "-----------", "1 per class", "5 per class", "2 percent"]
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["primary_metric"] == "low_shot/5_per_class/top1"
    assert saved["model"]["class"] == "MSNForPreTraining"
    assert f"{saved['metrics']['low_shot/5_per_class/top1']:.1f}" in lines[3]
    assert saved["metrics"]["low_shot/1_per_class/num_splits"] == 3


@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_two_processes_print_and_write_what_one_does(run, msn_folder, tmp_path):
    arguments = ["--model", msn_folder, "--images_per_class", 2]
    one = run(*arguments, "--output", tmp_path / "1.json")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    launch = "--cpu --num_processes 2 --mixed_precision no --num_machines 1 --dynamo_backend no --main_process_port 0"
    done = subprocess.run(
        [*accelerate, *launch.split(), SCRIPT, *map(str, arguments), "--output", tmp_path / "2.json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-3:] == one.splitlines()[-3:]
    saved = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2)]
    assert saved[1]["metrics"] == pytest.approx(saved[0]["metrics"])


def test_a_plain_transformers_folder_and_another_probe(run, tmp_path):
    ViTMSNModel(ViTMSNConfig(**SMALL)).save_pretrained(tmp_path)
    output = tmp_path / "out.json"
    run(
        "--model",
        tmp_path,
        "--image_size",
        8,
        "--probe",
        "knn",
        "--neighbors",
        3,
        "--num_splits",
        1,
        "--output",
        output,
    )
    saved = json.loads(output.read_text())
    assert saved["probe"]["k"] == 3
    assert [task["name"] for task in saved["tasks"]] == ["1_per_class", "2_per_class", "5_per_class"]


def test_a_timm_architecture_with_a_local_weights_file(run, tmp_path):
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    output = tmp_path / "out.json"
    arguments = ["--model", "timm:test_vit", "--checkpoint", tmp_path / "weights.pth", "--images_per_class", 1]
    run(*arguments, "--test_split", "test[:20]", "--output", output)
    assert json.loads(output.read_text())["data"]["test"]["num_images"] == 20


def test_a_model_without_image_processor_fails_with_the_remedy(run, tmp_path):
    ViTMSNModel(ViTMSNConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Pass `image_processor=`"):
        run("--model", tmp_path)


def test_help_explains_the_tasks(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "0.01 is 1 percent" in printed and "1 2 5 if no other task is given" in printed
