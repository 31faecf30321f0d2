"""Classifiers with a probe as their head: each image gets the class that the probe gives it, without hf_msn."""

import json
import logging

import numpy as np
import pytest
import timm
import torch
from tiny import tiny_model
from tiny_semi_supervised import RESNETV2, tiny_paws
from transformers import AutoModelForImageClassification, ViTMSNForImageClassification

from hf_msn import (
    KNNProbe,
    LinearProbe,
    LogisticProbe,
    MSNForPreTraining,
    PAWSForPreTraining,
    evaluation_image_processor,
    export_classifier,
    extract_features,
    load_images,
)
from hf_msn.data.decoding import decode_image
from hf_msn.evaluation.backbones import checkpoint_weights_sha256, weights_sha256

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROCESSOR = evaluation_image_processor(16, image_mean=(0.4, 0.4, 0.4), crop_fraction=1.0)
RESNET = {"timm_model": "resnet18", "timm_options": {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}}
PREACTIVATED = {**RESNETV2, "small_image_stem": False}  # its classifier is a convolution


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", split="train[:300]"), load_images("digits", split="test[:100]")


def msn() -> MSNForPreTraining:
    """With a final LayerNorm that scales and shifts, and an online encoder that differs."""
    model = tiny_model(initializer_range=0.12).eval()
    with torch.no_grad():
        norm = model.target_encoder.layernorm
        norm.weight.copy_(torch.linspace(-2, 2, 32))
        norm.bias.copy_(torch.randn(32))
        model.encoder.layernorm.bias.add_(1)
    return model


def paws(encoder) -> PAWSForPreTraining:
    return tiny_paws(**encoder).float().eval()


def fitted(model, digits, probe=None, images_per_class=5):
    """The features of the training digits, and a probe on the first digits of each class."""
    features = extract_features(model, digits[0], PROCESSOR, batch_size=256)
    rows = np.concatenate([np.flatnonzero(features.labels == digit)[:images_per_class] for digit in range(10)])
    probe = LogisticProbe() if probe is None else probe
    return features, probe.fit(features.features[rows], features.labels[rows])


def decided_by_probe(model, probe, dataset) -> np.ndarray:
    scores = probe.predict_scores(extract_features(model, dataset, PROCESSOR, batch_size=256).features)
    return probe.classes_[scores.argmax(axis=1)]


def pixels_of(dataset) -> torch.Tensor:
    images = [decode_image(image, row=row) for row, image in enumerate(dataset["image"])]
    return PROCESSOR(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def logits_of(folder, dataset) -> np.ndarray:
    classifier = AutoModelForImageClassification.from_pretrained(folder).eval()
    return classifier(pixels_of(dataset)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("probe", [LogisticProbe(), LinearProbe(epochs=300, affine=False)], ids=["logistic", "linear"])
def test_a_vit_gives_every_test_image_the_class_and_the_probabilities_of_the_probe(probe, digits, tmp_path):
    model = msn()
    features, probe = fitted(model, digits, probe)
    folder = export_classifier(model, probe, features, tmp_path / "out", class_names=NAMES, image_processor=PROCESSOR)
    logits, test = logits_of(folder, digits[1]), extract_features(model, digits[1], PROCESSOR, batch_size=256)
    scores = probe.predict_scores(test.features)
    assert len(set(scores.argmax(axis=1))) > 5  # it does tell digits apart
    np.testing.assert_array_equal(logits.argmax(axis=1), scores.argmax(axis=1))
    np.testing.assert_allclose(logits, scores, rtol=0, atol=1e-3 * np.abs(scores).max())
    loaded = ViTMSNForImageClassification.from_pretrained(folder)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert loaded.config.label2id == {name: number for number, name in enumerate(NAMES)}


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [RESNET, PREACTIVATED], ids=["linear head", "convolution as head"])
def test_a_network_of_timm_ranks_the_classes_of_every_test_image_as_the_probe(encoder, digits, tmp_path):
    model = paws(encoder)
    features, probe = fitted(model, digits)
    folder = export_classifier(model, probe, features, tmp_path / "out", class_names=NAMES, image_processor=PROCESSOR)
    logits = logits_of(folder, digits[1])
    np.testing.assert_array_equal(logits.argmax(axis=1), decided_by_probe(model, probe, digits[1]))
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(network(pixels_of(digits[1])).numpy(), logits, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["label_names"] == NAMES
    # as confident as the probe on average, though not image by image
    test = extract_features(model, digits[1], PROCESSOR, batch_size=256)
    spread = probe.predict_scores(test.features).std(axis=1).mean()
    assert 0.7 < logits.std(axis=1).mean() / spread < 1.4


@pytest.mark.slow
@pytest.mark.parametrize("make", [msn, lambda: paws(RESNET)], ids=["vit", "timm"])
def test_the_encoder_of_the_classifier_is_that_of_the_model(make, digits, tmp_path):
    model = make()
    features, probe = fitted(model, digits)
    folder = export_classifier(model, probe, features, tmp_path / "out", image_processor=PROCESSOR)
    sha256 = weights_sha256(model.evaluation_encoder)
    assert checkpoint_weights_sha256(folder) == sha256
    again = type(model).from_backbone(folder)
    assert weights_sha256(again.evaluation_encoder) == weights_sha256(again.encoder) == sha256


def test_a_probe_of_some_classes_names_only_those(digits, tmp_path):
    model = msn()
    features = extract_features(model, digits[0], PROCESSOR, batch_size=256)
    rows = np.isin(features.labels, [3, 8])
    probe = LogisticProbe().fit(features.features[rows], features.labels[rows])
    for names, expected in ((NAMES, {0: "three", 1: "eight"}), (None, {0: "3", 1: "8"})):
        folder = export_classifier(
            model, probe, features, tmp_path / str(names is None), class_names=names, image_processor=PROCESSOR
        )
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        assert loaded.config.id2label == expected and loaded.classifier.weight.shape == (2, 32)
        decided = np.array([3, 8])[logits_of(folder, digits[1]).argmax(axis=1)]
        np.testing.assert_array_equal(decided, decided_by_probe(model, probe, digits[1]))


def test_a_head_that_rounding_changes_is_an_error(digits, tmp_path):
    model = msn().bfloat16()
    features, probe = fitted(model, digits)
    with pytest.raises(ValueError, match=r"torch.bfloat16.* \d+ of 300 images"):
        export_classifier(model, probe, features, tmp_path / "out", image_processor=PROCESSOR)
    assert list(tmp_path.iterdir()) == []


class ThreeOtherwise(LogisticProbe):
    """Gives the first three images the class that is least likely."""

    def predict_scores(self, features):
        scores = super().predict_scores(features)
        scores[:3] *= -1
        return scores


def test_images_to_which_the_head_gives_another_class_are_counted(digits, tmp_path, caplog):
    model = msn()
    features, probe = fitted(model, digits, ThreeOtherwise())
    with caplog.at_level(logging.WARNING):
        export_classifier(model, probe, features, tmp_path / "out", image_processor=PROCESSOR)
    assert "3 of 300 images" in caplog.text


@pytest.mark.slow
def test_arguments_that_do_not_fit_are_errors_before_anything_is_written(digits, tmp_path):
    model, other = msn(), tiny_model(seed=1)
    features, probe = fitted(model, digits)
    two_blocks = extract_features(model, digits[0], PROCESSOR, batch_size=256, num_last_layers=2)
    projections = extract_features(model, digits[0], PROCESSOR, batch_size=256, features="projection")
    wide = LogisticProbe().fit(two_blocks.features, two_blocks.labels)
    faults = [
        ({"probe": LogisticProbe()}, r"`probe`.*LogisticProbe.*not fitted"),
        ({"probe": KNNProbe()}, "`probe`.*KNNProbe"),
        ({"probe": LinearProbe(epochs=1).fit(features.features, features.labels)}, r"`LinearProbe\(affine=False\)`"),
        ({"model": other}, "`features`.*this model's encoder"),
        ({"features": projections}, "`features`.*this model's encoder"),
        ({"features": features.features}, "`features`.*ndarray"),
        ({"probe": wide, "features": two_blocks}, "32 features.* 64"),
        ({"probe": wide}, "32 features.* 64.* 32"),
        ({"class_names": NAMES[:9]}, "`class_names`.* 9 names.* 0 to 9"),
        ({"class_names": "digits"}, "`class_names`"),
        ({"class_names": ["one"] * 10}, "`class_names`.*one"),
        ({"image_processor": evaluation_image_processor(20)}, "16 x 16"),
    ]
    given = {"model": model, "probe": probe, "features": features, "path": tmp_path / "out", "class_names": NAMES}
    for fault, message in faults:
        with pytest.raises(ValueError, match=message):
            export_classifier(**{**given, **fault})
    with torch.no_grad():
        model.target_encoder.layernorm.weight[5] = 0
    features, probe = fitted(model, digits)
    with pytest.raises(ValueError, match=r"1 of 32 features.*finetune_classifier"):
        export_classifier(model, probe, features, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_timm_takes_no_bias_and_no_small_stem(digits, tmp_path):
    model = paws(RESNET)
    features, probe = fitted(model, digits, LinearProbe(epochs=20, affine=False))
    with pytest.raises(ValueError, match=r"`probe`.*bias"):
        export_classifier(model, probe, features, tmp_path / "out")
    small = paws(RESNETV2)
    features, probe = fitted(small, digits)
    with pytest.raises(ValueError, match="small_image_stem"):
        export_classifier(small, probe, features, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
