import io

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def picture():
    """Make an RGB image with pixels that depend on its number."""

    def make(number: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
        pixels = np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="session")
def encoded(picture):
    def make(number: int, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
        buffer = io.BytesIO()
        picture(number, size).save(buffer, kind)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def image_rows(encoded):
    """Make a dataset of n images, as `load_images` does; the rows in `broken` are truncated."""

    def make(count: int, broken: tuple[int, ...] = ()) -> datasets.Dataset:
        rows = [
            {"bytes": encoded(row)[: 40 if row in broken else None], "path": f"photo_{row}.png"}
            for row in range(count)
        ]
        features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
        return datasets.Dataset.from_dict({"image": rows, "label": list(range(count))}, features)

    return make


@pytest.fixture
def folder(tmp_path, picture):
    """Make image files: `{"train/cat/1.png": 5}` stores picture 5 there."""

    def make(files: dict[str, int], name: str = "photos [1]") -> str:
        for path, number in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(target)
        return str(tmp_path / name)

    return make


@pytest.fixture
def parquet(tmp_path, image_rows):
    def make(path: str, count: int = 3, **columns) -> str:
        dataset = image_rows(count)
        for name, values in columns.items():
            dataset = dataset.add_column(name, values)
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(str(target))
        return str(target)

    return make
