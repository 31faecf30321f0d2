"""MSNConfig: what it keeps, and an error of its own for every bad value."""

import math

import pytest
from tiny import tiny_config
from transformers import AutoConfig, ViTMSNConfig

from hf_msn import MSNConfig

OTHER_VALUES = {
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
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_channels": 1,
    "qkv_bias": False,
    "layer_norm_eps": 1e-5,
}


def test_every_field_survives_saving_and_loading(tmp_path):
    config = MSNConfig(**OTHER_VALUES)
    for name in OTHER_VALUES:
        assert getattr(config, name) != getattr(MSNConfig(), name), f"{name} is not another value"
    config.save_pretrained(tmp_path)
    for loaded in (MSNConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MSNConfig
        assert {name: getattr(loaded, name) for name in OTHER_VALUES} == OTHER_VALUES


def test_the_list_of_pretraining_fields_is_what_a_plain_configuration_lacks():
    own = set(MSNConfig().to_dict()) - set(ViTMSNConfig().to_dict())
    assert own == set(MSNConfig.pretraining_fields)


def test_the_plain_configuration_has_the_encoder_and_nothing_else():
    plain = MSNConfig(**OTHER_VALUES).to_vit_msn_config()
    assert type(plain) is ViTMSNConfig
    assert plain.to_dict()["model_type"] == "vit_msn"
    for name, value in OTHER_VALUES.items():
        if name in MSNConfig.pretraining_fields:
            assert not hasattr(plain, name)
        else:
            assert getattr(plain, name) == value


def test_the_default_is_the_papers_vit_b_16():
    config = MSNConfig()
    encoder = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert encoder == (768, 12, 12, 3072)
    assert (config.image_size, config.patch_size, config.num_patches, config.mask_ratio) == (224, 16, 196, 0.3)
    assert (config.num_prototypes, config.projection_dim, config.projection_hidden_dim) == (1024, 256, 2048)
    assert (config.temperature, config.sharpen_temperature) == (0.1, 0.25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.0}, r"`mask_ratio` .* must be in \[0, 1\), but is 1.0. The paper has 0.15 to 0.7"),
        ({"mask_ratio": 1.7}, r"`mask_ratio` .* must be in \[0, 1\), but is 1.7"),
        ({"mask_ratio": -0.1}, r"`mask_ratio` .* must be in \[0, 1\), but is -0.1"),
        ({"mask_ratio": math.nan}, r"`mask_ratio` .* must be in \[0, 1\), but is nan"),
        ({"mask_ratio": 0.95}, "`mask_ratio` 0.95 leaves none of the 16 patches of an image. Lower it"),
        ({"num_prototypes": 0}, "`num_prototypes` must be >= 1, but is 0"),
        ({"projection_dim": 0}, "`projection_dim` must be >= 1, but is 0"),
        ({"projection_hidden_dim": -2}, "`projection_hidden_dim` must be >= 1, but is -2"),
        ({"temperature": 0.0}, "`temperature` must be > 0, but is 0.0"),
        ({"temperature": math.nan}, "`temperature` must be > 0, but is nan"),
        ({"sharpen_temperature": -0.25}, "`sharpen_temperature` must be > 0, but is -0.25"),
        ({"me_max_weight": -1.0}, "`me_max_weight` must be >= 0, but is -1.0"),
        ({"entropy_weight": -1.0}, "`entropy_weight` must be >= 0, but is -1.0"),
        ({"patch_size": 5}, "`image_size` must be a multiple of `patch_size`, .* they are 16 and 5"),
        ({"patch_size": 0}, "`image_size` must be a multiple of `patch_size`, .* they are 16 and 0"),
        ({"patch_size": 32}, "`image_size` must be a multiple of `patch_size`, at least one patch, .* 16 and 32"),
        ({"image_size": [16, 32]}, r"`image_size` must be one number, for square images .* but is .*16, 32"),
        (
            {"num_attention_heads": 3},
            "`hidden_size` must be a multiple of `num_attention_heads`, .* they are 32 and 3",
        ),
        (
            {"num_attention_heads": 0},
            "`hidden_size` must be a multiple of `num_attention_heads`, .* they are 32 and 0",
        ),
    ],
    ids=str,
)
def test_each_bad_value_has_its_own_error(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize("fields", [{"mask_ratio": 0}, {"mask_ratio": 15 / 16}, {"num_prototypes": 1}], ids=str)
def test_values_at_the_edge_are_allowed(fields):
    config = tiny_config(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_a_bad_value_in_a_file_is_an_error_too(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"mask_ratio": 0.25', '"mask_ratio": 1.5'))
    with pytest.raises(ValueError, match=r"`mask_ratio` .* must be in \[0, 1\), but is 1.5"):
        MSNConfig.from_pretrained(tmp_path)
