"""Images a second of the training step as batch, views, image size and ranks grow, with the peak memory of each point.

Along one axis the others stay at their base value. Every point runs in processes of its own, and all points take
turns, `--rounds` times, there and back, so that what else the machine does meets all of them.

    python scripts/benchmark_growth.py --output growth.json
    python scripts/benchmark_growth.py --model s16 --image_size 224 --axes batch size --precision fp32 bf16
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from benchmark_report import cell, machine, markdown_table, save, summarize
from benchmark_step import MODELS, ModelArguments, option
from transformers import HfArgumentParser


@dataclass(frozen=True)
class Point:
    """One setting of the training step; `batch` is of one rank."""

    batch: int
    views: int
    size: int
    ranks: int


AXES = {
    "batch": "images a rank",
    "views": "focal views an image",
    "size": "pixels of target and anchor",
    "ranks": "ranks",
}


@dataclass
class GrowthArguments(ModelArguments):
    model: Literal["vit_tiny", "s16", "b16", "l16", "b8", "b4", "l7"] = option("Size of the paper.", "vit_tiny")
    batch_size: int = option("Base value: images a rank.", 8)
    focal_views: int = option("Base value: small views an image.", 10)
    image_size: int = option("Base value: pixels of target and anchor. Focal views have about 3/7 of it.", 96)
    world_size: int = option("Base value: ranks.", 1)
    anchor_views: int = option("Masked global views an image, besides the target; the same in all points.", 1)
    axes: list[str] = field(
        default_factory=lambda: list(AXES), metadata={"help": f"What grows: of {', '.join(AXES)}."}
    )
    batch: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32], metadata={"help": "Values of that axis."})
    views: list[int] = field(default_factory=lambda: [0, 2, 4, 8, 10], metadata={"help": "Values of that axis."})
    size: list[int] = field(default_factory=lambda: [64, 96, 128, 160, 224], metadata={"help": "Values of that axis."})
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "Values of that axis."})
    precision: list[str] = field(default_factory=lambda: ["fp32"], metadata={"help": "fp32, bf16 (autocast) or both."})
    steps: int = option("Timed steps of a point in each round.", 5)
    warmup_steps: int = option("Steps before them.", 1)
    rounds: int = option("How often all points take their turn.", 2)
    threads: int = option("CPU threads, shared by the ranks of this machine.", 2)
    cpu: bool = option("Use the CPU where there is a GPU.", False)
    output: str | None = option("Write settings, times and memory to this JSON file, and a picture beside it.")

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("axes", list(AXES)), ("precision", ["fp32", "bf16"])):
            wrong = sorted(set(getattr(self, name)) - set(known))
            if wrong or not getattr(self, name):
                raise ValueError(f"`{name}` is of {', '.join(known)}, but is {getattr(self, name)}.")
        for name, least in (("steps", 1), ("warmup_steps", 1), ("rounds", 1), ("anchor_views", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, but is {getattr(self, name)}.")
        for axis, base, least in (
            ("batch", "batch_size", 2),
            ("views", "focal_views", 0),
            ("size", "image_size", self.patch_size),
            ("ranks", "world_size", 1),
        ):
            for name, given in ((base, [getattr(self, base)]), (axis, getattr(self, axis))):
                if not given or min(given) < least:
                    raise ValueError(f"`{name}` must be >= {least}, but is {given}.")
                if axis == "size" and any(size % self.patch_size for size in given):
                    raise ValueError(
                        f"`{name}` must be multiples of the patch size, {self.patch_size}, but is {given}."
                    )

    @property
    def base(self) -> Point:
        return Point(self.batch_size, self.focal_views, self.image_size, self.world_size)

    def points(self, axis: str) -> list[Point]:
        """The points along one axis, the base among them."""
        reached = sorted({*getattr(self, axis), getattr(self.base, axis)})
        return [Point(**{**asdict(self.base), axis: value}) for value in reached]

    def focal_size(self, size: int) -> int:
        """96 of 224 pixels, in whole patches, at least two of them."""
        return max(2, round(size * 96 / 224 / self.patch_size)) * self.patch_size

    def cost(self, point: Point) -> float:
        """Tokens an image that are trained on; those of the target count a third, for they have no backward."""
        patches, small = ((side // self.patch_size) ** 2 for side in (point.size, self.focal_size(point.size)))
        anchors = self.anchor_views * (1 + int(patches * (1 - self.mask_ratio) + 1e-9))
        return anchors + point.views * (1 + small) + (1 + patches) / 3


def run_point(args: GrowthArguments, point: Point, precision: str) -> dict[str, Any]:
    """Measures one point in processes of its own: `seconds` of each step, `peak_mib`.

    Raises:
        RuntimeError: The processes failed; with the end of what they said.
    """
    given = {name: getattr(args, name) for name in MODELS[args.model]}
    given |= {name: getattr(args, name) for name in ("model", "anchor_views", "steps", "warmup_steps", "threads")}
    given |= {"batch_size": point.batch, "focal_views": point.views, "image_size": point.size}
    given |= {"focal_size": args.focal_size(point.size), "precision": precision}
    start = [sys.executable]
    if point.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={point.ranks}"]
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "point.json"
        done = subprocess.run(
            [*start, str(Path(__file__).with_name("growth_point.py")), *flags, "--no_plain", "--output", str(output)]
            + ["--cpu"] * args.cpu,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, args.threads // point.ranks))},
            capture_output=True,
            text=True,
        )
        if done.returncode or not output.exists():
            raise RuntimeError(f"{point} in {precision} failed, exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(output.read_text())


def sweep(args: GrowthArguments, run: Callable = run_point) -> dict[str, dict[Point, dict[str, Any]]]:
    """Every point once in each round, there and back; a point of two axes is measured once for both."""
    turns = [
        (precision, point)
        for point in dict.fromkeys(point for axis in args.axes for point in args.points(axis))
        for precision in args.precision
    ]
    measured = {precision: {} for precision in args.precision}
    for number in range(args.rounds):
        for place, (precision, point) in enumerate(turns[:: -1 if number % 2 else 1]):
            print(f"round {number + 1}: {place + 1} of {len(turns)}, {precision} {point}", file=sys.stderr)
            found = run(args, point, precision)
            entry = measured[precision].setdefault(point, {"seconds": [], "peak_mib": []})
            entry["seconds"] += found["seconds"]
            entry["peak_mib"].append(found["peak_mib"])
    return measured


def summarize_axis(args: GrowthArguments, axis: str, measured: dict[Point, dict[str, Any]], gpu: bool) -> list[dict]:
    """One row for each point of an axis.

    `expected` is images a second if the time of an image grew as its tokens, from the base on; along the ranks of
    GPUs, if each rank were as fast as one alone. Ranks on the CPU share its cores, and a batch may fill them better:
    there nothing is expected.
    """
    base = measured[args.base]
    base_rate = median(args.batch_size * args.world_size / value for value in base["seconds"])
    rows = []
    for point in args.points(axis):
        entry = measured[point]
        expected = None
        if axis in ("views", "size"):
            expected = base_rate * args.cost(args.base) / args.cost(point)
        elif axis == "ranks" and gpu:
            expected = base_rate * point.ranks / args.world_size
        rows.append(
            {
                "value": getattr(point, axis),
                "tokens": args.cost(point),
                "images_per_second": summarize([point.batch * point.ranks / value for value in entry["seconds"]]),
                "expected": expected,
                "peak_mib": max(entry["peak_mib"]),
                "seconds": entry["seconds"],
            }
        )
    return rows


def report(args: GrowthArguments, measured: dict[str, dict[Point, dict[str, Any]]]) -> dict[str, Any]:
    """Prints a table for each axis; returns what they show, as JSON takes it."""
    gpu = torch.cuda.is_available() and not args.cpu
    memory = "largest rank's GPU memory" if gpu else "largest rank's resident memory, imports included"
    views = f"1 target + {args.anchor_views} anchor + {args.focal_views} focal views"
    print(
        f"{args.model} ({args.hidden_size} x {args.num_hidden_layers}, patch {args.patch_size}), "
        f"{args.mask_ratio:.0%} dropped; base: batch {args.batch_size}, {views}, {args.image_size} and "
        f"{args.focal_size(args.image_size)} px, {args.world_size} rank{'s' * (args.world_size > 1)}\n"
        f"{machine()['processor']}, {args.threads} threads for all ranks, torch {torch.__version__}; "
        f"images/s: median of {args.rounds} x {args.steps} steps (quartiles); peak: {memory}"
    )
    axes = {}
    for axis in args.axes:
        found = {precision: summarize_axis(args, axis, measured[precision], gpu) for precision in args.precision}
        columns, rows = [AXES[axis], "tokens trained an image"], []
        for precision in args.precision:
            columns += [f"{precision}, images/s", "by tokens" if axis != "ranks" else "by ranks", "peak, MiB"]
        for lines in zip(*found.values()):
            row = [lines[0]["value"], f"{lines[0]['tokens']:.0f}"]
            for line in lines:
                row += [cell(line["images_per_second"]), None, f"{line['peak_mib']:.0f}"]
                row[-2] = "-" if line["expected"] is None else f"{line['expected']:.2f}"
            rows.append(row)
        if all(line["expected"] is None for line in found[args.precision[0]]):
            kept = [place for place, title in enumerate(columns) if not title.startswith("by ")]
            columns, rows = [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]
        print(f"\n{markdown_table(columns, rows)}")
        axes[axis] = found
    return {"arguments": asdict(args), "machine": machine(args.threads), "axes": axes}


def picture(results: dict[str, Any]):
    """A panel for each axis: images a second with quartiles, and as a dashed line what is expected."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results["axes"]), figsize=(3.6 * len(results["axes"]), 3.2), squeeze=False)
    for axes, (axis, found) in zip(panels[0], results["axes"].items()):
        for color, (precision, rows) in zip(("tab:blue", "tab:orange"), found.items()):
            at = [row["value"] for row in rows]
            rates = [row["images_per_second"] for row in rows]
            spread = [
                [rate["median"] - rate["quartiles"][0] for rate in rates],
                [rate["quartiles"][1] - rate["median"] for rate in rates],
            ]
            axes.errorbar(at, [rate["median"] for rate in rates], spread, color=color, marker="o", label=precision)
            if rows[0]["expected"] is not None:
                label = "each rank as one alone" if axis == "ranks" else "time linear in tokens"
                axes.plot(at, [row["expected"] for row in rows], "--", color=color, alpha=0.6, label=label)
        axes.set(xlabel=AXES[axis], ylabel="images / s", ylim=(0, None), xticks=at)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"Training step, {results['arguments']['model']}")
    figure.tight_layout()
    return figure


def main() -> None:
    (args,) = HfArgumentParser(GrowthArguments, description=__doc__).parse_args_into_dataclasses()
    results = report(args, sweep(args))
    save(results, args.output, picture(results) if args.output else None)


if __name__ == "__main__":
    main()
