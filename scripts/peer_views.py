"""What `benchmark_peers.py` compares on the data side: the views of one image by each library, and ours."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from peer_sides import Shape
from PIL import Image

from hf_msn import MultiViewTransform, decode_image


@dataclass
class Views:
    """One library's way from a JPEG to the views of one image.

    Attributes:
        name: As the table shows it.
        make: Bytes of the file -> all views, float32 and normalised, the large ones first, as a list.
        differs: What it leaves out or does otherwise, a line each.
    """

    name: str
    make: Callable[[bytes], list[torch.Tensor]]
    differs: list[str] = field(default_factory=list)


def our_views(shape: Shape) -> Views:
    """`decode_image` and `MultiViewTransform`."""
    transform = MultiViewTransform(
        image_size=shape.image_size,
        focal_size=shape.focal_size,
        anchor_views=shape.anchor_views,
        focal_views=shape.focal_views,
    )

    def make(jpeg: bytes) -> list[torch.Tensor]:
        views = transform(decode_image({"bytes": jpeg, "path": None}))
        return [views["pixel_values"], *views["anchor_pixel_values"], *views.get("focal_pixel_values", ())]

    return Views("hf_msn", make)


def measure_views(makers: list[Views], jpegs: list[bytes], shape: Shape) -> dict[str, list[float]]:
    """Seconds of the views of each image by each side, on one thread.

    Raises:
        RuntimeError: A side makes views of other shapes, not in float32 or not finite.
    """
    expected = [(3, shape.image_size, shape.image_size)] * (1 + shape.anchor_views)
    expected += [(3, shape.focal_size, shape.focal_size)] * shape.focal_views
    for maker in makers:
        views = maker.make(jpegs[0])
        made = [tuple(view.shape) for view in views]
        if made != expected or any(view.dtype != torch.float32 or not view.isfinite().all() for view in views):
            raise RuntimeError(f"The views of {maker.name} must be float32 of shapes {expected}, but are {made}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {maker.name: [] for maker in makers}
    for number, jpeg in enumerate(jpegs):
        for place in range(len(makers)):
            maker = makers[(number + place) % len(makers)]
            started = time.perf_counter()
            maker.make(jpeg)
            seconds[maker.name].append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return seconds


def made_up_jpegs(number: int, width: int, height: int) -> list[bytes]:
    """Coloured clouds with some grain, about as large in bytes as a photograph of that size."""
    files = []
    for seed in range(number):
        random = np.random.default_rng(seed)
        clouds = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
        grain = random.normal(0, 8, (height, width, 1))
        image = Image.fromarray((np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8))
        files.append(io.BytesIO())
        image.save(files[-1], "JPEG", quality=90)
    return [file.getvalue() for file in files]
