"""One hash for all forms of a backbone, and a different one for any change of its features."""

import copy

import pytest
import timm
import torch
from tiny import tiny_model
from tiny_semi_supervised import RESNET18, RESNETV2, tiny_paws
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMSNForImageClassification,
    ViTMSNModel,
)

from hf_msn.distributed.batch_norm import synchronize_batch_norm
from hf_msn.evaluation.backbones import checkpoint_weights_sha256, evaluated_module, find_backbone, weights_sha256

VIT = {"patch_size": 4, "img_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}


def hash_of(model) -> str:
    return weights_sha256(find_backbone(model))


@pytest.fixture
def msn():
    model = tiny_model().eval()
    with torch.no_grad():
        model.encoder.layernorm.bias.add_(1)  # online and target differ
    return model


def classifier_over(msn, num_labels: int = 3) -> ViTMSNForImageClassification:
    config = msn.config.to_vit_msn_config()
    config.id2label = {number: f"class {number}" for number in range(num_labels)}
    model = ViTMSNForImageClassification(config)
    model.vit.load_state_dict(msn.target_encoder.state_dict())
    return model


def test_vit_has_one_hash_in_pretraining_alone_and_under_a_classifier(msn, tmp_path):
    plain = ViTMSNModel(msn.config.to_vit_msn_config())
    plain.load_state_dict(msn.target_encoder.state_dict())
    forms = {"msn": msn, "plain": plain, "classifier": classifier_over(msn), "other labels": classifier_over(msn, 5)}
    hashes = {name: hash_of(model) for name, model in forms.items()}
    assert set(hashes.values()) == {weights_sha256(msn.target_encoder)}
    assert weights_sha256(msn.encoder) not in hashes.values()
    for name, model in forms.items():
        model.save_pretrained(tmp_path / name)
        assert checkpoint_weights_sha256(tmp_path / name) == hashes[name]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 4), ("hidden_act", "relu"), ("layer_norm_eps", 1e-5), ("image_size", 20)],
)
def test_configuration_that_changes_the_features_changes_the_hash(msn, field, value):
    plain = ViTMSNModel(msn.config.to_vit_msn_config())
    before = weights_sha256(plain)
    setattr(plain.config, field, value)
    assert weights_sha256(plain) != before


def test_training_only_settings_do_not_change_the_hash(msn):
    before = hash_of(msn)
    msn.activation_checkpointing_enable()
    msn.config.hidden_dropout_prob, msn.config.name_or_path = 0.5, "/somewhere/else"
    msn.config.mask_ratio = 0.5
    assert hash_of(msn.train()) == before


def timm_forms(encoder, name, options):
    """Return the same weights as a bare network, under a classifier, and in both wrappers of transformers."""
    forms = [encoder, timm.create_model(name, num_classes=7, **options)]
    config = {"architecture": name, "model_args": options}
    forms += [
        TimmWrapperModel(TimmWrapperConfig(**config)),
        TimmWrapperForImageClassification(TimmWrapperConfig(**config, num_labels=4)),
    ]
    for form in forms[1:]:
        getattr(form, "timm_model", form).load_state_dict(encoder.state_dict(), strict=False)
    return forms


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", RESNET18["timm_options"]),
        ("vit_tiny_patch16_224", VIT),
        ("test_efficientnet", {"drop_path_rate": 0.1}),
        ("test_convnext", {}),
    ],
)
def test_timm_network_has_one_hash_with_and_without_a_classifier(name, options):
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0, **options)
    hashes = {hash_of(form) for form in timm_forms(encoder, name, options)}
    assert hashes == {weights_sha256(encoder)}
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1
    assert weights_sha256(encoder) not in hashes


def test_vit_with_a_cls_token_has_one_hash_with_and_without_a_pooler(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    model.save_pretrained(tmp_path)
    # `AutoModel` initialises a different pooler each time
    assert {checkpoint_weights_sha256(tmp_path) for _ in range(2)} == {hash_of(model)}
    with torch.no_grad():
        model.vit.layernorm.bias.add_(1)
    assert hash_of(model) != checkpoint_weights_sha256(tmp_path)


def test_settings_of_timm_that_show_in_no_tensor_change_the_hash():
    encoders = [
        timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**VIT, **options})
        for options in ({}, {"num_heads": 4}, {"global_pool": "avg", "fc_norm": False}, {"act_layer": "relu"})
    ]
    for encoder in encoders[1:]:
        encoder.load_state_dict(encoders[0].state_dict())
    assert len({weights_sha256(encoder) for encoder in encoders}) == 4


@pytest.mark.parametrize("encoder", [RESNET18, RESNETV2], ids=["resnet18", "resnetv2"])
def test_hash_during_training_on_several_ranks_is_that_of_the_checkpoint(encoder, tmp_path):
    model = tiny_paws(**encoder)
    in_training = synchronize_batch_norm(copy.deepcopy(model), torch.device("cpu"))
    on_gpus = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
    in_training.save_pretrained(tmp_path)
    for features in ("backbone", "projection"):
        expected = checkpoint_weights_sha256(tmp_path, features)
        for other in (model, in_training, on_gpus):
            assert weights_sha256(evaluated_module(other, features)[0]) == expected


def test_a_size_that_changes_no_output_does_not_count():
    torch.manual_seed(0)
    own = timm.create_model("xcit_nano_12_p8_224", num_classes=0, depth=1).eval()
    small = timm.create_model("xcit_nano_12_p8_224", num_classes=0, depth=1, img_size=64).eval()
    small.load_state_dict(own.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(own(images), small(images))
    assert weights_sha256(own) == weights_sha256(small)
    options = {"num_classes": 0, "depth": 1, "embed_dim": 24, "num_heads": 2, "dynamic_img_size": True}
    square = timm.create_model("vit_tiny_patch16_224", img_size=(64, 64), **options).eval()
    wide = timm.create_model("vit_tiny_patch16_224", img_size=(32, 128), **options).eval()
    wide.load_state_dict(square.state_dict())  # 16 positions, in another grid
    with torch.no_grad():
        assert not torch.equal(square(images), wide(images))
    assert weights_sha256(square) != weights_sha256(wide)
