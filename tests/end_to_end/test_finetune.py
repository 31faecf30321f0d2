"""`hf-msn finetune`, in this process and on two ranks."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from pretrain_runs import command_on_rank
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_msn import load_images
from hf_msn.data.decoding import decode_image

RECIPE = "finetune_digits"
TINY = (
    "--hidden_size 32 --num_hidden_layers 2 --intermediate_size 64 --patch_size 4 --num_train_epochs 4 "
    "--eval_every_epochs 1 --learning_rate 0.05 --disable_tqdm true"
).split()


@pytest.fixture
def run(command):
    return partial(command, "finetune")


def right_percent(folder: Path, split: str) -> float:
    """Accuracy of a saved classifier, image by image."""
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    right = []
    with torch.no_grad():
        for example in load_images("digits", split=split):
            pixels = processor(decode_image(example["image"]), return_tensors="pt")["pixel_values"]
            right.append(int(model.eval()(pixels).logits.argmax()) == example["label"])
    return 100 * sum(right) / len(right)


@pytest.mark.slow
def test_the_supervised_recipe_saves_what_it_measured(run, tmp_path):
    printed = run("--config", RECIPE, *TINY, "--test_split", "test[:80]", "--output_dir", tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "finetune.json").read_text())
    accuracies = [recorded["accuracy_by_epoch"][str(epoch)]["top1"] for epoch in range(1, 5)]
    assert recorded["best_epoch"] == 1 + accuracies.index(max(accuracies)) and recorded["refit"]
    assert recorded["num_test_images"] == 80 and recorded["num_trained_images"] == 50
    assert recorded["test_accuracy"]["top1"] == pytest.approx(right_percent(tmp_path / "run", "test[:80]"))
    assert f"Best epoch {recorded['best_epoch']} of 4" in printed and "of 80 images" in printed
    files = "config.json finetune.json labelled_images.json model.safetensors preprocessor_config.json run.json"
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == files.split()
    with pytest.raises(ValueError, match="`output_dir`"):
        run("--config", RECIPE, *TINY, "--output_dir", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_the_classifier_of_one(run, tmp_path):
    settings = ["--config", RECIPE, *TINY, "--refit", "false", "--test_split", "test[:80]"]
    one = run(*settings, "--output_dir", tmp_path / "one")
    assert run_ranks(command_on_rank, 2, "finetune", *settings, "--output_dir", str(tmp_path / "two")) == [one, ""]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(two[name], value, atol=1e-5) for name, value in one.items())
    first, second = (json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("one", "two"))
    for recorded in (first, second):  # sums in another order
        assert len(recorded.pop("weights_sha256")) == 64 and [*recorded.pop("files")] == ["model.safetensors"]
    assert first == second
