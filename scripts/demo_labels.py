"""Training with labels in `scripts/demo.py`: PAWS, and the same encoder supervised, with the same labels."""

import contextlib
import io
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import PrinterCallback, logging, set_seed

from hf_msn import (
    ClassifierFinetuningArguments,
    LowShotEvaluator,
    SoftNearestNeighborProbe,
    finetune_classifier,
    parse_recipe,
)

# one of two cores each: so small a model gains nothing from a second
_PROCESSES = 2
# The encoder of PAWS from scratch, all labelled images in each update. Chosen as the recipe of PAWS is, on training
# images held out; holding out one label of five to stop earlier was worse by 8 to 10 points.
SUPERVISED = {
    "global_batch_size": 50,
    "num_train_epochs": 600,
    "validation_fraction": 0.0,
    "optim": "adamw_torch",
    "learning_rate": 2e-3,
    "weight_decay": 0.04,
}


def train_on_splits(
    config: str,
    overrides: list[str],
    num_splits: int,
    images_per_class: int,
    folder: Path,
    supervised_epochs: int | None = None,
) -> Iterator[dict[str, float]]:
    """Train PAWS and the supervised encoder on each split, two splits at a time. Yield their accuracies in order.

    Args:
        config (`str`): The recipe of PAWS.
        overrides (`list[str]`): Fields of it that differ, as on the command line.
        num_splits (`int`): Split i has the labelled images that `LowShotEvaluator` draws for its split i.
        images_per_class (`int`): Labelled images of each class.
        folder (`Path`): Where the models go: `paws-0`, `paws-1`, ...
        supervised_epochs (`int`, *optional*): Of the supervised encoder, if not those of `SUPERVISED`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_PROCESSES, mp_context=context) as pool:
        jobs = [
            pool.submit(_train_on_split, config, overrides, split, images_per_class, str(folder), supervised_epochs)
            for split in range(num_splits)
        ]
        try:
            for job in jobs:
                yield job.result()
        finally:
            for job in jobs:
                job.cancel()


def _train_on_split(
    config: str,
    overrides: list[str],
    split: int,
    images_per_class: int,
    folder: str,
    supervised_epochs: int | None,
) -> dict[str, float]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    labels = ["--labelled_images_per_class", str(images_per_class), "--labelled_seed", str(split)]
    run_dir = ["--output_dir", f"{folder}/paws-{split}", "--overwrite_output_dir", "true"]
    recipe = parse_recipe(["--config", config, *overrides, *labels, *run_dir])
    recipe.training.disable_tqdm = True
    set_seed(recipe.training.seed)
    trainer = recipe.build_trainer()
    trainer.remove_callback(PrinterCallback)
    with contextlib.redirect_stdout(io.StringIO()):  # the line about the support would come once for each split
        trainer.train()
    trainer.save_model()

    images, rows = recipe.labelled
    test = recipe.data.load(recipe.low_shot.low_shot_test_split)
    evaluator = LowShotEvaluator(
        images,
        test,
        image_processor=recipe.build_image_processor(),
        images_per_class=(),
        rows={"labelled": rows},
        probe=SoftNearestNeighborProbe(temperature=recipe.config_fields["temperature"]),
        features="projection",
    )
    supervised = finetune_classifier(
        trainer.model.config,
        images,
        rows,
        recipe.views,
        ClassifierFinetuningArguments(
            f"{folder}/supervised-{split}",
            **{**SUPERVISED, **({} if supervised_epochs is None else {"num_train_epochs": supervised_epochs})},
            seed=recipe.training.seed,
            use_cpu=recipe.training.use_cpu,
            disable_tqdm=True,
            report_to="none",
        ),
        image_processor=recipe.build_image_processor(),
    )
    return {
        "paws": evaluator(trainer.model)["low_shot/labelled/top1"],
        "supervised": supervised.test(test)["top1"],
    }
