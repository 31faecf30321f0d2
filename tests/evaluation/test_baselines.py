"""The baselines of a low-shot evaluation: nearest neighbours, the untrained network, raw pixels."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import tiny_model
from tiny_semi_supervised import RESNET18, tiny_paws
from transformers import TimmWrapperConfig, TimmWrapperModel, ViTMSNConfig, ViTMSNModel

from hf_msn import (
    KNNProbe,
    LogisticProbe,
    LowShotEvaluator,
    decode_image,
    evaluation_image_processor,
    extract_features,
    load_images,
)
from hf_msn.evaluation import low_shot
from hf_msn.evaluation.baselines import raw_pixel_features, untrained_like
from hf_msn.hub.results import read_results

PROCESSOR = evaluation_image_processor(16, crop_fraction=1.0)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits").select(range(60)), load_images("digits", split="test[:40]")


def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


def evaluator_of(digits, **settings) -> LowShotEvaluator:
    settings = {"baselines": low_shot.BASELINES, **settings}
    return LowShotEvaluator(*digits, image_processor=PROCESSOR, images_per_class=(1, 2), num_splits=2, **settings)


def test_baselines_are_measured_on_the_same_splits(digits):
    model = trained(tiny_model(seed=3))
    evaluator = evaluator_of(digits, seed=3)
    metrics = evaluator(model)
    expected = {
        "knn": (model, KNNProbe()),
        "untrained": (tiny_model(seed=3), LogisticProbe()),
    }
    for name, (network, probe) in expected.items():
        alone = evaluator_of(digits, seed=3, probe=probe, baselines=())(network)
        for task in ("1_per_class", "2_per_class"):
            assert metrics[f"low_shot/{task}/{name}_top1"] == alone[f"low_shot/{task}/top1"]
    features = [raw_pixel_features(data, PROCESSOR) for data in digits]
    alone = evaluator_of(digits, seed=3, baselines=()).evaluate_features(*features)
    assert metrics["low_shot/2_per_class/pixels_top1"] == alone["low_shot/2_per_class/top1"]
    assert [split.seed for split in evaluator.results.baselines["pixels"][0].splits] == [3, 4]


def test_raw_pixels_are_the_whole_image_at_the_size_of_the_processor_but_at_most_64(digits):
    image = decode_image(digits[0][5]["image"])
    same = raw_pixel_features(digits[0], evaluation_image_processor(8)).features[5]
    assert np.array_equal(same, np.array(image, dtype=np.float32).transpose(2, 0, 1).ravel() / 255)
    for size, expected in ((16, 16), (96, 64)):
        features = raw_pixel_features(digits[0], evaluation_image_processor(size)).features
        resized = np.array(image.resize((expected, expected), Image.Resampling.BICUBIC), dtype=np.float32)
        assert np.array_equal(features[5], resized.transpose(2, 0, 1).ravel() / 255)


def test_models_that_do_not_change_are_measured_once(digits, monkeypatch):
    calls = []

    def counted(model, *args, **kwargs):
        calls.append(model)
        return extract_features(model, *args, **kwargs)

    made = []
    monkeypatch.setattr(low_shot, "extract_features", counted)
    monkeypatch.setattr(low_shot, "untrained_like", lambda *args: made.append(untrained_like(*args)) or made[-1])
    evaluator, model = evaluator_of(digits), tiny_model()
    first = evaluator(model)
    second = evaluator(trained(model))
    assert [call is model for call in calls] == [True, True, False, False, True, True]
    assert len(made) == 1
    names = ("low_shot/1_per_class/untrained_top1", "low_shot/1_per_class/pixels_top1")
    assert all(first[name] == second[name] for name in names)


def test_the_random_state_of_training_is_kept(digits):
    model, before = tiny_model(), torch.get_rng_state()
    evaluator_of(digits)(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["msn", "encoder", "paws on timm", "timm", "transformers on timm"])
def test_the_untrained_network_has_the_same_architecture_and_other_weights(kind):
    if kind == "msn":
        model = trained(tiny_model())
    elif kind == "encoder":
        model = trained(tiny_model()).encoder
    elif kind == "paws on timm":
        model = trained(tiny_paws(**RESNET18).float())
    else:
        model = timm.create_model("test_vit")
        if kind == "transformers on timm":
            model = TimmWrapperModel(TimmWrapperConfig(architecture="test_vit"))
    fresh, again = untrained_like(model, seed=5), untrained_like(model, seed=5)
    ours, theirs = ([*network.state_dict().values()] for network in (fresh, again))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))
    assert not fresh.training


def test_an_untrained_vit_msn_tells_positions_apart():
    config = ViTMSNConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=16, patch_size=4)
    fresh = untrained_like(ViTMSNModel(config))
    assert fresh.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.2)
    assert fresh(torch.randn(1, 3, 16, 16)).last_hidden_state.shape == (1, 17, 16)


class Scaled(ViTMSNModel):
    def __init__(self, config, scale):
        super().__init__(config)


def test_a_network_that_cannot_be_made_again_has_no_untrained_baseline(digits):
    assert (
        untrained_like(Scaled(ViTMSNConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1), 2.0)) is None
    )
    model = timm.create_model("test_vit", num_classes=0)
    model.blocks = model.blocks[:1]
    evaluator = LowShotEvaluator(*digits, images_per_class=(1,), num_splits=1, baselines=low_shot.BASELINES)
    evaluator(model)
    assert list(evaluator.results.baselines) == ["knn", "pixels"]


def test_baselines_are_in_the_table_and_in_the_file(digits, tmp_path):
    evaluator = evaluator_of(digits)
    evaluator(tiny_model())
    results = evaluator.results
    lines = results.table().splitlines()
    assert len(lines) == 2 + 2 * 4
    value = results.baselines["pixels"][1].summary["top1"]
    assert f"{value:.1f}" in lines[-1]
    results.save(tmp_path / "low_shot.json")
    assert read_results(tmp_path / "low_shot.json") == results
    earlier = json.loads((tmp_path / "low_shot.json").read_text())
    del earlier["baselines"]  # as written before there were any
    (tmp_path / "low_shot.json").write_text(json.dumps(earlier))
    assert read_results(tmp_path / "low_shot.json").baselines == {}


def test_an_unknown_baseline_is_refused_and_a_nearest_neighbour_probe_has_none_of_its_kind(digits):
    with pytest.raises(ValueError, match="raw"):
        evaluator_of(digits, baselines=("raw",))
    evaluator = evaluator_of(digits, probe=KNNProbe(), baselines=("knn",))
    evaluator(tiny_model())
    assert evaluator.results.baselines == {}
