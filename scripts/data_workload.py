"""Made-up photographs, and streams of any number of rows of them, for scripts/benchmark_data.py."""

import io
import itertools
from collections.abc import Iterator

import datasets
import numpy as np
from PIL import Image

FEATURES = datasets.Features(image=datasets.Image(decode=False))
PHOTOGRAPHS = ((500, 375), (375, 500), (500, 333), (400, 300), (640, 480), (500, 500))


def photograph(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG file with the statistics of a photograph: amplitudes fall as 1 / frequency, colours go together.

    Args:
        number (`int`): Seed.
        size (`tuple[int, int]`): Width and height in pixels.
    """
    random = np.random.default_rng(number)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(3):
        noise = random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)
        plane = np.fft.irfft2(noise / frequency, s=(height, width))
        planes.append(plane / plane.std())
    light, warm, tint = planes
    colors = np.stack([light + 0.4 * warm, light + 0.2 * tint, light - 0.4 * warm], axis=-1)
    pixels = np.clip(random.uniform(90, 150) + 45 * colors, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photographs(count: int) -> datasets.Dataset:
    """A data set of `count` photographs of several sizes around 500 x 375."""
    images = [
        {"bytes": photograph(number, size), "path": f"{number}.jpg"}
        for number, size in zip(range(count), itertools.cycle(PHOTOGRAPHS))
    ]
    return datasets.Dataset.from_dict({"image": images}, FEATURES)


def stream(rows: int, side: int = 32) -> datasets.IterableDataset:
    """A streamed data set of `rows` small images, made while reading: nothing of it is in memory or on disk."""
    return datasets.IterableDataset.from_generator(_small_images, FEATURES, gen_kwargs={"rows": rows, "side": side})


def _small_images(rows: int, side: int) -> Iterator[dict]:
    encoded = [photograph(number, (side, side)) for number in range(64)]
    for row in range(rows):
        yield {"image": {"bytes": encoded[row % len(encoded)], "path": f"{row}.jpg"}}
