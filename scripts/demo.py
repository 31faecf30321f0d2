"""MSN and PAWS end to end on scikit-learn's digits: pretrain, evaluate with few labels, export, draw.

python scripts/demo.py [--output_dir runs/demo] [--config scripts/recipes/digits.yaml] [--FIELD VALUE ...]

Any field of MSN's recipe can be given another value: --max_steps 500. For PAWS there are --paws_config,
--paws_max_steps and --supervised_epochs; --num_splits 2 is a shorter evaluation.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import demo_figures as figures
import demo_labels
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from transformers import AutoImageProcessor, AutoModel, PrinterCallback, TrainerCallback, logging, set_seed

from hf_msn import (
    LogisticProbe,
    LowShotEvaluator,
    export_backbone,
    extract_features,
    parse_recipe,
    pixel_features,
)
from hf_msn.cli.main import run_script

IMAGES_PER_CLASS = (1, 2, 5, 10)
# of PAWS and of the supervised encoder, which are trained anew for each split
TRAINED_IMAGES_PER_CLASS = 5
# the paper's for few labels, for all features alike; raw pixels' own best is 0.1 better at 5 and 10 labels, 1.1 at 1
L2 = 0.0025


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, default=Path("runs/demo"), help="Folder to make anew."
    )
    parser.add_argument("--config", default=str(Path(__file__).parent / "recipes" / "digits.yaml"), help="The recipe.")
    parser.add_argument(
        "--paws_config",
        "--paws-config",
        default=str(Path(__file__).parent / "recipes" / "paws_digits.yaml"),
        help="PAWS's recipe.",
    )
    parser.add_argument(
        "--paws_max_steps", "--paws-max-steps", default=None, help="Steps of PAWS, if not those of its recipe."
    )
    parser.add_argument(
        "--supervised_epochs", "--supervised-epochs", type=int, default=None, help="Epochs of the supervised encoder."
    )
    parser.add_argument(
        "--num_splits", "--num-splits", type=int, default=5, help="Draws of the labelled images, 2 or more."
    )
    args, overrides = parser.parse_known_args(arguments)
    started = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # so small a model gains little from two, which crawl as soon as one core is busy
    with made_anew(args.output_dir) as folder:
        run_dir = ["--output_dir", str(folder / "pretraining"), "--overwrite_output_dir", "true"]
        recipe = parse_recipe(["--config", args.config, *overrides, *run_dir])
        trainer, untrained = pretrain(recipe)
        trainer.save_model(folder / "pretraining")
        trainer.save_state()
        images = {split: recipe.data.load(split) for split in ("train", "test")}
        processor = recipe.build_image_processor()
        check_export(trainer.model, images["test"], processor, folder / "model")
        shutil.copy(folder / "pretraining" / "run.json", folder / "model")  # how it was trained, for its card
        features = {
            "msn": {split: extract_features(trainer.model, images[split], processor) for split in images},
            "pixels": {split: pixel_features(images[split]) for split in images},
            "untrained": {split: extract_features(untrained, images[split], processor) for split in images},
        }
        scores = evaluate(images, features, args.num_splits) | train_with_labels(args, folder)
        (folder / "low_shot.json").write_text(json.dumps(scores, indent=2) + "\n")
        draw(trainer, features, scores, args.num_splits, folder)
    print_scores(scores, len(images["test"]), args.num_splits)
    print(f"\nEverything is in {args.output_dir}/. It took {time.monotonic() - started:.0f} s.")


def pretrain(recipe):
    """Train on the images without their labels. Return the trainer, and the model as it was before."""
    recipe.training.disable_tqdm = True
    set_seed(recipe.training.seed)
    trainer = recipe.build_trainer(callbacks=[ProgressLines()])
    trainer.remove_callback(PrinterCallback)
    untrained = copy.deepcopy(trainer.model)
    trainer.train()
    return trainer, untrained


def check_export(model, images, processor, folder: Path) -> None:
    """Save the target encoder as a plain ViTMSNModel, load it with transformers alone, and compare the features."""
    export_backbone(model, folder, image_processor=processor)
    loaded = extract_features(AutoModel.from_pretrained(folder), images, AutoImageProcessor.from_pretrained(folder))
    difference = np.abs(loaded.features - extract_features(model, images, processor).features).max()
    if not difference < 1e-5:
        raise RuntimeError(
            f"The features of '{folder}', loaded by AutoModel, differ from the model's by {difference}."
        )
    print(f"Exported to {folder.name}/; AutoModel loads it, its features differ by at most {difference:.0e}.\n")


def evaluate(images, features, num_splits: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return accuracy in per cent, `scores["msn"]["5"]["mean"]` and `["std"]`, with equal labels for all features."""
    evaluator = LowShotEvaluator(
        images["train"],
        images["test"],
        images_per_class=IMAGES_PER_CLASS,
        num_splits=num_splits,
        probe=LogisticProbe(l2=L2),
    )
    scores = {}
    for name, of_split in features.items():
        metrics = evaluator.evaluate_features(of_split["train"], of_split["test"])
        scores[name] = {
            str(count): {
                "mean": metrics[f"low_shot/{count}_per_class/top1"],
                "std": metrics[f"low_shot/{count}_per_class/top1_std"],
            }
            for count in IMAGES_PER_CLASS
        }
    return scores


def train_with_labels(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return accuracy in per cent of PAWS and of the supervised encoder, with the labels of `evaluate`'s splits."""
    print(
        f"Training with {TRAINED_IMAGES_PER_CLASS} labels per class, on each of the {args.num_splits} splits: PAWS, "
        "and the same encoder supervised"
    )
    overrides = [] if args.paws_max_steps is None else ["--max_steps", args.paws_max_steps]
    found = []
    results = demo_labels.train_on_splits(
        args.paws_config, overrides, args.num_splits, TRAINED_IMAGES_PER_CLASS, folder, args.supervised_epochs
    )
    for split, result in enumerate(results):
        found.append(result)
        print(f"  split {split}   PAWS {result['paws']:.1f}   supervised {result['supervised']:.1f}", flush=True)
    print()
    return {
        name: {
            str(TRAINED_IMAGES_PER_CLASS): {
                "mean": float(np.mean([result[name] for result in found])),
                "std": float(np.std([result[name] for result in found], ddof=1)),
            }
        }
        for name in ("paws", "supervised")
    }


def draw(trainer, features, scores, num_splits: int, folder: Path) -> None:
    train, test = features["msn"]["train"], features["msn"]["test"]
    figures.draw_low_shot(scores, num_splits, len(test), folder / "low_shot.png")
    figures.draw_training(trainer.state.log_history, trainer.model.config.num_prototypes, folder / "training.png")
    search = NearestNeighbors(n_neighbors=8, metric="cosine").fit(train.features)
    figures.draw_neighbours(
        gray_images(features["pixels"]["test"].features),
        test.labels,
        gray_images(features["pixels"]["train"].features),
        train.labels,
        search.kneighbors(test.features, return_distance=False),
        folder / "neighbours.png",
    )
    of_test = {name: features[name]["test"].features for name in ("untrained", "pixels", "msn")}
    figures.draw_embedding(of_test, test.labels, folder / "embedding.png", seed=trainer.args.seed)


def gray_images(pixels: np.ndarray) -> np.ndarray:
    """Map (N, 3 * H * H) raw pixels of gray images to (N, H, H)."""
    side = round((pixels.shape[1] / 3) ** 0.5)
    return pixels.reshape(-1, 3, side, side)[:, 0]


def print_scores(scores, num_test: int, num_splits: int) -> None:
    print(
        f"Accuracy [%] on the {num_test} test images, mean ± standard deviation of {num_splits} splits: features by "
        "logistic regression,\nPAWS and the supervised encoder, trained with the same labels, by themselves"
    )
    print(f"{'labelled images per class':<24}" + "".join(f"{count:>14}" for count in IMAGES_PER_CLASS))
    for name, by_count in scores.items():
        entries = (by_count.get(str(count)) for count in IMAGES_PER_CLASS)
        cells = ("" if entry is None else f"{entry['mean']:.1f} ± {entry['std']:.1f}" for entry in entries)
        print((f"{figures.NAMES[name]:<24}" + "".join(f"{cell:>14}" for cell in cells)).rstrip())


class ProgressLines(TrainerCallback):
    """Print ten lines per run instead of a log line every few steps."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = sum(parameter.numel() for parameter in model.encoder.parameters())
        print(
            f"Pretraining without labels: an encoder of {weights / 1e6:.2f} million weights, {state.max_steps} steps "
            f"of {args.train_batch_size} images"
        )
        self.started, self.printed = time.monotonic(), 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step / state.max_steps
        if "prototypes_in_use" not in logs or int(10 * done) <= self.printed:
            return
        self.printed = int(10 * done)
        left = (time.monotonic() - self.started) * (1 / done - 1)
        print(
            f"  step {state.global_step:>5}   loss {logs['loss']:.3f}   "
            f"prototypes in use {logs['prototypes_in_use']:>3}   "
            f"{logs['images_per_second']:.0f} images/s   {left:.0f} s left",
            flush=True,
        )


@contextmanager
def made_anew(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to. It replaces `folder` only when everything is done; until then the old one stays.

    Raises:
        ValueError: If `folder` holds something else than an earlier demo.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "low_shot.json").is_file():
        raise ValueError(
            f"`output_dir` is made anew by each demo, but '{folder}' holds something else. Remove it, or choose "
            "another."
        )
    unfinished, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "replaced"))
    if replaced.exists() and not folder.exists():  # the last run was stopped between the two renames below
        os.replace(replaced, folder)
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(unfinished, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    try:
        run_script(main)
    except KeyboardInterrupt:
        sys.exit("Stopped. Nothing of this run was kept; the results of an earlier one are as they were.")
