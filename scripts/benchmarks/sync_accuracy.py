"""Loss and accuracy of low-communication training against DDP, at equal updates: digits and a small language model.

Each run is a `transformers.Trainer` with a callback on gloo ranks of this machine: a perceptron on scikit-learn's
digits, or a GPT-2 of 0.35 million parameters on the docstrings of Python's standard library, a character per token,
with other modules to validate and to test on. AdamW, cosine schedule, batches and period are the same for all methods.
The learning rate is chosen for each task and method by the validation loss of a run with another seed than those
reported. A cell is the mean ± deviation over the seeds, on the test part.

    python scripts/benchmarks/sync_accuracy.py --output runs/sync_accuracy.json
    python scripts/benchmarks/sync_accuracy.py --tasks digits --methods ddp diloco --seeds 5
"""

import ast
import json
import multiprocessing
import os
import socket
import tempfile
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from report import bars, check_known, machine, markdown_table, mean_and_deviation, option, save, summarize
from sklearn.datasets import load_digits
from torch import nn
from torch.multiprocessing import start_processes
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_msn import (
    DiLoCoCallback,
    GossipCallback,
    LocalSGDCallback,
    NoLoCoCallback,
    SlowMoCallback,
    StreamingDiLoCoCallback,
)
from hf_msn.checks import check_integer
from hf_msn.cli.main import run_script

METHODS = {  # callback, and whether it has a period
    "ddp": (None, False),
    "local_sgd": (LocalSGDCallback, True),
    "slowmo": (SlowMoCallback, True),
    "diloco": (DiLoCoCallback, True),
    "streaming": (partial(StreamingDiLoCoCallback, num_fragments=3), True),
    "noloco": (NoLoCoCallback, True),
    "sgp": (GossipCallback, False),
}
CHARACTERS = 64  # of a block of text
TUNING_SEED = 1000
PRELOADED = ["sklearn.datasets", "transformers.trainer", "hf_msn.trainers.callbacks.local_update"]


class Perceptron(nn.Module):
    """Two hidden layers on the 64 pixels of a digit."""

    def __init__(self, hidden_size: int = 64):
        super().__init__()
        layers = [nn.Linear(64, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_size, 10))

    def forward(self, pixels, labels):
        logits = self.layers(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@cache
def digits() -> dict[str, list[dict]]:
    """Return the parts of scikit-learn's digits: 1,197 to train, 200 to validate and 400 to test on."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    rows = [{"pixels": images[i].float() / 16, "labels": labels[i]} for i in _permutation(len(labels))]
    return {"train": rows[600:], "validation": rows[400:600], "test": rows[:400]}


@cache
def text() -> dict[str, list[dict]]:
    """Return blocks of the docstrings of the standard library: a tenth of the modules each to validate and test on."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for place, file in enumerate(sorted(Path(ast.__file__).parent.glob("*.py"))):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        docs = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
        found[{8: "validation", 9: "test"}.get(place % 10, "train")] += [doc for doc in docs if doc]
    parts = {}
    for part, docs in found.items():
        tokens = torch.tensor(list("\n\n".join(docs).encode("ascii", "ignore")))
        blocks = tokens[: len(tokens) // CHARACTERS * CHARACTERS].view(-1, CHARACTERS)
        if part != "train":
            blocks = blocks[_permutation(len(blocks))[:400]]
        parts[part] = [{"input_ids": block, "labels": block} for block in blocks]
    return parts


def language_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=128,
        n_positions=CHARACTERS,
        n_embd=96,
        n_layer=3,
        n_head=4,
        loss_type="ForCausalLM",
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


TASKS = {  # data, model and learning rates to choose from
    "digits": (digits, Perceptron, (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)),
    "text": (text, language_model, (0.0003, 0.001, 0.003, 0.01)),
}


@dataclass
class BenchmarkArguments:
    tasks: list[str] = option(f"Of {', '.join(TASKS)}.", tuple(TASKS))
    methods: list[str] = option(f"Of {', '.join(METHODS)}.", tuple(METHODS))
    ranks: int = option("Processes.", 4)
    max_steps: int = option("Updates of a run.", 240)
    sync_every: int = option("Steps between the exchanges of methods that have a period.", 20)
    batch_size: int = option("Images or blocks of text per rank.", 4)
    learning_rates: list[float] | None = option("The best on the validation part is taken. By default of the task.")
    seeds: int = option("Reported runs of each method.", 3)
    output: str | None = option("JSON file; a picture goes beside it.")

    def __post_init__(self):
        check_known("tasks", self.tasks, TASKS)
        check_known("methods", self.methods, METHODS)
        for name in ("max_steps", "sync_every", "batch_size"):
            check_integer(name, getattr(self, name))
        check_integer("ranks", self.ranks, 2, remedy="One rank exchanges nothing.")
        check_integer("seeds", self.seeds, 2, remedy="A deviation needs two.")
        if self.learning_rates is not None and min(self.learning_rates) <= 0:
            raise ValueError(f"`learning_rates` must be numbers > 0, but are {self.learning_rates}.")


def train(args: BenchmarkArguments, task: str, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train on all ranks, and return loss and accuracy of the validation and of the test part."""
    load, make_model, _ = TASKS[task]
    parts = load()
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=100,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.max_steps // 10,
            weight_decay=0.01,
            seed=seed,
            use_cpu=True,
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        trainer = Trainer(
            make_model(),
            arguments,
            train_dataset=parts["train"],
            compute_metrics=partial(accuracy, task=task),
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        trainer.remove_callback(PrinterCallback)
        callback, has_period = METHODS[method]
        if callback is not None:
            trainer.add_callback(callback(trainer, **({"sync_every": args.sync_every} if has_period else {})))
        trainer.train()
        found = {"task": task, "method": method, "learning_rate": learning_rate, "seed": seed}
        for part in ("validation", "test"):
            measured = trainer.evaluate(parts[part])
            found |= {f"{part}_{name}": measured[f"eval_{name}"] for name in ("loss", "accuracy")}
    return found


def accuracy(prediction: Any, task: str) -> dict[str, float]:
    predicted, labels = prediction.predictions, prediction.label_ids
    if task == "text":  # of the next character
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    return {"accuracy": 100.0 * float((predicted == labels).mean())}


def run_rank(rank: int, args: BenchmarkArguments, port: int, file: str) -> None:
    """Take part in all runs. Rank 0 writes them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.ranks), MASTER_ADDR="127.0.0.1")
    os.environ.update(LOCAL_WORLD_SIZE=str(args.ranks), MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    tuning, runs = [], []
    for task in args.tasks:
        for method in args.methods:
            tried = [train(args, task, method, rate, TUNING_SEED) for rate in args.learning_rates or TASKS[task][2]]
            best = min(tried, key=lambda run: run["validation_loss"])["learning_rate"]
            own = [train(args, task, method, best, seed) for seed in range(args.seeds)]
            tuning, runs = tuning + tried, runs + own
            if rank == 0:
                print(task, method, best, *(f"{run['test_loss']:.4f}" for run in own), flush=True)
    if rank == 0:
        Path(file).write_text(json.dumps({"tuning": tuning, "runs": runs}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def as_table(args: BenchmarkArguments, runs: list[dict]) -> str:
    """Return a row per method: learning rate, loss and accuracy of every task."""
    columns, rows = ["method"], [[method] for method in args.methods]
    for task in args.tasks:
        columns += [f"{task}: lr", "loss", "accuracy (%)"]
        for method, row in zip(args.methods, rows):
            own = [run for run in runs if (run["task"], run["method"]) == (task, method)]
            losses, accuracies = ([run[f"test_{name}"] for run in own] for name in ("loss", "accuracy"))
            row += [f"{own[0]['learning_rate']:g}", mean_and_deviation(losses, 3), mean_and_deviation(accuracies, 2)]
    return markdown_table(columns, rows)


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "runs.json")
        multiprocessing.set_forkserver_preload(PRELOADED)  # imports once, not in each rank
        start_processes(run_rank, (args, port, str(file)), args.ranks, start_method="forkserver")
        found = json.loads(file.read_text())
    print(f"\n{args.ranks} ranks, {args.max_steps} updates, {args.seeds} seeds, torch {torch.__version__}\n")
    print(as_table(args, found["runs"]))
    named: dict[str, list[float]] = {}
    for run in found["runs"]:
        named.setdefault(f"{run['task']}, {run['method']}", []).append(run["test_accuracy"])
    figure = bars({name: summarize(v) for name, v in named.items()}, "accuracy (%)", "test") if args.output else None
    save({"arguments": asdict(args), "machine": machine(1), **found}, args.output, figure)


def _permutation(length: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(0)).tolist()


if __name__ == "__main__":
    run_script(main)
