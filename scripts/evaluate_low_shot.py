"""Low-shot evaluation of any vision model. On several processes: accelerate launch scripts/evaluate_low_shot.py ..."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from hf_msn import (
    KNNProbe,
    LinearProbe,
    LogisticProbe,
    LowShotEvaluator,
    SoftNearestNeighborProbe,
    evaluation_image_processor,
    load_images,
    load_vision_model,
)


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluationArguments:
    model: str = field(
        metadata={"help": "Folder or Hub id of an hf_msn or transformers model, timm:ARCHITECTURE, or timm:FOLDER."}
    )
    checkpoint: str | None = option("Local weights file for timm:ARCHITECTURE, in place of the released weights.")
    revision: str | None = option("Branch, tag or commit of a model on the Hub.")
    dataset: str = option("digits (bundled), a folder of images, saved data, shards or a Hub id.", "digits")
    dataset_config: str | None = option("Configuration of a Hub data set that has several.")
    dataset_revision: str | None = option("Branch, tag or commit of a data set on the Hub.")
    train_split: str = option("Split that the labelled images are drawn from.", "train")
    test_split: str = option("Split that accuracy is measured on.", "test")
    image_column: str | None = option("Column of the images, where it cannot be guessed.")
    label_column: str | None = option("Column of the labels, where it cannot be guessed.")
    image_size: int | None = option("Resize and crop as the paper does, to this size, not as saved with the model.")
    images_per_class: list[int] = field(
        default_factory=list,
        metadata={"help": "Labelled images a class, one task each. 1 2 5 if no other task is given."},
    )
    fractions: list[float] = field(
        default_factory=list, metadata={"help": "Shares of the labelled images, one task each: 0.01 is 1 percent."}
    )
    list_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Lists of labelled images; files of one name are the splits of one task."},
    )
    num_splits: int = option("Random splits of each task that is not a list.", 3)
    seed: int = option("Split i is drawn with seed + i.", 0)
    probe: Literal["logistic", "soft_nearest_neighbor", "knn", "linear"] = option(
        "Classifier on the features.", "logistic"
    )
    l2: float | None = option("Penalty of the logistic probe. 0.0025 up to 10 images a class, else 0.075.")
    neighbors: int = option("Neighbours of the knn probe.", 20)
    temperature: float = option("Of the soft_nearest_neighbor probe.", 0.1)
    features: Literal["backbone", "projection"] = option(
        "Output of the backbone, or of the projection head of a pretraining model, where PAWS predicts.", "backbone"
    )
    num_last_layers: int = option("Concatenate the [CLS] token of this many last blocks.", 1)
    batch_size: int = option("Images at a time on each process.", 64)
    num_workers: int | None = option(
        "Processes that decode images, for each process; by default as many as help.", None
    )
    bf16: bool = option("Compute the features under bfloat16 autocast.", False)
    on_broken_image: Literal["skip", "raise"] = option("What to do with an image that cannot be read.", "skip")
    cache_dir: str | None = option("Keep features here, so that another probe on the same weights is fast.")
    output: str | None = option("Write everything, down to each split, to this JSON file.")


def check_writable(output: str) -> None:
    """Fails now rather than after minutes of work."""
    if Path(output).is_dir():
        raise ValueError(f"`--output` must name a file, but {output!r} is a folder. Add a file name.")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(output).parent).close()
    except OSError as error:
        raise ValueError(
            f"`--output` must be a file that can be written, but {output!r} cannot be: {error}. Give another folder."
        ) from error


def main() -> None:
    (args,) = HfArgumentParser(EvaluationArguments, description=__doc__).parse_args_into_dataclasses()
    # processes on CPUs find each other only if told that they are on CPUs
    state = PartialState(cpu=not torch.accelerator.is_available())
    if args.output and state.is_main_process:
        check_writable(args.output)
    model = load_vision_model(args.model, checkpoint=args.checkpoint, revision=args.revision)
    data = {
        "config": args.dataset_config,
        "revision": args.dataset_revision,
        "image_column": args.image_column,
        "label_column": args.label_column,
    }
    probes = {
        "logistic": lambda: LogisticProbe(l2=args.l2),
        "soft_nearest_neighbor": lambda: SoftNearestNeighborProbe(temperature=args.temperature),
        "knn": lambda: KNNProbe(k=args.neighbors),
        "linear": lambda: LinearProbe(device=state.device),
    }
    evaluator = LowShotEvaluator(
        load_images(args.dataset, split=args.train_split, **data),
        load_images(args.dataset, split=args.test_split, **data),
        image_processor=evaluation_image_processor(args.image_size) if args.image_size else None,
        images_per_class=args.images_per_class or (() if args.fractions or args.list_files else (1, 2, 5)),
        fractions=args.fractions,
        list_files=args.list_files,
        num_splits=args.num_splits,
        probe=probes[args.probe](),
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        features=args.features,
        num_last_layers=args.num_last_layers,
        cache_dir=args.cache_dir,
        on_broken_image=args.on_broken_image,
        device=state.device,
        dtype=torch.bfloat16 if args.bf16 else None,
    )
    evaluator(model)
    if state.is_main_process:
        print(evaluator.results.table())
        if args.output:
            evaluator.results.save(args.output)
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
