"""Several ranks together must find the same as one rank. Each spawn runs all checks, as starting ranks is slow."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from tiny_semi_supervised import VIT
from transformers import ViTMSNConfig, ViTMSNModel

from hf_msn.data.sources import load_images
from hf_msn.data.transforms import evaluation_image_processor
from hf_msn.evaluation.features import extract_features
from hf_msn.evaluation.gathering import gather_objects, gather_rows, run_on_every_rank
from hf_msn.evaluation.low_shot import LowShotEvaluator

BROKEN_ROW, WORLD_SIZE = 10, 2


def make_model():
    torch.manual_seed(0)
    return ViTMSNModel(ViTMSNConfig(**{**VIT, "image_size": 8, "patch_size": 2}))


def make_data(broken=()):
    """31 images, a number that 2 ranks do not divide."""
    columns = load_images("digits").select(range(31)).to_dict()
    for row in broken:
        columns["image"][row] = {"bytes": b"no image", "path": f"broken_{row}.png"}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    return datasets.Dataset.from_dict(columns, features=features)


def error_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fails_on_rank_1():
    if dist.is_initialized() and dist.get_rank() == 1:
        raise OSError("disk is full")
    return dist.get_rank()


def findings(folder):
    """Return all results that must not depend on the number of ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model, processor = make_model(), evaluation_image_processor(8, crop_fraction=1.0)
    data = make_data()
    train, test = load_images("digits"), load_images("digits", split="test")
    evaluator = LowShotEvaluator(
        train.select(range(200)), test.select(range(0, 360, 9)), image_processor=processor, images_per_class=(1, 3)
    )
    cache = Path(folder) / f"cache_of_rank_{rank}"
    first = extract_features(model, data, processor, cache_dir=cache)
    return {
        "features": first,
        "cached": extract_features(model, data, processor, cache_dir=cache),
        "stream": extract_features(model, data.to_iterable_dataset(), processor),
        "fewer images than ranks": extract_features(model, data, processor, rows=np.array([5])),
        "broken": extract_features(model, make_data((BROKEN_ROW,)), processor),
        "broken is fatal": error_of(
            lambda: extract_features(model, make_data((BROKEN_ROW,)), processor, on_broken_image="raise")
        ),
        "metrics": evaluator(model),
    }


def findings_of_rank(rank, folder):
    counts = [3 * (other == 1) + 1 for other in range(WORLD_SIZE)]
    rows = np.full((counts[rank], 2), rank, dtype=np.int64)
    return findings(folder) | {
        "gathered rows": gather_rows(rows, counts, chunk_rows=2),
        "gathered objects": gather_objects({"rank": rank}),
        "failure": error_of(lambda: run_on_every_rank(fails_on_rank_1, lambda result: result)),
    }


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return findings(str(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The findings of each of 2 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(findings_of_rank, WORLD_SIZE, str(folder), timeout=100), folder


pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize("what", ["features", "cached", "stream", "fewer images than ranks", "broken"])
def test_all_ranks_get_the_features_of_one_rank_in_row_order(ranks, one_rank, what):
    expected = one_rank[what]
    for found in ranks[0]:
        np.testing.assert_array_equal(found[what].rows, expected.rows)
        np.testing.assert_array_equal(found[what].labels, expected.labels)
        np.testing.assert_allclose(found[what].features, expected.features, atol=1e-6)
        assert found[what].weights_sha256 == expected.weights_sha256
        assert [str(error) for error in found[what].skipped] == [str(error) for error in expected.skipped]


def test_cached_features_are_identical_and_only_rank_0_writes(ranks):
    found, folder = ranks
    for of_rank in found:
        np.testing.assert_array_equal(of_rank["cached"].features, of_rank["features"].features)
    assert [path.parent.name for path in folder.glob("*/*.safetensors")] == ["cache_of_rank_0"]


def test_broken_image_of_one_rank_stops_all(ranks, one_rank):
    assert f"row {BROKEN_ROW} " in one_rank["broken is fatal"]
    assert {found["broken is fatal"] for found in ranks[0]} == {one_rank["broken is fatal"]}


def test_ranks_share_the_fits_and_agree_with_one_rank(ranks, one_rank):
    for found in ranks[0]:
        assert found["metrics"] == pytest.approx(one_rank["metrics"])


def test_rows_and_objects_come_in_rank_order(ranks):
    for found in ranks[0]:
        expected = [0, 1, 1, 1, 1]
        np.testing.assert_array_equal(found["gathered rows"], np.stack([expected, expected], axis=1))
        assert found["gathered objects"] == [{"rank": rank} for rank in range(WORLD_SIZE)]


def test_failure_of_one_rank_is_raised_on_all(ranks):
    first, second = (found["failure"] for found in ranks[0])
    assert second == "OSError: disk is full"
    assert "rank 1" in first and second in first
