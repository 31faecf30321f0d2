"""Exports that load without hf_msn."""

import copy
import json
import logging

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AutoImageProcessor, AutoModel, ViTMSNForImageClassification, ViTMSNModel

from hf_msn import (
    LowShotEvaluator,
    MSNForPreTraining,
    evaluation_image_processor,
    export_backbone,
    load_images,
    load_vision_model,
)
from hf_msn.evaluation.backbones import checkpoint_weights_sha256, weights_sha256


@pytest.fixture
def model():
    """Online and target encoder differ."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("which", ["target", "online"])
def test_target_and_online_encoder_are_exported(model, tmp_path, which):
    encoder, other = model.target_encoder, model.encoder
    if which == "online":
        encoder, other = other, encoder
    loaded = AutoModel.from_pretrained(export_backbone(model, tmp_path / "export", which))
    assert type(loaded) is ViTMSNModel
    weights = loaded.state_dict()
    assert weights.keys() == encoder.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    assert not all(torch.equal(weights[name], value) for name, value in other.state_dict().items())


def test_configuration_and_dtype_are_those_of_a_plain_encoder(model, tmp_path):
    folder = export_backbone(model.bfloat16(), tmp_path / "export")
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("vit_msn", ["ViTMSNModel"])
    assert not set(written) & {"mask_ratio", "num_prototypes", "projection_dim", "temperature"}
    assert AutoModel.from_pretrained(folder).dtype == torch.bfloat16


def test_an_empty_folder_is_used_and_anything_else_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    assert export_backbone(model, "~/empty") == tmp_path / "empty"
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "full" / "notes.txt"):
        with pytest.raises(ValueError, match=f"`path`.*{path.name}"):
            export_backbone(model, path)
    with pytest.raises(ValueError, match=r"`which`.*'both'"):
        export_backbone(model, tmp_path / "export", "both")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_an_export_that_fails_leaves_no_folder_behind(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(ViTMSNModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(model, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_without_an_image_processor_the_one_saved_with_the_model_is_exported(model, tmp_path, caplog):
    model.save_pretrained(tmp_path / "run")
    saved = evaluation_image_processor(16, image_std=(0.5, 0.5, 0.5), crop_fraction=1.0)
    saved.save_pretrained(tmp_path / "run")
    loaded = MSNForPreTraining.from_pretrained(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        folder = export_backbone(loaded, tmp_path / "export")
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == saved.to_dict()
    assert not caplog.records


def test_without_a_saved_image_processor_the_papers_is_exported_with_a_warning(model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        folder = export_backbone(model, tmp_path / "export")
    assert "image processor" in caplog.text and "16 pixels" in caplog.text
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.size == {"shortest_edge": round(16 * 256 / 224)}
    assert processor.crop_size == {"height": 16, "width": 16}
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("image_processor", "message"),
    [
        (evaluation_image_processor(20), "20 x 20.*16 x 16"),
        (lambda image: image, "`image_processor`.*function"),
    ],
)
def test_an_image_processor_that_does_not_fit_is_an_error(model, tmp_path, image_processor, message):
    with pytest.raises(ValueError, match=message):
        export_backbone(model, tmp_path / "export", image_processor=image_processor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["module", "compiled"])
def test_a_wrapped_model_is_exported_like_itself_and_left_as_it_was(model, tmp_path, wrap):
    wrapped = wrap(nn.ModuleDict({"module": model.train()}))  # as in `DistributedDataParallel`
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    folder = export_backbone(wrapped, tmp_path / "export")
    assert checkpoint_weights_sha256(folder) == weights_sha256(model.target_encoder)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_model_that_is_not_of_pretraining_is_an_error(model, tmp_path):
    classifier = ViTMSNForImageClassification(model.config.to_vit_msn_config())
    with pytest.raises(ValueError, match=r"ViTMSNForImageClassification.*save_pretrained"):
        export_backbone(classifier, tmp_path / "export")
    with pytest.raises(ValueError, match=r"str.*from_pretrained"):
        export_backbone("runs/mine", tmp_path / "export")
    with pytest.raises(ValueError, match=r"trainer.save_model"):
        export_backbone(copy.deepcopy(model).to("meta"), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_export_evaluates_to_the_same_numbers_as_the_model(model, tmp_path):
    digits = load_images("digits", split="train[:100]"), load_images("digits", split="test[:50]")
    evaluator = LowShotEvaluator(*digits, images_per_class=(2,), num_splits=2)
    model.save_pretrained(tmp_path / "run")
    evaluation_image_processor(16, crop_fraction=1.0).save_pretrained(tmp_path / "run")
    original = MSNForPreTraining.from_pretrained(tmp_path / "run")
    expected = evaluator(original)
    sha256 = evaluator.results.model["weights_sha256"]
    folder = export_backbone(original, tmp_path / "export")
    assert evaluator(load_vision_model(str(folder))) == expected
    assert evaluator.results.model["weights_sha256"] == sha256 == checkpoint_weights_sha256(folder)
