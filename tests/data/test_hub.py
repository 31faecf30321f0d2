"""`load_images` on the Hub's own code path, against a local server."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import HubServer

pytestmark = pytest.mark.slow

NAME = "someone/photos"
REVISION = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import json, sys
from hf_msn import MultiViewTransform, decode_image, load_images
answers = {}
for name, settings in json.loads(sys.argv[1]).items():
    rows = list(load_images("someone/photos", **settings))
    answers[name] = {
        "columns": sorted(rows[0]),
        "labels": [row["label"] for row in rows],
        "paths": [row["image"]["path"] for row in rows],
        "sums": [sum(decode_image(row["image"]).tobytes()) for row in rows],
    }
assert "numba" not in sys.modules  # only views with colours or blur need it
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(image_rows, tmp_path_factory) -> dict:
    """Results of `load_images` in a new process, as the address of the Hub is read on import."""
    folder = tmp_path_factory.mktemp("hub")
    files = {}
    for split, count in (("train", 3), ("test", 2)):
        path = folder / f"{split}.parquet"
        image_rows(count).to_parquet(str(path))
        files[f"{split}-00000-of-00001.parquet"] = path.read_bytes()
    settings = {
        "whole": {"split": "test", "revision": REVISION},
        "streamed": {"split": "test", "revision": REVISION, "streaming": True},
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    with HubServer() as hub:
        hub.add_repo(f"datasets/{NAME}", files, sha=REVISION)
        environment = {**os.environ, **hub.environment(folder), "HF_DATASETS_CACHE": str(folder / "datasets")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["whole", "streamed"])
def test_hub_data_is_loaded(answers, picture, name):
    assert answers[name] == {
        "columns": ["image", "label"],
        "labels": [0, 1],
        "paths": ["photo_0.png", "photo_1.png"],
        "sums": [sum(picture(number).tobytes()) for number in range(2)],
    }
