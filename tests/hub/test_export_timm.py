"""Networks of timm in timm's own form, which timm and transformers load without hf_msn."""

import json

import numpy as np
import pytest
import timm
import torch
from tiny_semi_supervised import RESNET18, RESNETV2, TIMM_VIT, tiny_paws
from transformers import AutoModel, TimmWrapperModel

from hf_msn import (
    MSNForPreTraining,
    PAWSForPreTraining,
    SuNCEtForPreTraining,
    evaluation_image_processor,
    export_backbone,
)
from hf_msn.evaluation.backbones import checkpoint_weights_sha256, find_backbone, weights_sha256
from hf_msn.finetuning.models import check_start, load_for_classification

TIMM_VIT_ANY_SIZE = {
    "timm_model": "vit_tiny_patch16_224",
    "timm_options": {"embed_dim": 24, "depth": 1, "num_heads": 2, "dynamic_img_size": True, "global_pool": "avg"},
}
ENCODERS = {
    "resnet18": RESNET18,
    "resnet with drop path": {"timm_model": "test_resnet", "timm_options": {"drop_path_rate": 0.2}},
    "convnext": {"timm_model": "test_convnext"},
    "vit": TIMM_VIT,
    "vit of any size": TIMM_VIT_ANY_SIZE,
    "vit of any size by name": {"timm_model": "test_vit"},
    "tag in the name": {"timm_model": "test_resnet.r160_in1k"},
}


def paws_over(encoder, **fields) -> PAWSForPreTraining:
    """Float32, with running statistics that differ from a fresh network's."""
    model = tiny_paws(**encoder, **fields).float()
    with torch.no_grad():
        model.train().project(torch.randn(8, 3, 32, 32) + 0.5)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "dtype"),
    [*((encoder, torch.float32) for encoder in ENCODERS.values()), (RESNET18, torch.bfloat16)],
    ids=[*ENCODERS, "bfloat16"],
)
def test_every_loader_gives_the_same_weights_and_features(encoder, dtype, tmp_path):
    model = paws_over(encoder).to(dtype)
    size = {"vit_tiny_patch16_224": 224, "test_vit": 96}.get(encoder["timm_model"], 32)
    size = 32 if encoder is TIMM_VIT else size
    folder = export_backbone(model, tmp_path / "export", image_processor=evaluation_image_processor(size))
    images = torch.randn(2, 3, size, size, dtype=dtype)
    wrapped, network = AutoModel.from_pretrained(folder), timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert type(wrapped) is TimmWrapperModel and wrapped.dtype == dtype
    with torch.no_grad():
        expected = model.encoder(images)
        for features in (wrapped.eval()(images).pooler_output, network.to(dtype).eval()(images)):
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    sha256 = weights_sha256(model.encoder)
    assert checkpoint_weights_sha256(folder) == sha256
    if dtype == torch.float32:
        assert checkpoint_weights_sha256(f"timm:{folder}") == sha256


@pytest.mark.parametrize("size", [32, 224, 8, 299])
def test_the_transform_of_timm_resizes_and_crops_as_the_image_processor(size, tmp_path):
    processor = evaluation_image_processor(size)
    folder = export_backbone(paws_over(RESNET18), tmp_path / "export", image_processor=processor)
    written = json.loads((folder / "config.json").read_text())
    assert (written["architecture"], written["model_args"]) == ("resnet18", RESNET18["timm_options"])
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    resize, crop = transform.transforms[:2]
    assert (resize.size, tuple(crop.size)) == (processor.size["shortest_edge"], (size, size))
    again = timm.data.create_transform(**timm.data.resolve_model_data_config(network, use_test_size=True))
    assert repr(again) == repr(transform)
    # nothing refers to the weights that timm releases under this name
    assert not set(written["pretrained_cfg"]) & {"url", "hf_hub_id", "tag", "test_input_size"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("xcit_nano_12_p8_224", {"depth": 1}, 64),
        ("twins_svt_small", {"depths": [1, 1, 1, 1]}, 64),
        ("crossvit_tiny_240", {}, 64),
        ("shvit_s1", {}, 64),
        ("coat_lite_tiny", {"serial_depths": [2, 1, 1, 1], "img_size": 64}, 64),  # with tensors under two names
    ],
)
def test_a_network_is_exported_for_images_of_another_size_than_its_own(name, options, size, tmp_path):
    model = tiny_paws(timm_model=name, timm_options=options).float().eval()
    folder = export_backbone(model, tmp_path / "export", image_processor=evaluation_image_processor(size))
    images = torch.randn(2, 3, size, size)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = model.encoder(images)
        assert torch.equal(network(images), expected)
        assert torch.equal(AutoModel.from_pretrained(folder).eval()(images).pooler_output, expected)
    assert checkpoint_weights_sha256(folder) == checkpoint_weights_sha256(f"timm:{folder}")
    assert checkpoint_weights_sha256(folder) == weights_sha256(model.encoder)


def test_networks_that_timm_cannot_make_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"resnetv2_18.*small_image_stem"):
        export_backbone(tiny_paws(**RESNETV2), tmp_path / "export")
    with pytest.raises(ValueError, match="paws_wide_resnet"):
        export_backbone(tiny_paws(timm_model="paws_wide_resnet"), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_timm_would_make_differently_is_refused(tmp_path):
    changed = paws_over(RESNET18)
    changed.encoder.maxpool = torch.nn.AvgPool2d(3, 2, 1)
    with pytest.raises(ValueError, match=r"resnet18.*another network"):
        export_backbone(changed, tmp_path / "export", image_processor=evaluation_image_processor(32))
    with pytest.raises(ValueError, match=r"64 pixels.*`img_size`"):
        export_backbone(paws_over(TIMM_VIT), tmp_path / "export", image_processor=evaluation_image_processor(64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings", [{"do_center_crop": False}, {"do_normalize": False}, {"size": {"height": 32, "width": 32}}]
)
def test_an_image_processor_that_timm_cannot_express_is_an_error(settings, tmp_path):
    processor = evaluation_image_processor(32)
    for name, value in settings.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError, match="`image_processor`"):
        export_backbone(paws_over(RESNET18), tmp_path / "export", image_processor=processor)
    assert list(tmp_path.iterdir()) == []


def test_pretraining_starts_from_the_export(tmp_path):
    model = paws_over(TIMM_VIT_ANY_SIZE)
    folder = export_backbone(model, tmp_path / "export", image_processor=evaluation_image_processor(224))
    for method in (PAWSForPreTraining, SuNCEtForPreTraining):
        again = method.from_backbone(folder, projection_dim=8)
        assert weights_sha256(again.encoder) == weights_sha256(model.encoder)
        assert again.config.timm_options == {**model.config.timm_options, "img_size": [224, 224]}
    with pytest.raises(ValueError, match=r"vit_tiny.*MSNConfig"):
        MSNForPreTraining.from_backbone(folder)


def test_fine_tuning_starts_from_the_export(tmp_path):
    model = paws_over(RESNET18)
    folder = export_backbone(model, tmp_path / "export", image_processor=evaluation_image_processor(32))
    check_start(str(folder), "backbone")
    classifier = load_for_classification(str(folder), np.array([2, 5]), None, seed=0)
    assert weights_sha256(find_backbone(classifier)) == weights_sha256(model.encoder)
    assert classifier.config.id2label == {0: "2", 1: "5"}
