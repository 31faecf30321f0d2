"""A tiny MSN model on some digits, its export, and results of both, made in a second."""

import json
from pathlib import Path

import torch
from finetuning_runs import ENCODER, PROCESSOR
from hub_server import TOKEN
from huggingface_hub import ModelCard
from tiny import tiny_model

from hf_msn import LowShotEvaluator, MSNConfig, MSNForPreTraining, evaluation_image_processor, load_images


def msn(seed: int = 0) -> MSNForPreTraining:
    torch.manual_seed(seed)
    return MSNForPreTraining(MSNConfig(**ENCODER, num_prototypes=8)).eval()


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def save_run(folder: Path, shards: bool = False) -> Path:
    """The `output_dir` of a pretraining run, with all that does not belong on the Hub."""
    model = tiny_model().eval()
    model.save_pretrained(folder, **({"max_shard_size": "30KB"} if shards else {}))
    evaluation_image_processor(16).save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sync_state_0.pt"):
        torch.save({"hub_token": TOKEN, "path": str(folder.absolute())}, folder / name)
    for name in (".hidden", ".env", "notes.txt", "modeling_other.py", "low_shot.json", "labelled_images.json"):
        (folder / name).write_text(TOKEN)
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(folder / "checkpoint-1")}))
    for name in ("logs/events.out.tfevents.1.alice-laptop", "checkpoint-1/config.json", "figures/old.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TOKEN)
    return folder


def measure(model, path: Path, **settings) -> Path:
    """Results on 60 test digits, 3 splits of 1 and 2 labels per class."""
    settings = {"images_per_class": (1, 2), "num_splits": 3, "image_processor": PROCESSOR, **settings}
    evaluator = LowShotEvaluator(load_images("digits"), load_images("digits", split="test[:60]"), **settings)
    evaluator(model)
    evaluator.results.save(path)
    return path


def edited(path: Path, change, name: str = "edited.json") -> Path:
    """A copy of a JSON file beside it, changed by `change(record)`."""
    record = json.loads(path.read_text())
    change(record)
    copy = path.with_name(name)
    copy.write_text(json.dumps(record))
    return copy


def with_value(value, *keys):
    """A change for `edited`: puts `value` at the end of a way of keys."""

    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def table(card: ModelCard, first: str) -> list[list[str]]:
    """The cells of the table whose first column is headed `first`."""
    lines = card.text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows
