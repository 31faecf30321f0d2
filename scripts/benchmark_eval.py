"""Speed of the two halves of an evaluation, each beside its baseline in the same run.

Features: `extract_features` on JPEG images in memory and the bare forward on tensors that are ready, turn by turn.
Probe: seconds until the objective is within 0.1 % of its minimum, for `LogisticProbe`, scikit-learn and, where it is
installed (`pip install cyanure`), cyanure, on made-up features of the size of 1 % of ImageNet.

    python scripts/benchmark_eval.py --output eval.json
    python scripts/benchmark_eval.py --parts features --model vit_tiny --image_size 96
"""

import io
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from benchmark_report import machine, markdown_table, save, summarize
from PIL import Image
from probe_solvers import cyanure, has_cyanure, made_up_features, ours, scikit_learn, time_solvers
from transformers import HfArgumentParser, ViTMSNConfig, ViTMSNModel

from hf_msn import evaluation_image_processor, extract_features

MODELS = {"vit_tiny": (192, 12, 3), "s16": (384, 12, 6), "b16": (768, 12, 12), "l16": (1024, 24, 16)}
PARTS = ("features", "probe")
ITERATIONS = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384]


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class BenchmarkArguments:
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "features, probe or both."})
    model: str = option("vit_tiny, s16, b16 or l16, all with patches of 16 pixels.", "s16")
    image_size: int = option("Pixels that the model sees, a side.", 224)
    source_size: int | None = option("Pixels of the shorter side of the JPEG images. By default 1.75 x image_size.")
    images: int = option("Images of one turn.", 64)
    batch_size: int = option("Images at a time.", 16)
    num_workers: int | None = option("Of extract_features; by default what it chooses.")
    rows: int = option("Made-up features: 1 % of ImageNet has 12,811.", 12811)
    dimension: int = option("Of the made-up features.", 384)
    classes: int = option("Of the made-up features.", 1000)
    noise: float = option("Standard deviation around the class centres, in theirs.", 2.5)
    l2: float = option("Penalty.", 0.075)
    within: float = option("How near to the minimum, relative, counts as there.", 1e-3)
    repeats: int = option("Turns of each half.", 5)
    threads: int = option("Of all that compute.", torch.get_num_threads())
    device: str = option("Where ours computes.", "cuda" if torch.cuda.is_available() else "cpu")
    output: str | None = option("JSON file; the picture lies beside it as PNG.")

    def __post_init__(self):
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"`parts` must be some of {PARTS}, but is {self.parts}. By default both are measured.")
        if self.model not in MODELS:
            raise ValueError(f"`model` must be one of {sorted(MODELS)}, but is {self.model!r}.")
        for name in ("images", "batch_size", "repeats", "threads", "dimension"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, but is {getattr(self, name)}.")
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"`image_size` must be a multiple of 16, the side of a patch, but is {self.image_size}.")
        if not 2 <= self.classes <= self.rows:
            raise ValueError(
                f"`classes` must lie between 2 and the {self.rows} rows, so that each has one, but is {self.classes}."
            )
        if not (self.l2 > 0 and self.within > 0):
            raise ValueError(f"`l2` and `within` must be > 0, but are {self.l2} and {self.within}.")


def jpeg_images(count: int, size: int) -> datasets.Dataset:
    """JPEG files in memory, 4:3, of smooth random content as photographs have it."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((size * 4 // 3, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        images.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": [0] * count}, features=features)


def measure_features(args: BenchmarkArguments) -> dict[str, Any]:
    """Images a second of both, turn by turn, and the largest difference of their features."""
    hidden_size, layers, heads = MODELS[args.model]
    torch.manual_seed(0)
    config = ViTMSNConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        image_size=args.image_size,
    )
    model = ViTMSNModel(config).eval().to(args.device)
    dataset = jpeg_images(args.images, args.source_size or round(1.75 * args.image_size))
    processor = evaluation_image_processor(args.image_size)
    decoded = [dataset.cast_column("image", datasets.Image())[row]["image"] for row in range(args.images)]
    ready = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in decoded])
    batches = ready.to(args.device).split(args.batch_size)

    @torch.no_grad()
    def bare() -> np.ndarray:  # the [CLS] of the last block, before the final LayerNorm
        states = [model(batch, output_hidden_states=True).hidden_states[-1] for batch in batches]
        return torch.cat([state[:, 0] for state in states]).cpu().numpy()

    def extracted() -> np.ndarray:
        return extract_features(
            model, dataset, processor, batch_size=args.batch_size, num_workers=args.num_workers
        ).features

    difference = float(np.abs(bare() - extracted()).max())
    seconds = {"bare": [], "extracted": []}
    for _ in range(args.repeats):
        for name, function in (("bare", bare), ("extracted", extracted)):
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    ratios = [b / e for b, e in zip(seconds["bare"], seconds["extracted"])]
    speeds = {name: summarize([args.images / value for value in values]) for name, values in seconds.items()}
    return {**speeds, "ratio": summarize(ratios), "largest_difference": difference}


def measure_probe(args: BenchmarkArguments) -> dict[str, Any]:
    """What `time_solvers` says, with summaries and ratios to ours."""
    features, labels = made_up_features(args.rows, args.dimension, args.classes, args.noise)
    solvers = {
        f"hf_msn ({args.device})": ours(args.l2, args.device),
        "scikit-learn, float32": scikit_learn(args.l2, "float32"),
        "scikit-learn, float64": scikit_learn(args.l2, "float64"),
    }
    if has_cyanure():
        solvers["cyanure"] = cyanure(args.l2, args.threads)
    else:
        print("cyanure is not installed and left out: pip install cyanure\n")
    results = time_solvers(
        solvers,
        features,
        labels,
        args.l2,
        within=args.within,
        iterations=ITERATIONS,
        repeats=args.repeats,
        threads=args.threads,
    )
    own_seconds = next(iter(results.values()))["seconds"]
    for result in results.values():
        pairs = zip(result["seconds"], own_seconds)
        result["ratio"] = (
            summarize([theirs / own for theirs, own in pairs]) if result["seconds"] and own_seconds else None
        )
        result["seconds"] = summarize(result["seconds"]) if result["seconds"] else None
    return results


def report(args: BenchmarkArguments, results: dict[str, Any]) -> None:
    """Prints the tables."""
    if "features" in results:
        measured = results["features"]
        print(f"Features: {args.model} at {args.image_size} px, batches of {args.batch_size}, {args.device}\n")
        rows = [
            ["bare forward", measured["bare"], "1"],
            ["extract_features", measured["extracted"], measured["ratio"]],
        ]
        print(markdown_table(["", "images/s", "of the bare forward"], rows) + "\n")
    if "probe" in results:
        print(
            f"Probe: {args.rows:,} x {args.dimension} features, {args.classes:,} classes, l2 {args.l2}, until within "
            f"{args.within:g} of the minimum, {args.threads} threads\n"
        )
        rows = [
            [name, result["iterations"] or "not reached", result["seconds"], result["ratio"]]
            for name, result in results["probe"].items()
        ]
        print(markdown_table(["solver", "iterations", "seconds", "times ours"], rows))


def picture(args: BenchmarkArguments, results: dict[str, Any]) -> Any:
    """The objective over time for each solver; without the probe the features' bars."""
    from benchmark_report import bars
    from matplotlib import pyplot as plt

    if "probe" not in results:
        named = {"bare forward": results["features"]["bare"], "extract_features": results["features"]["extracted"]}
        return bars(named, "images/s", f"Features, {args.model} at {args.image_size} px")
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, result in results["probe"].items():
        _, seconds, excess = zip(*result["curve"])
        axes.plot(seconds, np.maximum(excess, 1e-9), marker="o", label=name)
    axes.axhline(args.within, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds", ylabel="objective above its minimum, relative", yscale="log", xscale="log")
    axes.set_title(f"Logistic probe, {args.rows:,} x {args.dimension}, {args.classes:,} classes")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": machine(args.threads), "arguments": asdict(args)}
    if "features" in args.parts:
        results["features"] = measure_features(args)
    if "probe" in args.parts:
        results["probe"] = measure_probe(args)
    report(args, results)
    save(results, args.output, picture(args, results) if args.output else None)


if __name__ == "__main__":
    main()
