import json
import os

import numpy as np
import pytest
import torch
from finetuning_runs import (
    PROCESSOR,
    VIEWS,
    classifier_arguments,
    digits,
    images_and_labels,
    suncet_arguments,
    suncet_config,
)
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_msn import MultiViewTransform, SuNCEtForPreTraining, finetune_classifier, finetune_suncet, load_images


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Fine-tuned models: a ViT's classifier, a convnet's, and SuNCEt."""
    dataset, rows = digits()
    folder = tmp_path_factory.mktemp("runs")
    vit, convnet = suncet_config(), suncet_config(timm_model="test_resnet")
    data, args = (dataset, rows, VIEWS), classifier_arguments(folder, num_train_epochs=2)
    return {
        "vit_msn": finetune_classifier(vit, *data, args, image_processor=PROCESSOR),
        "timm_wrapper": finetune_classifier(convnet, *data, args, image_processor=PROCESSOR),
        "suncet": finetune_suncet(vit, *data, suncet_arguments(folder, num_train_epochs=1)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit_msn", "timm_wrapper"])
def test_plain_transformers_computes_the_same_logits(tuned, tmp_path, kind):
    tuned[kind].save(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.model_type == kind and loaded.config.label2id == {str(digit): digit for digit in range(10)}
    pixels, _ = images_and_labels(load_images("digits", split="test"), range(4))
    with torch.no_grad():
        logits = tuned[kind].model(pixels).logits
        assert loaded(pixels).logits.equal(logits) and logits.abs().max() > 0.01


@pytest.mark.slow
def test_a_network_with_tensors_under_two_names_is_saved_in_checkpoint_and_result(tmp_path):
    sizes = {"embed_dims": [16, 16, 24, 32], "serial_depths": [2, 1, 1, 1], "img_size": 32}
    config = suncet_config(timm_model="coat_lite_tiny", timm_options=sizes, image_size=32)
    views = MultiViewTransform.for_small_grayscale(image_size=32)
    args = classifier_arguments(tmp_path / "run", num_train_epochs=1, save_strategy="epoch")
    processor = views.evaluation_image_processor(crop_fraction=1.0)
    result = finetune_classifier(config, *digits(), views, args, image_processor=processor)
    result.save(tmp_path / "tuned")
    pixels = torch.randn(2, 3, 32, 32)
    for folder in (tmp_path / "tuned", *(tmp_path / "run").glob("checkpoint-*")):
        loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            assert loaded(pixels).logits.equal(result.model.eval()(pixels).logits), folder


def test_the_file_says_what_was_chosen_and_by_which_rows(tuned, tmp_path):
    result = tuned["vit_msn"]
    (tmp_path / ".incomplete-of-a-killed-run").mkdir()
    result.save(tmp_path)
    assert not list(tmp_path.glob(".*"))
    recorded = json.loads((tmp_path / "finetune.json").read_text())
    assert recorded["best_epoch"] == result.best_epoch and recorded["seed"] == 3 and recorded["head"] == "linear"
    assert recorded["accuracy_by_epoch"] == {str(epoch): v for epoch, v in result.accuracy_by_epoch.items()}
    assert recorded["validation_accuracy"] == max(values["top1"] for values in recorded["accuracy_by_epoch"].values())
    assert [recorded[f"num_{kind}_images"] for kind in ("labelled", "trained", "held_out")] == [50, 40, 10]
    assert sorted(recorded["trained_rows"] + recorded["held_out_rows"]) == digits()[1].tolist()
    assert recorded["test_accuracy"] is None and recorded["classes"] == list(range(10))
    labelled = json.loads((tmp_path / "labelled_images.json").read_text())
    labels = np.array(digits()[0]["label"][:])
    assert labelled["rows"] == digits()[1].tolist() and labelled["labels"] == labels[labelled["rows"]].tolist()

    result.test(load_images("digits", split="test[:50]"))
    result.save(tmp_path)
    recorded = json.loads((tmp_path / "finetune.json").read_text())
    assert recorded["test_accuracy"] == result.test_accuracy and recorded["num_test_images"] == 50
    assert "Test: top1" in result.describe() and f"Best epoch {result.best_epoch} of 2" in result.describe()


def test_suncet_is_saved_as_a_checkpoint_of_suncet(tuned, tmp_path):
    tuned["suncet"].save(tmp_path)
    loaded = SuNCEtForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(loaded[name].equal(value) for name, value in tuned["suncet"].model.state_dict().items())


class Killed(BaseException):
    pass


def test_a_run_killed_while_saving_leaves_nothing_half_written(tuned, tmp_path, monkeypatch):
    result = tuned["vit_msn"]
    tuned["suncet"].save(tmp_path)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def die(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(type(result), "to_dict", die)
    with pytest.raises(Killed):
        result.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_the_result_file_is_never_beside_another_model(tuned, tmp_path, monkeypatch):
    tuned["suncet"].save(tmp_path)
    replace = os.replace

    def die_at_the_processor(source, target):
        if str(target).endswith("preprocessor_config.json"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_processor)
    with pytest.raises(Killed):
        tuned["vit_msn"].save(tmp_path)
    assert not (tmp_path / "finetune.json").exists()
    monkeypatch.undo()
    tuned["vit_msn"].save(tmp_path)
    assert json.loads((tmp_path / "finetune.json").read_text())["head"] == "linear"
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["classifier.weight"].equal(tuned["vit_msn"].model.classifier.weight)
