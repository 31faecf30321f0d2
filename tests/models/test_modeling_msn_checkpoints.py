"""Saving and loading MSN, and starting from a released encoder."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from states import same
from tiny import tiny_batch, tiny_config, tiny_model
from transformers import AutoModelForPreTraining, ViTMSNConfig, ViTMSNModel

from hf_msn import MSNForPreTraining

STEPS = 2


@pytest.fixture
def trained():
    """A model whose every tensor differs from a fresh one: trunk, target, head, batch statistics, mask state."""
    model = tiny_model(seed=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        model(**tiny_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(0.5)
    return model


@pytest.fixture
def folder(trained, tmp_path):
    trained.save_pretrained(tmp_path / "msn")
    return tmp_path / "msn"


@pytest.fixture
def trunk(tmp_path):
    """A plain ViTMSNModel with positions that are not zero, and the folder it is saved in."""
    torch.manual_seed(5)
    model = ViTMSNModel(tiny_config().to_vit_msn_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "trunk")
    return model.eval(), tmp_path / "trunk"


@pytest.mark.parametrize("loader", [MSNForPreTraining, AutoModelForPreTraining])
def test_a_round_trip_is_exact(trained, folder, loader):
    loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is MSNForPreTraining and not info["missing_keys"]
    assert not loaded.training
    assert loaded.config.to_diff_dict() == trained.config.to_diff_dict()
    assert same(loaded.state_dict(), trained.state_dict())
    assert loaded.mask_state.tolist() == [0, STEPS]
    batch = tiny_batch(seed=9)
    assert torch.equal(loaded(**batch).loss, trained.eval()(**batch).loss)
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad != name.startswith("target_"), name


def test_another_dtype_leaves_the_mask_state_whole(folder):
    loaded = MSNForPreTraining.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert loaded.mask_state.dtype == torch.int64
    assert loaded.mask_state.tolist() == [0, STEPS]


def test_a_checkpoint_without_prototypes_is_refused(folder):
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "prototypes"}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="prototypes"):
        MSNForPreTraining.from_pretrained(folder)


def test_both_encoders_start_from_a_released_encoder(trunk):
    plain, path = trunk
    model = MSNForPreTraining.from_backbone(path, num_prototypes=8, projection_dim=16, projection_hidden_dim=32)
    images = tiny_batch()["pixel_values"]
    expected = plain(images).last_hidden_state
    for encoder in (model.encoder, model.target_encoder):
        assert torch.equal(encoder.eval()(images).last_hidden_state, expected)
    assert same(model.target_projection_head.state_dict(), model.projection_head.state_dict())
    assert not any(p.requires_grad for p in model.target_encoder.parameters())
    assert all(p.requires_grad for p in model.encoder.parameters())
    assert (model.config.num_prototypes, model.config.hidden_size, model.config.image_size) == (8, 32, 16)
    assert model.config.model_type == "msn"
    assert model(**tiny_batch()).loss.isfinite()


def test_a_pretrained_msn_model_gives_its_target_encoder(trained, folder):
    model = MSNForPreTraining.from_backbone(folder, num_prototypes=20)
    assert same(model.encoder.state_dict(), trained.target_encoder.state_dict())
    assert same(model.target_encoder.state_dict(), trained.target_encoder.state_dict())
    assert not torch.equal(model.encoder.layernorm.bias, trained.encoder.layernorm.bias)
    assert model.prototypes.shape == (20, 16)
    assert model.config.mask_ratio == trained.config.mask_ratio
    assert model.mask_state.tolist() == [0, 0]


def test_positions_are_interpolated_to_another_image_size(trunk):
    plain, path = trunk
    model = MSNForPreTraining.from_backbone(path, image_size=24)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert model.config.num_patches == 36
    expected = plain(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(model.encoder.eval()(images).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "differing"),
    [
        ({"hidden_size": 64}, "embeddings.cls_token"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_prototypes": 0}, "num_prototypes"),
    ],
    ids=str,
)
def test_a_field_that_changes_the_shape_of_the_encoder_is_an_error(trunk, fields, differing):
    with pytest.raises(ValueError, match=rf"(?s){differing}"):
        MSNForPreTraining.from_backbone(trunk[1], **fields)


def test_other_settings_of_the_encoder_are_kept(tmp_path):
    config = ViTMSNConfig(**{**tiny_config().to_vit_msn_config().to_dict(), "layer_norm_eps": 1e-3, "qkv_bias": False})
    plain = ViTMSNModel(config).eval()
    plain.save_pretrained(tmp_path)
    model = MSNForPreTraining.from_backbone(tmp_path)
    assert (model.config.layer_norm_eps, model.config.qkv_bias) == (1e-3, False)
    images = tiny_batch()["pixel_values"]
    assert torch.equal(model.encoder.eval()(images).last_hidden_state, plain(images).last_hidden_state)
