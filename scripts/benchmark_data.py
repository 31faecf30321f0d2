"""Measure the input pipeline: images a second on one core beside the usual torchvision and Pillow code, and growth.

python scripts/benchmark_data.py --output runs/data.json
"""

import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_report import bars, machine, markdown_table, save, summarize
from data_workload import photographs, stream
from plain_pipeline import KorniaFinish, PlainPipeline
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_msn import (
    MultiViewCollator,
    MultiViewDataset,
    MultiViewTransform,
    as_crops,
    decode_image,
    multi_view_dataset,
)

_COMPARED_VIEWS = 300


@dataclass
class DataArguments:
    """What is read, and how often."""

    images: int = field(default=64, metadata={"help": "Photographs, made up, of several sizes around 500 x 375."})
    repeats: int = field(default=7, metadata={"help": "Measured passes over them; each way takes its turn in each."})
    batch_size: int = field(default=16, metadata={"help": "Images of a batch."})
    image_size: int = field(default=224, metadata={"help": "Side of the target and anchor views, in pixels."})
    focal_size: int = field(default=96, metadata={"help": "Side of the focal views, in pixels."})
    focal_views: int = field(default=10, metadata={"help": "Focal views of an image."})
    workers: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Processes that read: what waiting is measured with."}
    )
    step_seconds: float = field(default=0.1, metadata={"help": "Length of the made-up step that a batch waits for."})
    rows: list[int] = field(
        default_factory=lambda: [1_000, 100_000, 10_000_000], metadata={"help": "Rows of the streamed data sets."}
    )
    batches: int = field(default=1000, metadata={"help": "Batches read of each, in several passes if need be."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the numbers; a PNG goes beside it."})

    def __post_init__(self):
        lowest = {"images": 1, "repeats": 1, "batch_size": 1, "batches": 2, "step_seconds": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, but is {getattr(self, name)}.")
        for name, least in (("workers", 0), ("rows", 1)):
            if not getattr(self, name) or min(getattr(self, name)) < least:
                raise ValueError(f"`{name}` must be numbers >= {least}, but is {getattr(self, name)}.")
        if self.images < self.batch_size:
            raise ValueError(f"`images` must fill a batch of {self.batch_size}, but is {self.images}.")

    def transform(self) -> MultiViewTransform:
        return MultiViewTransform(image_size=self.image_size, focal_size=self.focal_size, focal_views=self.focal_views)


class Ways:
    """Each way to make a batch of views, from the numbers of its rows. All draw the same kinds of views."""

    def __init__(self, args: DataArguments, dataset):
        self.transform = args.transform()
        self.values = dataset[:]["image"]
        self.plain, self.collate = PlainPipeline(self.transform), MultiViewCollator()
        self.views = MultiViewDataset(dataset, self.transform)
        self.cut = as_crops(self.views)
        self.ways = {
            "decode alone": self.decoded,
            "torchvision + Pillow": self.plainly,
            "hf_msn, crops (a worker)": self.crops,
            "hf_msn, complete on CPU": self.complete,
        }
        try:
            self.kornia = KorniaFinish(self.transform)
            self.ways["hf_msn crops + kornia"] = self.by_kornia
        except ImportError:
            print("kornia is not installed: left out")

    def decoded(self, rows: list[int]) -> list:
        return [decode_image(self.values[row]) for row in rows]

    def plainly(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.plain(self.values[row]["bytes"]) for row in rows])

    def crops(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.collate(self.cut.__getitems__(rows))

    def complete(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.transform.finish(self.crops(rows))

    def by_kornia(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.kornia(self.crops(rows))

    def check_same_work(self, rows: list[int]) -> None:
        """Views of both pipelines must be alike: shapes, and mean and deviation of some hundred views within 0.25."""
        ours, theirs = {}, {}
        for epoch in range(math.ceil(_COMPARED_VIEWS / len(rows))):
            self.views.set_epoch(epoch)
            for views, made in ((ours, self.complete(rows)), (theirs, self.plainly(rows))):
                for name, tensor in made.items():
                    views.setdefault(name, []).append(tensor)
        for name in theirs:
            ours[name], theirs[name] = torch.cat(ours[name]), torch.cat(theirs[name])
            statistics = [(views.mean().item(), views.std().item()) for views in (ours[name], theirs[name])]
            apart = max(abs(one - other) for one, other in zip(*statistics))
            if ours[name].shape != theirs[name].shape or apart > 0.25:
                raise RuntimeError(
                    f"`{name}` has shape {tuple(ours[name].shape)}, mean and deviation {statistics[0]}, and plainly "
                    f"{tuple(theirs[name].shape)}, {statistics[1]}: the pipelines do other work, and their times mean "
                    "nothing."
                )


def measure_ways(args: DataArguments, ways: Ways) -> dict[str, list[float]]:
    """Seconds of each pass over the images by each way, on one thread; the ways take turns at every batch."""
    starts = range(0, args.images - args.batch_size + 1, args.batch_size)
    batches = [list(range(start, start + args.batch_size)) for start in starts]
    for way in ways.ways.values():  # compiled, and in memory
        way(batches[0])
    seconds = {name: [0.0] * args.repeats for name in ways.ways}
    for repeat in range(args.repeats):
        ways.views.set_epoch(repeat)
        for rows in batches:
            for name, way in ways.ways.items():
                started = time.perf_counter()
                way(rows)
                seconds[name][repeat] += (time.perf_counter() - started) / (len(batches) * args.batch_size)
    return seconds


def measure_waiting(args: DataArguments, ways: Ways) -> list[dict[str, Any]]:
    """How long a step of `step_seconds` that leaves the processor alone, as a GPU's does, waits for its batch."""
    results = []
    for workers in args.workers:
        loader = DataLoader(
            ways.cut,
            args.batch_size,
            num_workers=workers,
            collate_fn=ways.collate,
            persistent_workers=workers > 0,
            drop_last=True,
        )
        waits = []
        for _ in range(2):
            batches, left = iter(loader), len(loader)
            while left:
                started = time.perf_counter()
                next(batches)
                waits.append(time.perf_counter() - started)
                time.sleep(args.step_seconds)
                left -= 1
        results.append({"workers": workers, "wait_seconds": summarize(waits[len(waits) // 2 :])})
    return results


def measure_rows(args: DataArguments) -> list[dict[str, Any]]:
    """Time to the first batch of a stream and growth of memory over the others, for each number of rows."""
    results = []
    transform = MultiViewTransform(image_size=16, focal_size=8, focal_views=2)
    # the smallest twice: what is loaded only once is in memory after the first
    for rows in (min(args.rows), *args.rows):
        dataset = multi_view_dataset(stream(rows), transform)
        dataset.repeat = True
        loader = DataLoader(as_crops(dataset), args.batch_size, collate_fn=MultiViewCollator())
        started, batches = time.perf_counter(), iter(loader)
        next(batches)
        first, before = time.perf_counter() - started, resident_mib()
        for _ in range(args.batches - 1):
            next(batches)
        seconds = time.perf_counter() - started - first
        results.append(
            {
                "rows": rows,
                "first_batch_seconds": first,
                "images_per_second": (args.batches - 1) * args.batch_size / seconds,
                "resident_mib": {"first batch": before, "last batch": resident_mib()},
            }
        )
    return results[1:]


def resident_mib() -> float:
    """Memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def report(args: DataArguments, seconds, bytes_sent, waiting, growth) -> dict[str, Any]:
    """Prints the tables; returns what they show, as JSON takes it."""
    rates = {name: summarize([1 / value for value in values]) for name, values in seconds.items()}
    plain = seconds["torchvision + Pillow"]
    ratios = {name: summarize([a / b for a, b in zip(plain, values)]) for name, values in seconds.items()}
    views = f"1 target + 1 anchor of {args.image_size} px, {args.focal_views} focal views of {args.focal_size} px"
    print(f"{views}; one thread of {machine(1)['processor']}; medians of {args.repeats} passes (quartiles)\n")
    rows = [[name, rates[name], ratios[name]] for name in rates]
    print(markdown_table(["one core", "images/s", "times torchvision + Pillow"], rows))
    rows = [[name, f"{number / 1024:.0f}"] for name, number in bytes_sent.items()]
    print("\n" + markdown_table(["a worker sends", "KiB an image"], rows))
    rows = [[entry["workers"], entry["wait_seconds"]] for entry in waiting]
    print("\n" + markdown_table(["workers", f"a step of {args.step_seconds} s waits, s"], rows))
    rows = [
        [
            f"{entry['rows']:,}",
            f"{entry['first_batch_seconds']:.2f}",
            f"{entry['images_per_second']:.0f}",
            *(f"{value:.0f}" for value in entry["resident_mib"].values()),
        ]
        for entry in growth
    ]
    columns = ["rows, streamed", "first batch, s", "images/s", "MiB at the first batch", f"at batch {args.batches}"]
    print("\n" + markdown_table(columns, rows))
    return {
        "arguments": asdict(args),
        "machine": machine(1),
        "images_per_second": rates,
        "ratio_to_plain": ratios,
        "seconds_per_image": seconds,
        "bytes_per_image": bytes_sent,
        "waiting": waiting,
        "streamed": growth,
    }


def main() -> None:
    (args,) = HfArgumentParser(DataArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    growth = measure_rows(args)  # first, while the memory has nothing else in it
    ways = Ways(args, photographs(args.images))
    rows = list(range(args.batch_size))
    ways.check_same_work(rows)
    seconds = measure_ways(args, ways)
    bytes_sent = {
        name: sum(tensor.nbytes for tensor in make(rows).values()) / len(rows)
        for name, make in (("finished views", ways.complete), ("crops and parameters", ways.crops))
    }
    results = report(args, seconds, bytes_sent, measure_waiting(args, ways), growth)
    rates = results["images_per_second"]
    save(results, args.output, bars(rates, "images / s", "Input pipeline, one core") if args.output else None)


if __name__ == "__main__":
    main()
