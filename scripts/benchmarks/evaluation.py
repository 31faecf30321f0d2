"""Speed of the two halves of an evaluation, each against its baseline in the same run.

Features: `extract_features` on JPEG images in memory against the bare forward pass on tensors, in turns. Probe:
seconds until the objective is within 0.1 % of its minimum, for `LogisticProbe` and scikit-learn, on made-up features
of the size of 1 % of ImageNet.

    python scripts/benchmarks/evaluation.py --output runs/evaluation.json
    python scripts/benchmarks/evaluation.py --parts features --model vit_tiny --image_size 96
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from data import photographs
from report import check_known, machine, markdown_table, now, option, save, summarize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from transformers import HfArgumentParser, ViTMSNConfig, ViTMSNModel

from hf_msn import LogisticProbe, evaluation_image_processor, extract_features
from hf_msn.cli.main import run_script
from hf_msn.evaluation.probes import centre_and_normalize

MODELS = {"vit_tiny": (192, 12, 3), "s16": (384, 12, 6), "b16": (768, 12, 12), "l16": (1024, 24, 16)}
ITERATIONS = [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 256, 384]

# (max_iter, normalised features float64, raw features, labels) -> W (C, D)
Solver = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass
class BenchmarkArguments:
    parts: list[str] = option("Which half to measure.", ("features", "probe"))
    model: Literal["vit_tiny", "s16", "b16", "l16"] = option("Size of the encoder; patches of 16 pixels.", "s16")
    image_size: int = option("Pixels that the model sees, per side.", 224)
    images: int = option("Images per turn.", 64)
    batch_size: int = option("Images per batch.", 16)
    num_workers: int | None = option("Workers of extract_features; by default its own choice.")
    rows: int = option("Made-up features: 1 % of ImageNet has 12,811.", 12811)
    dimension: int = option("Dimension of the made-up features.", 384)
    classes: int = option("Classes of the made-up features.", 1000)
    noise: float = option("Standard deviation around the class centres, relative to theirs.", 2.5)
    l2: float = option("Penalty.", 0.075)
    within: float = option("Relative distance to the minimum that counts as reached.", 1e-3)
    repeats: int = option("Turns of each half.", 5)
    threads: int = option("CPU threads.", torch.get_num_threads())
    device: str = option("Device of our side.", "cuda" if torch.cuda.is_available() else "cpu")
    output: str | None = option("JSON file for settings, times and ratios.")

    def __post_init__(self):
        check_known("parts", self.parts, ("features", "probe"))


def measure_features(args: BenchmarkArguments) -> dict[str, Any]:
    """Return images per second of both, in turns, and the largest difference of their features."""
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
    dataset = photographs(args.images).add_column("label", [0] * args.images)
    processor = evaluation_image_processor(args.image_size)
    decoded = [dataset.cast_column("image", datasets.Image())[row]["image"] for row in range(args.images)]
    ready = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in decoded])
    batches = ready.to(args.device).split(args.batch_size)

    @torch.no_grad()
    def bare() -> np.ndarray:  # the [CLS] of the last block, before the final LayerNorm
        states = [model(batch, output_hidden_states=True).hidden_states[-1] for batch in batches]
        return torch.cat([state[:, 0] for state in states]).cpu().numpy()

    def extracted() -> np.ndarray:
        settings = {"batch_size": args.batch_size, "num_workers": args.num_workers}
        return extract_features(model, dataset, processor, **settings).features

    difference = float(np.abs(bare() - extracted()).max())
    seconds = {"bare": [], "extracted": []}
    for _ in range(args.repeats):
        for name, function in (("bare", bare), ("extracted", extracted)):
            started = now()
            function()
            seconds[name].append(now() - started)
    ratios = [b / e for b, e in zip(seconds["bare"], seconds["extracted"])]
    speeds = {name: summarize([args.images / value for value in values]) for name, values in seconds.items()}
    return {**speeds, "ratio": summarize(ratios), "largest_difference": difference}


def made_up_features(rows: int, dimension: int, classes: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Make class centres plus noise, float32 (rows, dimension), and labels (rows,).

    As in features of a network, all share an offset and the variance falls along the directions, here as 1 / k.
    """
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(rows) % classes)
    scale = np.arange(1, dimension + 1) ** -0.5
    directions = np.linalg.qr(generator.standard_normal((dimension, dimension)))[0]
    centres = generator.standard_normal((classes, dimension))
    features = ((centres[labels] + noise * generator.standard_normal((rows, dimension))) * scale) @ directions
    offset = np.sqrt((scale**2).mean()) * generator.standard_normal(dimension)
    return (features + offset).astype(np.float32), labels


def objective(weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray, l2: float) -> float:
    """Return (1/N) sum_i -log softmax(W x_i)[y_i] + (l2/N)/2 ||W||^2 in float64."""
    weights = np.asarray(weights, dtype=np.float64)
    scores = inputs @ weights.T
    largest = scores.max(axis=1)
    losses = largest + np.log(np.exp(scores - largest[:, None]).sum(axis=1)) - scores[np.arange(len(scores)), labels]
    return float(losses.mean() + l2 / len(inputs) / 2 * (weights**2).sum())


def ours(l2: float, device: str, tol: float = 1e-12) -> Solver:
    """`LogisticProbe` from the raw features: its time includes their normalisation."""

    def solve(max_iter, inputs, features, labels):
        return LogisticProbe(l2=l2, max_iter=max_iter, tol=tol, device=device).fit(features, labels).coef_

    return solve


def scikit_learn(l2: float, dtype: str) -> Solver:
    """L-BFGS of scikit-learn, which computes in the precision of its input."""

    def solve(max_iter, inputs, features, labels):
        solver = LogisticRegression(C=1 / l2, fit_intercept=False, max_iter=max_iter, tol=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return solver.fit(inputs.astype(dtype), labels).coef_

    return solve


def measure_probe(args: BenchmarkArguments) -> dict[str, Any]:
    """Find for each solver the fewest iterations that end near the minimum, and time them in turns.

    The minimum is the lowest objective of all runs and of our solver run to the end.
    """
    features, labels = made_up_features(args.rows, args.dimension, args.classes, args.noise)
    inputs = centre_and_normalize(features)
    solvers = {
        f"hf_msn ({args.device})": ours(args.l2, args.device),
        "scikit-learn, float32": scikit_learn(args.l2, "float32"),
        "scikit-learn, float64": scikit_learn(args.l2, "float64"),
    }
    best = objective(ours(args.l2, "cpu", tol=1e-8)(300, inputs, features, labels), inputs, labels, args.l2)

    def run(name: str, max_iter: int) -> tuple[float, float]:
        started = now()
        weights = solvers[name](max_iter, inputs, features, labels)
        return now() - started, objective(weights, inputs, labels, args.l2)

    with threadpool_limits(args.threads):
        curves = {}
        for name in solvers:
            run(name, 1)  # imports, kernels and memory of a first call
            curves[name] = []
            for max_iter in ITERATIONS:
                curves[name].append((max_iter, *run(name, max_iter)))
                if curves[name][-1][2] <= best * (1 + args.within):
                    break
        best = min(best, *(value for curve in curves.values() for *_, value in curve))
        results = {}
        for name, curve in curves.items():
            curve = [(max_iter, seconds, value / best - 1) for max_iter, seconds, value in curve]
            reached = min((max_iter for max_iter, _, excess in curve if excess <= args.within), default=None)
            results[name] = {"curve": curve, "iterations": reached}
        reached = [name for name, result in results.items() if result["iterations"] is not None]
        seconds = {name: [] for name in reached}
        for _ in range(args.repeats):
            for name in reached:
                seconds[name].append(run(name, results[name]["iterations"])[0])
    own = seconds.get(next(iter(solvers)), [])
    for name, result in results.items():
        times = seconds.get(name, [])
        result["seconds"] = summarize(times) if times else None
        result["ratio"] = summarize([theirs / mine for theirs, mine in zip(times, own)]) if times and own else None
    return results


def report(args: BenchmarkArguments, results: dict[str, Any]) -> None:
    """Print the tables."""
    if "features" in results:
        found = results["features"]
        print(f"Features: {args.model} at {args.image_size} px, batches of {args.batch_size}, {args.device}\n")
        rows = [["bare forward", found["bare"], "1"], ["extract_features", found["extracted"], found["ratio"]]]
        print(markdown_table(["", "images/s", "times the bare forward"], rows) + "\n")
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


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": machine(args.threads), "arguments": asdict(args)}
    if "features" in args.parts:
        results["features"] = measure_features(args)
    if "probe" in args.parts:
        results["probe"] = measure_probe(args)
    report(args, results)
    save(results, args.output)


if __name__ == "__main__":
    run_script(main)
