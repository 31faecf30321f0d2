"""Checkpoint folders as training leaves them, and a Hub on this machine."""

import json
from pathlib import Path

import pytest
import torch
from card_runs import measure, msn, save
from finetuning_runs import PROCESSOR, VIEWS, classifier_arguments
from hub_server import TOKEN, HubServer
from tiny import tiny_model

from hf_msn import (
    draw_labelled_rows,
    evaluation_image_processor,
    export_backbone,
    finetune_classifier,
    load_images,
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, logged in as alice."""
    with HubServer() as server:
        server.use_in_this_process(monkeypatch, tmp_path / "home")
        yield server


def _save_run(folder: Path, shards: bool = False) -> Path:
    """The `output_dir` of a pretraining run, with all that does not belong on the Hub."""
    model = tiny_model().eval()
    model.save_pretrained(folder, **({"max_shard_size": "30KB"} if shards else {}))
    evaluation_image_processor(16).save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sync_state_0.pt"):
        torch.save({"hub_token": TOKEN, "path": str(folder.absolute())}, folder / name)
    for name in (".hidden", ".env", "notes.txt", "modeling_other.py", "low_shot.json", "labelled_images.json"):
        (folder / name).write_text(TOKEN)
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(folder / "checkpoint-1")}))
    for name in ("logs/events.out.tfevents.1.alice-laptop", "checkpoint-1/config.json", "figures/old.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TOKEN)
    return folder


@pytest.fixture
def save_run():
    """`save_run(folder, shards=False)` writes the `output_dir` of a pretraining run."""
    return _save_run


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "home" / "alice").mkdir(parents=True)
    return _save_run(tmp_path / "home" / "alice" / "run")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A checkpoint, its export, results of it, and another checkpoint with results."""
    folder = tmp_path_factory.mktemp("made")
    model, other = msn(), msn(seed=1)
    export_backbone(model, folder / "export", image_processor=PROCESSOR)
    return {
        "processor": PROCESSOR,
        "checkpoint": save(model, folder / "tiny"),
        "export": folder / "export",
        "other": save(other, folder / "other"),
        "results": measure(model, folder / "low_shot.json"),
        "foreign": measure(other, folder / "foreign.json"),
        "projection": measure(model, folder / "projection.json", features="projection"),
    }


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """A classifier, fine-tuned for 3 epochs and tested on 60 digits."""
    folder = tmp_path_factory.mktemp("tuned")
    dataset = load_images("digits")
    rows = draw_labelled_rows(dataset, images_per_class=3, seed=0)
    args = classifier_arguments(folder, num_train_epochs=3)
    result = finetune_classifier(msn(), dataset, rows, VIEWS, args, image_processor=PROCESSOR)
    result.test(load_images("digits", split="test[:60]"))
    result.save(folder / "classifier")
    return folder / "classifier"
