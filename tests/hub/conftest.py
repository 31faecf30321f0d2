"""Checkpoint folders as training leaves them, and a Hub on this machine."""

from pathlib import Path

import pytest
from card_runs import measure, msn, save, save_run
from finetuning_runs import PROCESSOR, VIEWS, classifier_arguments
from hub_server import HubServer

from hf_msn import draw_labelled_rows, export_backbone, finetune_classifier, load_images


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, logged in as alice."""
    with HubServer() as server:
        server.use_in_this_process(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "home" / "alice").mkdir(parents=True)
    return save_run(tmp_path / "home" / "alice" / "run")


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
