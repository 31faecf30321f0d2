"""Pretraining that pushes, evaluation and publishing as a user starts them, against a Hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load
from tiny import tiny_model
from transformers import ViTMSNModel

from hf_msn import (
    LowShotEvaluator,
    MSNForPreTraining,
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
    """The home of a user whose name is not to be told."""
    (tmp_path / "home" / "alice_smith").mkdir(parents=True)
    return tmp_path / "home" / "alice_smith"


def start(script, hub, home, *arguments, token: str | None = TOKEN, status: int | None = 0):
    environment = {**os.environ, **hub.environment(home, token), "HOME": str(home), "USER": "alice_smith"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert status is None or done.returncode == status, done.stderr[-4000:]
    assert TOKEN not in done.stdout + done.stderr
    return done


def nothing_private(hub, home) -> None:
    sent = hub.sent_bytes()
    for secret in (TOKEN, "alice_smith", str(home), str(home.parent), str(ROOT)):
        assert secret.encode() not in sent, secret


def test_from_pretraining_that_pushes_to_a_card_with_measured_numbers(hub, home):
    pushes = "--push_to_hub true --hub_model_id alice/digits --hub_strategy every_save --hub_always_push true"
    measures = "--low_shot_every_epochs 1 --low_shot_test_split test --low_shot_images_per_class 1 --crop_fraction 1"
    start("pretrain.py", hub, home, "--output_dir", "runs/mine", *TINY, *pushes.split(), *measures.split())
    messages = ["Training in progress, checkpoint-2", "Training in progress, checkpoint-4", "Model save"]
    assert hub.repos["alice/digits"].messages[1:] == messages
    files = hub.files("alice/digits")
    assert sorted(files) == [".eval_results/hf_msn.yaml", *RUN]  # of the evaluation at the end of training
    assert "low-shot" in files["README.md"].decode().lower()
    pushed, saved = (
        load(files["model.safetensors"]),
        MSNForPreTraining.from_pretrained(home / "runs/mine").state_dict(),
    )
    assert torch.equal(pushed["prototypes"], saved["prototypes"])
    nothing_private(hub, home)

    model = MSNForPreTraining.from_pretrained(home / "runs/mine")
    data = {split: load_images("digits", split=split) for split in ("train", "test")}
    evaluator = LowShotEvaluator(*data.values(), evaluation_image_processor(8), images_per_class=[1], num_splits=2)
    evaluator(model)
    evaluator.results.save(home / "low_shot.json")
    publication = "--checkpoint runs/mine --repo_id alice/encoder --results low_shot.json --private true --tags digits"
    dry = start("publish.py", hub, home, *publication.split(), "--dry_run", "true", token=None)
    assert "alice/encoder" not in hub.repos and "Dry run: nothing was sent." in dry.stdout
    done = start("publish.py", hub, home, *publication.split(), "--revision", "v1")
    files = hub.files("alice/encoder", "v1")
    assert sorted(files) == [".eval_results/hf_msn.yaml", *RUN] and hub.files("alice/encoder") == {}
    for path in files:
        assert path in dry.stdout and path in done.stdout
    assert hub.repos["alice/encoder"].private and "Published: http://" in done.stdout
    card, measured = ModelCard(files["README.md"].decode()), json.loads((home / "low_shot.json").read_text())
    assert "digits" in card.data.tags and "alice/encoder" in card.text
    value = measured["metrics"]["low_shot/1_per_class/top1"]
    assert f"{value:.1f}" in card.text
    assert any(abs(entry["value"] - value) < 0.1 for entry in yaml.safe_load(files[".eval_results/hf_msn.yaml"]))
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["architectures"]) == ("vit_msn", ["ViTMSNModel"])
    nothing_private(hub, home)

    encoder = model.target_encoder.state_dict()
    for name, value in files.items():
        path = home / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    loaded = ViTMSNModel.from_pretrained(home / "downloaded").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.items())

    # Numbers of other weights do not get onto a card.
    tiny_model().save_pretrained(home / "other")
    with pytest.raises(ValueError, match="weights"):
        publish_checkpoint(home / "other", "alice/other", results=[home / "low_shot.json"], dry_run=True)


def test_wrong_use_ends_with_one_line_that_says_what_to_do(hub, home):
    tiny_model().save_pretrained(home / "run")
    named = ["--checkpoint", "run", "--repo_id", "alice/tiny"]
    done = start("publish.py", hub, home, *named, "--without_results", token=None, status=1)
    assert "There is no token, which publishing needs. Log in by `hf auth login`" in done.stderr.splitlines()[-1]
    assert hub.repos == {}
    start("publish.py", hub, home, *named, "--without-results")
    assert sorted(hub.files("alice/tiny")) == ["README.md", "config.json", "model.safetensors"]
