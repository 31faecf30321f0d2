"""The configurations: fields survive saving, values out of range raise an error that names field and value."""

import dataclasses
import math
import re

import pytest
from tiny import tiny_config
from transformers import AutoConfig, ViTMSNConfig

from hf_msn import MSNConfig, PAWSConfig, SuNCEtConfig

MSN_FIELDS = {
    "mask_ratio": 0.6,
    "shared_mask": True,
    "projection_hidden_dim": 48,
    "projection_dim": 24,
    "projection_batch_norm": False,
    "num_prototypes": 40,
    "temperature": 0.2,
    "sharpen_temperature": 0.3,
    "use_sinkhorn": False,
    "me_max_weight": 5.0,
    "entropy_weight": 0.5,
    "prediction_head": True,
    "prediction_hidden_dim": 7,
    "image_size": 32,
    "patch_size": 8,
    "qkv_bias": False,
    "layer_norm_eps": 1e-5,
}
PAWS_FIELDS = {
    "timm_model": "resnet18",
    "timm_options": {"layers": [1, 1, 1, 1], "drop_path_rate": 0.1},
    "small_image_stem": True,
    "projection_activation": "gelu",
    "label_smoothing": 0.1,
    "prediction_head": True,
    "prediction_hidden_dim": 7,
    "sharpen_temperature": 0.5,
    "me_max_weight": 2.0,
}


@pytest.mark.parametrize(("config_class", "fields"), [(MSNConfig, MSN_FIELDS), (PAWSConfig, PAWS_FIELDS)])
def test_every_field_survives_saving_and_loading(config_class, fields, tmp_path):
    config, default = config_class(**fields), config_class()
    assert all(getattr(config, name) != getattr(default, name) for name in fields)
    config.save_pretrained(tmp_path)
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is config_class
        assert {name: getattr(loaded, name) for name in fields} == fields


def test_the_plain_configuration_has_the_fields_of_the_encoder_only():
    plain = MSNConfig(**MSN_FIELDS).to_vit_msn_config()
    assert type(plain) is ViTMSNConfig and plain.to_dict()["model_type"] == "vit_msn"
    known = {field.name for field in dataclasses.fields(ViTMSNConfig)}
    for name, value in MSN_FIELDS.items():
        assert getattr(plain, name, "absent") == (value if name in known else "absent")
    assert not set(PAWS_FIELDS) & set(PAWSConfig(**PAWS_FIELDS).to_vit_msn_config().to_dict())


def test_the_default_is_vit_b_16_of_the_paper():
    config = MSNConfig()
    encoder = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert encoder == (768, 12, 12, 3072)
    assert (config.image_size, config.patch_size, config.num_patches, config.mask_ratio) == (224, 16, 196, 0.3)
    assert (config.num_prototypes, config.projection_dim, config.projection_hidden_dim) == (1024, 256, 2048)
    assert (config.temperature, config.sharpen_temperature) == (0.1, 0.25)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask_ratio", 1.0),
        ("mask_ratio", math.nan),
        ("mask_ratio", 0.95),  # of 16 patches
        ("num_prototypes", 0),
        ("projection_dim", 0),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("sharpen_temperature", -0.25),
        ("me_max_weight", -1.0),
        ("patch_size", 5),
        ("patch_size", 32),
        ("image_size", [16, 32]),
        ("num_attention_heads", 3),
    ],
)
def test_a_value_out_of_range_is_an_error_of_msn(name, value):
    with pytest.raises(ValueError, match=rf"(?s)`{name}`.*{re.escape(str(value))}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize("config_class", [PAWSConfig, SuNCEtConfig])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing", 1.0),
        ("label_smoothing", math.nan),
        ("projection_activation", "silu"),
        ("small_image_stem", True),  # without `timm_model`
        ("timm_options", {"depth": 2}),
        ("temperature", 0.0),
        ("projection_dim", 0),
        ("patch_size", 15),
    ],
)
def test_a_value_out_of_range_is_an_error_of_paws_and_suncet(config_class, name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*{re.escape(str(value))}"):
        config_class(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("prediction_hidden_dim", 0), ("sharpen_temperature", -1.0), ("me_max_weight", -0.5)]
)
@pytest.mark.parametrize("config_class", [PAWSConfig, MSNConfig])
def test_a_value_out_of_range_is_an_error_of_methods_with_targets(config_class, name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*{value}"):
        config_class(prediction_head=True, **{name: value})


def test_the_width_of_the_prediction_head_is_a_quarter_by_default():
    for config_class in (PAWSConfig, MSNConfig):
        assert config_class(prediction_head=True, projection_dim=2048).prediction_width == 512
        assert config_class(prediction_head=True, projection_dim=3, prediction_hidden_dim=2).prediction_width == 2
        assert config_class(projection_dim=3).prediction_head is False  # without one its width is not checked
        with pytest.raises(ValueError, match=r"`projection_dim`.*3"):
            config_class(prediction_head=True, projection_dim=3)


def test_the_fields_of_a_vit_are_not_checked_for_a_timm_encoder():
    assert PAWSConfig(timm_model="resnet18", image_size=30, patch_size=16).image_size == 30


def test_a_value_out_of_range_in_a_file_is_an_error(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"mask_ratio": 0.25', '"mask_ratio": 1.5'))
    with pytest.raises(ValueError, match=r"`mask_ratio`.*1.5"):
        MSNConfig.from_pretrained(tmp_path)
