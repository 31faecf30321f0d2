"""PAWSConfig and SuNCEtConfig: what is refused, what is derived, what a file keeps."""

import pytest
from transformers import AutoConfig

from hf_msn import PAWSConfig, SuNCEtConfig


@pytest.mark.parametrize("config", [PAWSConfig, SuNCEtConfig])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\), but is 1.0. PAWS has 0.1"),
        ({"label_smoothing": -0.1}, r"`label_smoothing` must be in \[0, 1\), but is -0.1"),
        ({"label_smoothing": float("nan")}, r"`label_smoothing` must be in \[0, 1\), but is nan"),
        ({"projection_activation": "silu"}, "`projection_activation` must be 'relu' or 'gelu', but is 'silu'"),
        ({"small_image_stem": True}, "about a timm encoder. Give `timm_model`"),
        ({"timm_options": {"depth": 2}}, "about a timm encoder. Give `timm_model`"),
        ({"temperature": 0.0}, "`temperature` must be > 0, but is 0.0"),
        ({"projection_dim": 0}, "`projection_dim` must be >= 1, but is 0"),
        ({"patch_size": 15}, "`image_size` must be a multiple of `patch_size`"),
    ],
)
def test_wrong_values_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"projection_dim": 3}, "hidden width >= 1, .* a quarter of `projection_dim` 3 is 0. Give"),
        ({"prediction_hidden_dim": 0}, "hidden width >= 1, but `prediction_hidden_dim` is 0. Give"),
        ({"sharpen_temperature": -1.0}, "`sharpen_temperature` must be > 0, but is -1.0"),
        ({"me_max_weight": -0.5}, "`me_max_weight` must be >= 0, but is -0.5"),
    ],
)
def test_wrong_values_of_paws_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PAWSConfig(prediction_head=True, **fields)


def test_the_prediction_head_is_a_quarter_wide_unless_it_is_said():
    assert PAWSConfig(prediction_head=True, projection_dim=2048).prediction_width == 512
    assert PAWSConfig(prediction_head=True, projection_dim=4).prediction_width == 1
    assert PAWSConfig(prediction_head=True, projection_dim=3, prediction_hidden_dim=2).prediction_width == 2
    assert PAWSConfig(projection_dim=3).prediction_head is False  # and its width is not asked for


def test_a_timm_encoder_does_not_mind_the_fields_of_a_vit():
    assert PAWSConfig(timm_model="resnet18", image_size=30, patch_size=16).image_size == 30


def test_a_file_keeps_every_field(tmp_path):
    fields = {
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
    PAWSConfig(**fields).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PAWSConfig
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert not set(fields) & set(loaded.to_vit_msn_config().to_dict())
