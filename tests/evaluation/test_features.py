import logging

import datasets
import numpy as np
import pytest
import torch

from hf_msn.data.decoding import BrokenImageError, decode_image
from hf_msn.data.transforms import evaluation_image_processor
from hf_msn.evaluation import features as features_module
from hf_msn.evaluation.backbones import weights_sha256
from hf_msn.evaluation.features import extract_features, pixel_features


@pytest.fixture
def some_digits(digits):
    return digits[0].select(range(0, 1437, 60))


def one_by_one(model, dataset, processor):
    """CLS of the last block, image by image."""
    rows = []
    for example in dataset:
        pixels = processor(images=decode_image(example["image"]), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            rows.append(model(pixels, output_hidden_states=True).hidden_states[-1][0, 0].numpy())
    return np.array(rows)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_of_a_batch_are_those_of_each_image(tiny_vit, some_digits, processor, num_workers):
    features = extract_features(tiny_vit, some_digits, processor, batch_size=7, num_workers=num_workers)
    np.testing.assert_allclose(features.features, one_by_one(tiny_vit, some_digits, processor), atol=1e-5)
    assert features.features.dtype == np.float32
    np.testing.assert_array_equal(features.labels, some_digits["label"][:])
    np.testing.assert_array_equal(features.rows, np.arange(24))


def test_stream_gives_the_same_features(tiny_vit, some_digits, processor):
    expected = extract_features(tiny_vit, some_digits, processor)
    streamed = extract_features(tiny_vit, some_digits.to_iterable_dataset(num_shards=3), processor, num_workers=2)
    np.testing.assert_allclose(streamed.features, expected.features, atol=1e-6)
    np.testing.assert_array_equal(streamed.labels, expected.labels)
    np.testing.assert_array_equal(streamed.rows, expected.rows)


def test_only_the_given_rows_are_extracted(tiny_vit, some_digits, processor):
    features = extract_features(tiny_vit, some_digits, processor, rows=np.array([20, 3, 11]))
    np.testing.assert_array_equal(features.rows, [3, 11, 20])
    expected = extract_features(tiny_vit, some_digits, processor)
    np.testing.assert_allclose(features.features, expected.features[[3, 11, 20]], atol=1e-6)
    np.testing.assert_array_equal(features.labels, expected.labels[[3, 11, 20]])


def test_training_mode_and_random_state_are_unchanged(tiny_vit, some_digits, processor):
    tiny_vit.train()
    state = torch.get_rng_state()
    first = extract_features(tiny_vit, some_digits, processor, num_workers=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_vit.training
    np.testing.assert_array_equal(extract_features(tiny_vit, some_digits, processor).features, first.features)


def test_model_can_be_trained_after_extraction(tiny_vit, some_digits, processor):
    extract_features(tiny_vit, some_digits, processor)
    tiny_vit.train()(torch.randn(2, 3, 8, 8)).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in tiny_vit.parameters())


def test_bfloat16_is_close_and_comes_back_as_float32(tiny_vit, some_digits, processor):
    exact = extract_features(tiny_vit, some_digits, processor).features
    rounded = extract_features(tiny_vit, some_digits, processor, dtype=torch.bfloat16).features
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()
    rounded = extract_features(tiny_vit.bfloat16(), some_digits.remove_columns("label"), processor)
    assert np.abs(rounded.features - exact).max() < 0.1 * np.abs(exact).max() and rounded.labels is None
    with pytest.raises(ValueError, match=r"`dtype` .* None, torch.bfloat16, but is torch.float32"):
        extract_features(tiny_vit, some_digits, processor, dtype=torch.float32)


def test_broken_images_are_skipped_and_logged(tiny_vit, some_digits, processor, with_broken, caplog):
    dataset = with_broken(some_digits, (2, 13))
    with caplog.at_level(logging.WARNING):
        features = extract_features(tiny_vit, dataset, processor, batch_size=4)
    good = [row for row in range(24) if row not in (2, 13)]
    np.testing.assert_array_equal(features.rows, good)
    np.testing.assert_array_equal(features.labels, np.array(some_digits["label"][:])[good])
    np.testing.assert_allclose(features.features, one_by_one(tiny_vit, some_digits.select(good), processor), atol=1e-5)
    assert [error.row for error in features.skipped] == [2, 13]
    assert "2 images are skipped, 22 remain" in caplog.text
    assert "row 13 (path 'broken_13.png')" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_image_raises_on_request(tiny_vit, some_digits, processor, with_broken, num_workers):
    dataset = with_broken(some_digits, (13,))
    with pytest.raises(BrokenImageError, match=r"row 13 \(path 'broken_13.png'\)") as caught:
        extract_features(tiny_vit, dataset, processor, on_broken_image="raise", num_workers=num_workers)
    assert caught.value.row == 13


def test_no_readable_image_raises(tiny_vit, some_digits, processor, with_broken):
    dataset = with_broken(some_digits.select(range(3)), (0, 1, 2))
    with pytest.raises(ValueError, match=r"none of 3 .* row 0"):
        extract_features(tiny_vit, dataset, processor)


def test_images_of_different_size_raise(tiny_vit):
    arrays = [np.zeros((8, 8), np.uint8), np.zeros((8, 9), np.uint8)]
    dataset = datasets.Dataset.from_dict({"image": arrays}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) and \(3, 8, 9\)"):
        pixel_features(dataset)


def test_pixels_of_digits_are_their_values_in_every_channel(some_digits):
    features = pixel_features(some_digits)
    assert features.features.shape == (24, 3 * 64)
    image = np.asarray(decode_image(some_digits[5]["image"]), dtype=np.float64) / 255
    np.testing.assert_allclose(features.features[5].reshape(3, 8, 8), image.transpose(2, 0, 1), atol=1e-7)


@pytest.fixture
def count_passes(monkeypatch):
    passes = []
    one_pass = features_module._pass
    monkeypatch.setattr(features_module, "_pass", lambda *args: (passes.append(1), one_pass(*args))[1])
    return passes


def test_cached_features_are_read_and_identical(tiny_vit, some_digits, processor, with_broken, tmp_path, count_passes):
    dataset = with_broken(some_digits, (4,))
    first = extract_features(tiny_vit, dataset, processor, cache_dir=tmp_path)
    again = extract_features(tiny_vit, dataset, processor, cache_dir=tmp_path, batch_size=3)
    assert len(count_passes) == 1
    for name in ("features", "labels", "rows"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert [(error.row, error.path) for error in again.skipped] == [(4, "broken_4.png")]
    with pytest.raises(BrokenImageError, match="row 4"):
        extract_features(tiny_vit, dataset, processor, cache_dir=tmp_path, on_broken_image="raise")


@pytest.mark.parametrize(
    "change", ["weights", "data", "rows", "image_processor", "features", "num_last_layers", "dtype"]
)
def test_cache_is_missed_when_features_would_change(tiny_vit, some_digits, processor, tmp_path, count_passes, change):
    arguments = {"cache_dir": tmp_path}
    extract_features(tiny_vit, some_digits, processor, **arguments)
    if change == "weights":
        with torch.no_grad():
            tiny_vit.embeddings.cls_token[0, 0, 0] += 1
    elif change == "data":
        some_digits = some_digits.select(range(23, -1, -1))
    elif change == "image_processor":
        processor = type(processor).from_dict({**processor.to_dict(), "image_mean": [0, 0, 0]})
    elif change == "features":
        tiny_vit.project = lambda pixels: pixels[:, 0, 0]  # by the same weights
        arguments["features"] = "projection"
    else:
        arguments |= {"rows": {"rows": np.arange(9)}, "dtype": {"dtype": torch.bfloat16}}.get(
            change, {"num_last_layers": 2}
        )
    fresh = extract_features(tiny_vit, some_digits, processor, **arguments)
    assert len(count_passes) == 2
    uncached = extract_features(tiny_vit, some_digits, processor, **{**arguments, "cache_dir": None})
    np.testing.assert_array_equal(fresh.features, uncached.features)


def test_head_matters_for_projections_only(around_timm, some_digits, tmp_path, count_passes):
    processor = evaluation_image_processor(32, crop_fraction=1.0)

    def extract(features):
        return extract_features(around_timm, some_digits, processor, cache_dir=tmp_path, features=features)

    backbone, projection = extract("backbone"), extract("projection")
    assert (backbone.features.shape[1], projection.features.shape[1]) == (around_timm.encoder.num_features, 5)
    assert backbone.weights_sha256 == weights_sha256(around_timm.encoder) != projection.weights_sha256
    assert len(count_passes) == 2
    with torch.no_grad():
        around_timm.projection_head.fc3.bias[3] += 1
    again, moved = extract("backbone"), extract("projection")
    assert len(count_passes) == 3  # the features of the backbone are still cached
    assert again.weights_sha256 == backbone.weights_sha256
    assert moved.weights_sha256 != projection.weights_sha256
    np.testing.assert_allclose(moved.features - projection.features, [[0, 0, 0, 1, 0]] * 24, atol=1e-5)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_broken_cache_file_is_logged_and_replaced(
    tiny_vit, some_digits, processor, tmp_path, caplog, count_passes, damage
):
    expected = extract_features(tiny_vit, some_digits, processor, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        again = extract_features(tiny_vit, some_digits, processor, cache_dir=tmp_path)
    assert str(file) in caplog.text
    np.testing.assert_array_equal(again.features, expected.features)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


def test_cache_that_cannot_be_written_is_only_logged(tiny_vit, some_digits, processor, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        features = extract_features(tiny_vit, some_digits, processor, cache_dir=tmp_path / "file" / "cache")
    assert len(features) == 24
    assert "cannot be cached" in caplog.text


def test_image_processor_without_a_repr_is_not_cached(tiny_vit, some_digits, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        extract_features(tiny_vit, some_digits, features_module.unit_range, cache_dir=tmp_path)
    assert "not cached" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` .* but is 0"),
        ({"on_broken_image": "ignore"}, "`on_broken_image` .* but is 'ignore'"),
        ({"rows": np.array([24])}, "`rows` .* from 0 to 23, but holds 24"),
        ({"dtype": "bfloat16"}, "`dtype` .* but is 'bfloat16'"),
        ({"dtype": torch.float64}, "`dtype` .* but is torch.float64"),
    ],
)
def test_arguments_out_of_range_are_refused(tiny_vit, some_digits, processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        extract_features(tiny_vit, some_digits, processor, **arguments)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda digits: digits.rename_column("image", "img"), r"\['img', 'label'\]"),
        (lambda digits: [1, 2], "is a list"),
        (lambda digits: digits.to_iterable_dataset(), "streaming=False"),
    ],
)
def test_data_without_images_is_refused(tiny_vit, some_digits, processor, dataset, message):
    with pytest.raises(ValueError, match=message):
        extract_features(tiny_vit, dataset(some_digits), processor, rows=np.array([0]))
