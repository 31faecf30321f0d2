"""Images per second of the input pipeline on one core, against torchvision on Pillow images, and memory by rows.

python scripts/benchmarks/data.py --output runs/data.json
"""

import io
import itertools
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageFilter
from report import bars, machine, markdown_table, option, save, summarize
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import HfArgumentParser

from hf_msn import (
    MultiViewCollator,
    MultiViewDataset,
    MultiViewTransform,
    as_crops,
    decode_image,
    multi_view_dataset,
)
from hf_msn.cli.main import run_script

FEATURES = datasets.Features(image=datasets.Image(decode=False))
SIZES = ((500, 375), (375, 500), (500, 333), (400, 300), (640, 480), (500, 500))


@dataclass
class DataArguments:
    images: int = option("Made-up photographs of several sizes around 500 x 375.", 64)
    repeats: int = option("Timed passes over them; the pipelines take turns in each.", 7)
    batch_size: int = option("Images per batch.", 16)
    image_size: int = option("Side of the target and anchor views, in pixels.", 224)
    focal_size: int = option("Side of the focal views, in pixels.", 96)
    focal_views: int = option("Focal views per image.", 10)
    rows: list[int] = option("Rows of the streamed data sets.", (1_000, 100_000, 10_000_000))
    batches: int = option("Batches read of each stream.", 1000)
    output: str | None = option("JSON file for the numbers; a picture goes beside it.")

    def __post_init__(self):
        if self.images < self.batch_size or self.batches < 2:
            raise ValueError(
                f"`images` must fill a batch of {self.batch_size} and `batches` be >= 2, but they are {self.images} "
                f"and {self.batches}."
            )

    def transform(self) -> MultiViewTransform:
        return MultiViewTransform(image_size=self.image_size, focal_size=self.focal_size, focal_views=self.focal_views)


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """Make a JPEG of (width, height) with the statistics of a photograph: amplitudes fall as 1 / frequency."""
    generator = np.random.default_rng(seed)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(3):
        noise = generator.normal(size=frequency.shape) + 1j * generator.normal(size=frequency.shape)
        plane = np.fft.irfft2(noise / frequency, s=(height, width))
        planes.append(plane / plane.std())
    light, warm, tint = planes
    colors = np.stack([light + 0.4 * warm, light + 0.2 * tint, light - 0.4 * warm], axis=-1)
    pixels = np.clip(generator.uniform(90, 150) + 45 * colors, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photographs(count: int) -> datasets.Dataset:
    """Make a data set of photographs of several sizes."""
    images = [
        {"bytes": photograph(number, size), "path": f"{number}.jpg"}
        for number, size in zip(range(count), itertools.cycle(SIZES))
    ]
    return datasets.Dataset.from_dict({"image": images}, FEATURES)


def stream(rows: int, side: int = 32) -> datasets.IterableDataset:
    """Return a streamed data set of `rows` small images, which are made while reading."""
    return datasets.IterableDataset.from_generator(_small_images, FEATURES, gen_kwargs={"rows": rows, "side": side})


def _small_images(rows: int, side: int):
    encoded = [photograph(number, (side, side)) for number in range(64)]
    for row in range(rows):
        yield {"image": {"bytes": encoded[row % len(encoded)], "path": f"{row}.jpg"}}


class PlainPipeline:
    """The views of a [`MultiViewTransform`] by torchvision's transforms on Pillow images, view by view."""

    def __init__(self, like: MultiViewTransform):
        self.like = like
        self.make_global = self._transform(like.image_size, like.global_scale)
        self.make_focal = self._transform(like.focal_size, like.focal_scale)

    def _transform(self, size: int, scale: tuple[float, float]) -> transforms.Compose:
        like, strength = self.like, self.like.color_jitter
        jitter = transforms.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)

        def blur(image: Image.Image) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(*like.blur_radius)))

        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, ratio=like.aspect_ratio),
                transforms.RandomHorizontalFlip(like.horizontal_flip),
                transforms.RandomApply([jitter], p=like.color_jitter_probability),
                transforms.RandomGrayscale(p=like.grayscale),
                transforms.RandomApply([blur], p=like.blur_probability),
                transforms.ToTensor(),
                transforms.Normalize(like.image_mean, like.image_std),
            ]
        )

    def __call__(self, encoded: bytes) -> dict[str, torch.Tensor]:
        """Decode one image and make its views."""
        with Image.open(io.BytesIO(encoded)) as file:
            image = file.convert("RGB")
        views = {
            "pixel_values": self.make_global(image),
            "anchor_pixel_values": torch.stack([self.make_global(image) for _ in range(self.like.anchor_views)]),
        }
        if self.like.focal_views:
            views["focal_pixel_values"] = torch.stack([self.make_focal(image) for _ in range(self.like.focal_views)])
        return views


class Pipelines:
    """The compared pipelines. Each makes a batch of views from row numbers; all draw the same kinds of views."""

    def __init__(self, args: DataArguments, dataset: datasets.Dataset):
        self.transform = args.transform()
        self.values = dataset[:]["image"]
        self.plain, self.collate = PlainPipeline(self.transform), MultiViewCollator()
        self.views = MultiViewDataset(dataset, self.transform)
        self.cut = as_crops(self.views)
        self.by_name = {
            "decode alone": lambda rows: [decode_image(self.values[row]) for row in rows],
            "torchvision + Pillow": self.plainly,
            "hf_msn, crops (a worker)": self.crops,
            "hf_msn, complete on CPU": self.complete,
        }

    def plainly(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.plain(self.values[row]["bytes"]) for row in rows])

    def crops(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.collate(self.cut.__getitems__(rows))

    def complete(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.transform.finish(self.crops(rows))

    def check_same_work(self, rows: list[int], views: int = 300) -> None:
        """Check that ours and plain views agree in shape, and in mean and deviation of some hundred views to 0.25."""
        ours, theirs = {}, {}
        for epoch in range(math.ceil(views / len(rows))):
            self.views.set_epoch(epoch)
            for gathered, made in ((ours, self.complete(rows)), (theirs, self.plainly(rows))):
                for name, tensor in made.items():
                    gathered.setdefault(name, []).append(tensor)
        for name in theirs:
            own, plain = torch.cat(ours[name]), torch.cat(theirs[name])
            apart = max(abs(own.mean() - plain.mean()).item(), abs(own.std() - plain.std()).item())
            if own.shape != plain.shape or apart > 0.25:
                raise RuntimeError(
                    f"The pipelines do different work: `{name}` has shape {tuple(own.shape)}, plainly "
                    f"{tuple(plain.shape)}, and mean or deviation differ by {apart:.2f}."
                )


def measure_pipelines(args: DataArguments, pipelines: Pipelines) -> dict[str, list[float]]:
    """Return seconds per image of each pass by each pipeline, on one thread; they take turns at every batch."""
    first_rows = range(0, args.images - args.batch_size + 1, args.batch_size)
    batches = [list(range(row, row + args.batch_size)) for row in first_rows]
    for make in pipelines.by_name.values():  # compile, and load into memory
        make(batches[0])
    seconds = {name: [0.0] * args.repeats for name in pipelines.by_name}
    for repeat in range(args.repeats):
        pipelines.views.set_epoch(repeat)
        for rows in batches:
            for name, make in pipelines.by_name.items():
                started = time.perf_counter()
                make(rows)
                seconds[name][repeat] += (time.perf_counter() - started) / (len(batches) * args.batch_size)
    return seconds


def measure_rows(args: DataArguments) -> list[dict[str, Any]]:
    """Return time to the first batch and growth of memory for streams of each number of rows."""
    results = []
    transform = MultiViewTransform(image_size=16, focal_size=8, focal_views=2)
    for rows in (min(args.rows), *args.rows):  # the smallest twice: what is loaded only once is in memory after it
        dataset = multi_view_dataset(stream(rows), transform)
        dataset.repeat = True
        loader = DataLoader(as_crops(dataset), args.batch_size, collate_fn=MultiViewCollator())
        started, batches = time.perf_counter(), iter(loader)
        next(batches)
        first, before = time.perf_counter() - started, resident_mib()
        for _ in range(args.batches - 1):
            next(batches)
        memory = {"first batch": before, "last batch": resident_mib()}
        results.append({"rows": rows, "first_batch_seconds": first, "resident_mib": memory})
    return results[1:]


def resident_mib() -> float:
    """Return the memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def report(args: DataArguments, seconds, bytes_sent, streamed) -> dict[str, Any]:
    """Print the tables. Return their contents for the JSON file."""
    rates = {name: summarize([1 / value for value in values]) for name, values in seconds.items()}
    plain = seconds["torchvision + Pillow"]
    ratios = {name: summarize([a / b for a, b in zip(plain, values)]) for name, values in seconds.items()}
    views = f"1 target + 1 anchor of {args.image_size} px, {args.focal_views} focal views of {args.focal_size} px"
    print(f"{views}; one thread of {machine(1)['processor']}; medians of {args.repeats} passes (quartiles)\n")
    rows = [[name, rates[name], ratios[name]] for name in rates]
    print(markdown_table(["one core", "images/s", "times torchvision + Pillow"], rows))
    rows = [[name, f"{number / 1024:.0f}"] for name, number in bytes_sent.items()]
    print("\n" + markdown_table(["a worker sends", "KiB per image"], rows))
    rows = [
        [f"{s['rows']:,}", f"{s['first_batch_seconds']:.2f}", *(f"{v:.0f}" for v in s["resident_mib"].values())]
        for s in streamed
    ]
    columns = ["rows, streamed", "first batch, s", "MiB at the first batch", f"MiB at batch {args.batches}"]
    print("\n" + markdown_table(columns, rows))
    return {
        "arguments": asdict(args),
        "machine": machine(1),
        "images_per_second": rates,
        "ratio_to_plain": ratios,
        "seconds_per_image": seconds,
        "bytes_per_image": bytes_sent,
        "streamed": streamed,
    }


def main() -> None:
    (args,) = HfArgumentParser(DataArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    streamed = measure_rows(args)  # first, while nothing else is in memory
    pipelines = Pipelines(args, photographs(args.images))
    rows = list(range(args.batch_size))
    pipelines.check_same_work(rows)
    seconds = measure_pipelines(args, pipelines)
    bytes_sent = {
        name: sum(tensor.nbytes for tensor in make(rows).values()) / len(rows)
        for name, make in (("finished views", pipelines.complete), ("crops and parameters", pipelines.crops))
    }
    results = report(args, seconds, bytes_sent, streamed)
    rates = results["images_per_second"]
    save(results, args.output, bars(rates, "images / s", "Input pipeline, one core") if args.output else None)


if __name__ == "__main__":
    run_script(main)
