"""`hf-msn evaluate`, in this process and on two ranks."""

import json
from functools import partial, wraps

import pytest
import torch
from launch import run_ranks
from pretrain_runs import command_on_rank
from transformers import ViTMSNConfig, ViTMSNModel

from hf_msn.data.sources import load_images
from hf_msn.data.transforms import evaluation_image_processor
from hf_msn.models.configuration_msn import MSNConfig
from hf_msn.models.modeling_msn import MSNForPreTraining

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL |= {"image_size": 8, "patch_size": 2}


@pytest.fixture
def run(command):
    return partial(command, "evaluate")


@pytest.fixture(scope="module")
def msn_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("msn")
    torch.manual_seed(0)
    MSNForPreTraining(MSNConfig(**SMALL)).save_pretrained(folder)
    evaluation_image_processor(8, crop_fraction=1.0).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_a_table_and_a_file_are_written_on_two_ranks_as_on_one(run, msn_folder, tmp_path):
    arguments = ["--model", str(msn_folder), *"--images_per_class 1 5 --fractions 0.02".split()]
    with_baselines = run(*arguments[:4], "--num_splits", 1).splitlines()
    assert [line.split("  ")[0 if line[0] != " " else 1] for line in with_baselines[2:]] == [
        *("1 per class", "nearest neighbours", "untrained network", "raw pixels")
    ]
    arguments += ["--baselines", "none"]
    one = run(*arguments, "--output", tmp_path / "1.json")
    lines = [line for line in one.splitlines() if line.strip()]
    assert [line[:11].strip() for line in lines] == ["task", "-----------", "1 per class", "5 per class", "2 percent"]
    printed = run_ranks(command_on_rank, 2, "evaluate", *arguments, "--output", str(tmp_path / "2.json"))
    assert printed == [one, ""]  # rank 1 works for rank 0, not for itself
    saved = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2)]
    assert saved[1]["metrics"] == pytest.approx(saved[0]["metrics"])
    assert saved[0]["primary_metric"] == "low_shot/5_per_class/top1"
    assert f"{saved[0]['metrics']['low_shot/5_per_class/top1']:.1f}" in lines[3]
    assert saved[0]["metrics"]["low_shot/1_per_class/num_splits"] == 3


def test_a_plain_transformers_folder_and_another_probe(run, tmp_path):
    ViTMSNModel(ViTMSNConfig(**SMALL)).save_pretrained(tmp_path)
    output = tmp_path / "out.json"
    settings = "--image_size 8 --probe knn --neighbors 3 --num_splits 1".split()
    run("--model", tmp_path, *settings, "--output", output, "--report", tmp_path / "report.html")
    saved = json.loads(output.read_text())
    assert f"{saved['metrics']['low_shot/5_per_class/top1']:.1f}" in (tmp_path / "report.html").read_text()
    assert saved["probe"]["k"] == 3
    assert [task["name"] for task in saved["tasks"]] == ["1_per_class", "2_per_class", "5_per_class"]
    with pytest.raises(ValueError, match=r"`neighbors` .*0"):
        run("--model", tmp_path, "--image_size", 8, "--probe", "knn", "--neighbors", 0)


def test_the_revision_of_the_data_goes_to_both_splits(run, msn_folder, monkeypatch):
    asked = []

    @wraps(load_images)  # the parser reads its signature
    def load(source, *, split, revision, **columns):
        asked.append((split, revision))
        return load_images(source, split=split, **columns)

    monkeypatch.setattr("hf_msn.cli.evaluate.load_images", load)
    run("--model", msn_folder, "--images_per_class", 1, "--num_splits", 1, "--dataset_revision", "v2")
    assert asked == [("train", "v2"), ("test", "v2")]


def test_the_output_is_checked_before_the_model_is_loaded_and_an_existing_one_is_kept(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path, tmp_path / "file" / "r.json"):
        for flag in ("output", "report"):
            with pytest.raises(ValueError, match=f"`{flag}` .*'{output}'"):
                run("--model", "/no/such/model", f"--{flag}", output)
    with pytest.raises(ValueError, match="/no/such/model"):
        run("--model", "/no/such/model", "--output", tmp_path / "file", "--report", tmp_path / "new.html")
    with pytest.raises(ValueError, match=r"`report` and `output` .*'same'"):
        run("--model", "/no/such/model", "--output", "same", "--report", "same")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "in the way")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probe", "knn", "--l2", 0.1], "`l2` .*'logistic'.* is 'knn'"),
        (["--neighbors", 3], "`neighbors` .*'knn'.* is 'logistic'"),
    ],
)
def test_an_option_of_another_probe_is_refused(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("--model", "/no/such/model", *arguments)
