"""`load_images` on the Hub's own code path, against a local server."""

import sys
from types import SimpleNamespace

import datasets
import pytest
from hub_server import HubServer
from launch import run_ranks

from hf_msn import MultiViewTransform, decode_image, load_images

pytestmark = pytest.mark.slow

NAME = "someone/photos"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {
    "whole": {"split": "test", "revision": REVISION},
    "streamed": {"split": "test", "revision": REVISION, "streaming": True},
}


def _load(rank, url, folder) -> dict:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        HubServer.use_in_this_process(SimpleNamespace(url=url), patch, folder)
        constants = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": folder / "datasets"}
        for name, value in {**constants, "DOWNLOADED_DATASETS_PATH": folder / "downloads"}.items():
            patch.setattr(datasets.config, name, value)
        for name, settings in SETTINGS.items():
            rows = list(load_images(NAME, **settings))
            found[name] = {
                "columns": sorted(rows[0]),
                "labels": [row["label"] for row in rows],
                "paths": [row["image"]["path"] for row in rows],
                "sums": [sum(decode_image(row["image"]).tobytes()) for row in rows],
            }
    MultiViewTransform()
    assert "numba" not in sys.modules  # only views with colours or blur need it
    return found


@pytest.fixture(scope="module")
def answers(image_rows, tmp_path_factory) -> dict:
    """Results of `load_images` in a process of its own, as datasets and fsspec keep what they have seen."""
    folder = tmp_path_factory.mktemp("hub")
    files = {}
    for split, count in (("train", 3), ("test", 2)):
        path = folder / f"{split}.parquet"
        image_rows(count).to_parquet(str(path))
        files[f"{split}-00000-of-00001.parquet"] = path.read_bytes()
    with HubServer() as hub:
        hub.add_repo(f"datasets/{NAME}", files, sha=REVISION)
        return run_ranks(_load, 1, hub.url, folder)[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_hub_data_is_loaded(answers, picture, name):
    assert answers[name] == {
        "columns": ["image", "label"],
        "labels": [0, 1],
        "paths": ["photo_0.png", "photo_1.png"],
        "sums": [sum(picture(number).tobytes()) for number in range(2)],
    }
