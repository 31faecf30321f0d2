"""Pretraining that pushes, evaluation and publishing by the scripts, against a Hub on this machine."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load
from tiny import tiny_model
from transformers import AutoModelForImageClassification, ViTMSNModel

from hf_msn import (
    LowShotEvaluator,
    MSNForPreTraining,
    PublishingError,
    evaluation_image_processor,
    load_images,
    publish_checkpoint,
)

ROOT = Path(__file__).parents[2]
TINY = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --projection_hidden_dim 32 "
    "--projection_dim 16 --num_prototypes 16 --image_size 8 --patch_size 4 --focal_views 1 --focal_size 4 "
    "--per_device_train_batch_size 64 --max_steps 4 --save_steps 2 --warmup_epochs 0.01 --logging_steps 1 "
    "--use_cpu true --disable_tqdm true --report_to none"
).split()
RUN = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "run.json"]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def home(tmp_path) -> Path:
    """The home of a user whose name must not be published."""
    (tmp_path / "home" / "alice_smith").mkdir(parents=True)
    return tmp_path / "home" / "alice_smith"


@pytest.fixture
def run(hub, home, monkeypatch, capsys):
    """Run a script in this process, and return what it printed."""
    hub.use_in_this_process(monkeypatch, home)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def nothing_private(hub, home) -> None:
    sent = hub.sent_bytes()
    for secret in (TOKEN, "alice_smith", str(home), str(home.parent), str(ROOT)):
        assert secret.encode() not in sent, secret


@pytest.mark.slow
def test_from_pretraining_that_pushes_to_a_card_with_measured_numbers(run, hub, home, monkeypatch):
    pushes = "--push_to_hub true --hub_model_id alice/digits --hub_strategy every_save --hub_always_push true"
    measures = "--low_shot_every_epochs 1 --low_shot_test_split test --low_shot_images_per_class 1 --crop_fraction 1"
    run("pretrain.py", "--output_dir", home / "runs/mine", *TINY, *pushes.split(), *measures.split())
    messages = ["Training in progress, checkpoint-2", "Training in progress, checkpoint-4", "Model save"]
    assert hub.repos["alice/digits"].messages[1:] == messages
    files = hub.files("alice/digits")
    assert sorted(files) == [".eval_results/hf_msn.yaml", *RUN]  # of the evaluation at the end of training
    assert "low-shot" in files["README.md"].decode().lower()
    model = MSNForPreTraining.from_pretrained(home / "runs/mine")
    assert torch.equal(load(files["model.safetensors"])["prototypes"], model.prototypes)
    nothing_private(hub, home)

    data = {split: load_images("digits", split=split) for split in ("train", "test")}
    processor = {"image_processor": evaluation_image_processor(8)}
    evaluator = LowShotEvaluator(*data.values(), images_per_class=[1], num_splits=2, **processor)
    evaluator(model)
    evaluator.results.save(home / "low_shot.json")
    publication = "--repo_id alice/encoder --private true --tags digits".split()
    publication += ["--checkpoint", home / "runs/mine", "--results", home / "low_shot.json"]
    asked = len(hub.requests)
    monkeypatch.delenv("HF_TOKEN")
    dry = run("publish.py", *publication, "--dry_run", "true")
    assert len(hub.requests) == asked and "Dry run: nothing was sent." in dry
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = run("publish.py", *publication, "--revision", "v1")
    files = hub.files("alice/encoder", "v1")
    assert sorted(files) == [".eval_results/hf_msn.yaml", *RUN] and hub.files("alice/encoder") == {}
    assert all(path in dry and path in done for path in files) and TOKEN not in dry + done
    assert hub.repos["alice/encoder"].private and "Published: http://" in done
    card, measured = ModelCard(files["README.md"].decode()), json.loads((home / "low_shot.json").read_text())
    assert "digits" in card.data.tags and "alice/encoder" in card.text
    value = measured["metrics"]["low_shot/1_per_class/top1"]
    assert f"{value:.1f}" in card.text
    assert any(abs(entry["value"] - value) < 0.1 for entry in yaml.safe_load(files[".eval_results/hf_msn.yaml"]))
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["architectures"]) == ("vit_msn", ["ViTMSNModel"])
    nothing_private(hub, home)

    loaded = ViTMSNModel.from_pretrained("alice/encoder", revision="v1").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.target_encoder.state_dict().items())

    # Numbers of other weights do not get onto a card.
    tiny_model().save_pretrained(home / "other")
    with pytest.raises(ValueError, match="weights"):
        publish_checkpoint(home / "other", "alice/other", results=[home / "low_shot.json"], dry_run=True)


@pytest.mark.slow
def test_a_fine_tuned_classifier_is_pushed_with_what_its_test_measured(run, hub, home, monkeypatch):
    tiny = "--hidden_size 32 --num_hidden_layers 2 --intermediate_size 64 --patch_size 4 --num_train_epochs 1"
    recipe = ["--config", ROOT / "scripts" / "recipes" / "finetune_digits.yaml", *tiny.split()]
    pushed = ["--push_to_hub", "true", "--hub_model_id", "alice/tuned", "--hub_private_repo", "true"]
    rest = ["--test_split", "test[:80]", "--disable_tqdm", "true", "--output_dir", home / "tuned"]
    run("finetune.py", *recipe, *pushed, *rest)
    files = hub.files("alice/tuned")
    assert hub.repos["alice/tuned"].private
    assert sorted(files) == [".eval_results/hf_msn.yaml", "README.md", "config.json", "finetune.json", *RUN[2:]]
    record = json.loads(files["finetune.json"])
    assert f"{record['test_accuracy']['top1']:.1f}" in files["README.md"].decode()
    assert AutoModelForImageClassification.from_pretrained("alice/tuned").config.num_labels == 10
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishingError, match="HF_TOKEN"):
        run("finetune.py", *recipe, *pushed, *rest[:-1], home / "another")
    assert not (home / "another").exists()  # an error before any training
