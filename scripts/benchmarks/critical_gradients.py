"""What critical gradients (arXiv 2106.10708) do for the loss on the bundled digits, and what they cost.

An MLP and a convolutional network learn the labels, by SGD and by Adam; MSN trains as its recipe does, by AdamW. Each
with and without the buffer, at every learning rate and seed, over the same batches. `overhead` takes turns of ViT-S
training steps with and without it, in processor time.

    python scripts/benchmarks/critical_gradients.py --output docs/critical_gradients.json
    python scripts/benchmarks/critical_gradients.py --parts overhead --pairs 7
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import step
import torch
from report import check_known, machine, markdown_table, mean_and_deviation, option, save, subplots, summarize
from sklearn.datasets import load_digits
from torch import nn
from transformers import HfArgumentParser, PrinterCallback

from hf_msn import CriticalGradients
from hf_msn.cli.main import run_script
from hf_msn.cli.pretrain import make_recipe, read_recipe
from hf_msn.trainers.callbacks.non_finite import NonFiniteLossError

# Learning rates, and the rule of the buffer that the paper has for the optimizer.
SUPERVISED = {
    "SGD": (torch.optim.SGD, "sum", (0.03, 0.1, 0.3, 0.6, 1.0)),
    "Adam": (torch.optim.Adam, "mean", (1e-3, 3e-3, 1e-2, 3e-2)),
}
MSN_LEARNING_RATES = (5e-4, 2e-3, 6e-3)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "cnn": lambda: nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    ),
}


@dataclass
class BenchmarkArguments:
    parts: list[str] = option("What to measure.", ("mlp", "cnn", "msn", "overhead"))
    capacity: int = option("Gradients in the buffer.", 5)
    seeds: int = option("Runs of each setting.", 5)
    steps: int = option("Updates of the MLP and of the convolutional network, 64 images each.", 400)
    msn_steps: int = option("Updates of MSN, whose recipe has 4,500.", 250)
    pairs: int = option("Pairs of ViT-S steps, with and without.", 7)
    batch_size: int = option("Images in a ViT-S step, with the views of step.py.", 8)
    threads: int = option("CPU threads.", 1)
    output: str | None = option("JSON file for settings and losses; the plot goes beside it.")

    def __post_init__(self):
        check_known("parts", self.parts, (*NETWORKS, "msn", "overhead"))


def learn_labels(network: str, optimizer: str, rate: float, seed: int, capacity: int, steps: int) -> list[float]:
    """Return the losses of a run, one per update."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8), torch.tensor(classes)
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    cls, aggregate, _ = SUPERVISED[optimizer]
    optimizer = cls(model.parameters(), lr=rate)
    if capacity:
        CriticalGradients(optimizer, capacity, aggregate=aggregate)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pretrain(rate: float, seed: int, capacity: int, steps: int) -> list[float]:
    """Return the losses of MSN on the digits, each the mean over 10 updates."""
    recipe = {**read_recipe("digits"), "learning_rate": rate, "start_learning_rate": rate / 10, "seed": seed}
    recipe["position_initializer_range"] = None  # as the table in docs/optimizers.md was measured
    recipe |= {"max_steps": steps, "warmup_steps": steps // 10, "logging_steps": 10, "critical_gradients": capacity}
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"output_dir": folder, "overwrite_output_dir": True, "report_to": "none", "disable_tqdm": True}
        trainer = make_recipe(recipe | quiet).build_trainer()
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except NonFiniteLossError:
            return [float("nan")]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def final(losses: list[float]) -> float:
    """Return the mean loss of the last tenth of a run; infinity if it diverged."""
    loss = float(np.mean(losses[-max(len(losses) // 10, 1) :]))
    return loss if np.isfinite(loss) else float("inf")


def measure_losses(part: str, args: BenchmarkArguments) -> dict[str, Any]:
    """Return the losses of a network by optimizer, learning rate, capacity and seed."""
    grid = {name: rates for name, (_, _, rates) in SUPERVISED.items()} if part != "msn" else {}
    curves: dict[str, Any] = {}
    for optimizer, rates in (grid or {"AdamW": MSN_LEARNING_RATES}).items():
        for rate in rates:
            for capacity in (0, args.capacity):
                if part == "msn":
                    runs = [pretrain(rate, seed, capacity, args.msn_steps) for seed in range(args.seeds)]
                else:
                    setting = (part, optimizer, rate)
                    runs = [learn_labels(*setting, seed, capacity, args.steps) for seed in range(args.seeds)]
                curves.setdefault(optimizer, {}).setdefault(str(rate), {})[str(capacity)] = runs
            print(f"{part} {optimizer} {rate}: done", flush=True)
    return curves


def table(losses: dict[str, Any], capacity: int) -> str:
    """Return final losses without and with the buffer; at how many seeds its loss is lower; * at the best rates."""
    rows = []
    for part, optimizers in losses.items():
        for optimizer, rates in optimizers.items():
            ends = {
                rate: [[final(run) for run in curves[c]] for c in ("0", str(capacity))]
                for rate, curves in rates.items()
            }
            best = [min(np.mean(pair[side]) for pair in ends.values()) for side in (0, 1)]
            for rate, pair in ends.items():
                cells = [
                    mean_and_deviation(values, 4) + " *" * bool(np.mean(values) == lowest)
                    if np.isfinite(values).all()
                    else f"diverged {np.isinf(values).sum()} times"
                    for values, lowest in zip(pair, best)
                ]
                fewer = sum(b < a for a, b in zip(*pair))
                rows.append([part, optimizer, rate, *cells, f"{fewer} of {len(pair[0])}"])
    return markdown_table(["network", "optimizer", "learning rate", "without", "with", "lower with"], rows)


def plot(losses: dict[str, Any], capacity: int) -> Any:
    """Return a figure: above the loss against steps at each one's best learning rate, below the grid."""
    columns = [(part, name, rates) for part, names in losses.items() for name, rates in names.items()]
    figure, axes = subplots((3.2 * len(columns), 5.6), 2, len(columns), squeeze=False)
    for place, (part, optimizer, rates) in enumerate(columns):
        above, below = axes[:, place]
        for c, color, label in (("0", "tab:blue", "without"), (str(capacity), "tab:orange", "with")):
            ends = np.asarray([[final(run) for run in curves[c]] for curves in rates.values()])
            best = list(rates)[ends.mean(axis=1).argmin()]
            runs = np.asarray(rates[best][c])
            width = max(runs.shape[1] // 60, 1)  # a point is the mean of so many
            runs = runs[:, : runs.shape[1] // width * width].reshape(len(runs), -1, width).mean(axis=2)
            steps = np.arange(1, runs.shape[1] + 1) * width * (10 if part == "msn" else 1)
            above.plot(steps, runs.mean(axis=0), color=color, label=f"{label}, {best}")
            above.fill_between(steps, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.2)
            centre, low, high = ends.mean(axis=1), ends.min(axis=1), ends.max(axis=1)
            shown = np.isfinite(centre)
            bars = [(centre - low)[shown], (high - centre)[shown]]
            below.errorbar(np.asarray([*rates], float)[shown], centre[shown], bars, color=color, marker="o", capsize=3)
        above.set(title=f"{part}, {optimizer}", xlabel="step", ylabel="loss")
        below.set(xscale="log", xlabel="learning rate", ylabel="loss at the end")
        below.set_xticks([float(rate) for rate in rates], list(rates)), below.minorticks_off()
        if part != "msn":
            above.set_yscale("log"), below.set_yscale("log")
        above.legend(fontsize=8), above.grid(alpha=0.3), below.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def measure_overhead(args: BenchmarkArguments) -> dict[str, Any]:
    """Return processor time of ViT-S steps with and without, in turns on copies of one model, and their ratio."""
    sizes = step.BenchmarkArguments(batch_size=args.batch_size)
    batch, trained = step.random_views(sizes, rank=0), []
    for capacity in (0, args.capacity):
        model = sizes.build_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        if capacity:
            CriticalGradients(optimizer, capacity, aggregate="mean")
        trained.append((model, optimizer))
    seconds: list[list[float]] = [[], []]
    for turn in range(args.capacity + args.pairs):  # the buffer fills in the warm-up
        for (model, optimizer), values in zip(trained, seconds):
            began = time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn >= args.capacity:
                values.append(time.process_time() - began)
    without, with_buffer = seconds
    return {
        "seconds without": summarize(without),
        "seconds with": summarize(with_buffer),
        "ratio": summarize([b / a for a, b in zip(without, with_buffer)]),
    }


def main() -> None:
    [args] = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"arguments": asdict(args), "machine": machine()}
    losses = {part: measure_losses(part, args) for part in args.parts if part != "overhead"}
    if losses:
        results["losses"] = losses
        print(table(losses, args.capacity))
    if "overhead" in args.parts:
        results["overhead"] = measure_overhead(args)
        print(markdown_table(list(results["overhead"]), [list(results["overhead"].values())]))
    save(results, args.output, plot(losses, args.capacity) if losses else None)


if __name__ == "__main__":
    run_script(main)
