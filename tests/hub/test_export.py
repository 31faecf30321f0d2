"""Exports that load without hf_msn."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from tiny import tiny_batch, tiny_model
from transformers import AutoConfig, AutoModel, ViTMSNModel

from hf_msn import PAWSConfig, PAWSForPreTraining, evaluation_image_processor, export_backbone

LOAD_WITHOUT_HF_MSN = """
import sys

sys.modules["hf_msn"] = None
import torch
from transformers import AutoImageProcessor, AutoModel

folder, images, outputs = sys.argv[1:]
model = AutoModel.from_pretrained(folder)
assert type(model).__name__ == "ViTMSNModel", type(model)
processor = AutoImageProcessor.from_pretrained(folder)
assert processor.size, processor
with torch.no_grad():
    torch.save(model(torch.load(images), output_hidden_states=True).hidden_states[-1], outputs)
"""


@pytest.fixture
def model():
    """Online and target encoder differ."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_the_export_loads_where_hf_msn_is_not_installed_with_the_same_features(model, tmp_path):
    images = tiny_batch()["pixel_values"]
    torch.save(images, tmp_path / "images.pt")
    folder = export_backbone(model, tmp_path / "export", image_processor=evaluation_image_processor(16))
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    script = [sys.executable, "-c", LOAD_WITHOUT_HF_MSN, folder, tmp_path / "images.pt", tmp_path / "features.pt"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.target_encoder(images, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(torch.load(tmp_path / "features.pt"), expected)


@pytest.mark.parametrize("which", ["target", "online"])
def test_the_encoder_that_was_asked_for_is_exported(model, tmp_path, which):
    encoder, other = model.target_encoder, model.encoder
    if which == "online":
        encoder, other = other, encoder
    loaded = AutoModel.from_pretrained(export_backbone(model, tmp_path / "export", which))
    assert type(loaded) is ViTMSNModel
    weights = loaded.state_dict()
    assert weights.keys() == encoder.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    assert not all(torch.equal(weights[name], value) for name, value in other.state_dict().items())


def test_the_configuration_is_a_plain_one(model, tmp_path):
    folder = export_backbone(model, str(tmp_path / "export"))
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("vit_msn", ["ViTMSNModel"])
    assert not set(written) & set(model.config.pretraining_fields)
    config = AutoConfig.from_pretrained(folder)
    assert (config.image_size, config.patch_size, config.hidden_size, config.num_hidden_layers) == (16, 4, 32, 2)


def test_the_dtype_of_the_model_is_kept(model, tmp_path):
    folder = export_backbone(model.bfloat16(), tmp_path / "export")
    assert AutoModel.from_pretrained(folder).dtype == torch.bfloat16


def test_an_empty_folder_is_used_and_one_with_files_is_an_error(model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (export_backbone(model, tmp_path / "empty") / "model.safetensors").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"The folder '.*full' is not empty. Choose another, or remove it first"):
        export_backbone(model, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_an_unknown_encoder_is_an_error(model, tmp_path):
    with pytest.raises(ValueError, match="`which` must be 'target' or 'online', but is 'both'"):
        export_backbone(model, tmp_path / "export", "both")
    assert not (tmp_path / "export").exists()


def test_an_export_that_fails_leaves_no_folder_behind(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(ViTMSNModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_backbone(model, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_the_encoder_of_paws_is_exported_with_its_own_weights(tmp_path):
    fields = {name: getattr(tiny_model().config, name) for name in ("image_size", "patch_size", "hidden_size")}
    config = PAWSConfig(**fields, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    model = PAWSForPreTraining(config).eval()
    loaded = AutoModel.from_pretrained(export_backbone(model, tmp_path / "export"))
    assert type(loaded) is ViTMSNModel
    images = tiny_batch()["pixel_values"]
    with torch.no_grad():
        expected = model.encoder(images).last_hidden_state
        torch.testing.assert_close(loaded.eval()(images).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_of_timm_is_refused_with_the_remedy(tmp_path):
    model = PAWSForPreTraining(PAWSConfig(timm_model="test_resnet", projection_hidden_dim=8, projection_dim=8))
    with pytest.raises(ValueError, match=r"'test_resnet' of timm.*timm.models.save_for_hf\(model.encoder, path\)"):
        export_backbone(model, tmp_path / "export")
    timm.models.save_for_hf(model.encoder, tmp_path / "timm")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model.eval().encoder(images))
