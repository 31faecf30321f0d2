"""Compare codistillation with DDP on the digits of scikit-learn.

    python scripts/compare_codistillation.py --output runs/codistillation

All runs have the same number of updates, on one gloo process per rank. A replica has `1 / ranks` of the batch of DDP.
`alone` is the control: replicas that exchange nothing. Each method is trained with a constant weight decay and with
FallingWeightDecay (arXiv 2010.02838).

The result shows that replicas reach the accuracy of DDP with fewer bytes, and that a weight decay that is too high
costs less if it falls. Digits are so easy that `alone` does as well, and falling helps all methods.
"""
# ruff: noqa: RUF009 -- report.option makes a dataclass field

import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
from benchmarks.report import check_known, machine, markdown_table, option, subplots
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser

from hf_msn import Codistillation, FallingWeightDecay, load_images, pixel_features
from hf_msn.checks import check_integer, check_number
from hf_msn.cli.main import run_script
from hf_msn.files import write_json, write_text

METHODS = ("ddp", "alone", "predictions", "checkpoints")
GOAL = 1.0  # points of accuracy below DDP
PIXEL_MEAN, PIXEL_STD = 0.305, 0.375  # of the training digits


@dataclass
class ComparisonArguments:
    methods: list[str] = option("Methods; ddp must be among them.", METHODS)
    ranks: int = option("Ranks of DDP, and replicas.", 2)
    batch_size: int = option("Batch of DDP over all ranks. A replica has `1 / ranks` of it.", 64)
    steps: int = option("Updates of every run.", 600)
    seeds: int = option("Runs of each row, with seeds 0, 1 and so on.", 3)
    hidden_size: int = option("Width of the two hidden layers of the perceptron.", 256)
    learning_rate: float = option("Learning rate of DDP, divided by 10 after each third of the updates.", 0.2)
    weight_decays: list[float] = option(
        "The first is for the comparison; others show the effect of falling where it is high.", (0.003, 0.03)
    )
    alpha: float = option("Weight of the distance from the other replicas.", 0.3)
    temperature: float = option("Temperature of the softmax in that distance.", 3.0)
    exchange_every: int = option("Updates between two checkpoints.", 25)
    output: str | None = option("Folder for results.json, table.md and plot.png.")

    def __post_init__(self):
        check_known("methods", self.methods, METHODS)
        if "ddp" not in self.methods:
            raise ValueError(f"`methods` must have ddp, the baseline, but is {self.methods}.")
        check_integer("ranks", self.ranks, 2)
        for name in ("steps", "seeds", "hidden_size", "batch_size", "exchange_every"):
            check_integer(name, getattr(self, name))
        if self.batch_size % self.ranks:
            raise ValueError(f"`batch_size` must be a multiple of `ranks`, {self.ranks}, but is {self.batch_size}.")
        for name in ("learning_rate", "temperature"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("alpha", self.alpha, minimum=0.0)
        for value in self.weight_decays or [None]:
            check_number("weight_decays", value, minimum=0.0)

    def run(self, method: str, seed: int, **settings) -> dict:
        """Return the settings of one run."""
        shared = "steps batch_size hidden_size learning_rate alpha temperature exchange_every".split()
        return {**{name: getattr(self, name) for name in shared}, **settings, "method": method, "seed": seed}


# The ranks


class Digits:
    """Digits to train on, and test digits to measure on."""

    def __init__(self):
        self.images, self.labels = _tensors("train")
        self.test_images, self.test_labels = _tensors("test")


def _tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = pixel_features(load_images("digits", split=split))  # (N, 3 * 8 * 8), three equal channels
    images = torch.tensor(pixels.features, dtype=torch.float32)[:, :64].view(-1, 1, 8, 8)
    return (images - PIXEL_MEAN) / PIXEL_STD, torch.tensor(pixels.labels)


def build_model(hidden_size: int) -> nn.Module:
    sizes = (64, hidden_size, hidden_size)
    layers = [layer for size in pairwise(sizes) for layer in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden_size, 10))


def batches_of(rows: int, batch_size: int, seed: int):
    """Yield row numbers `(batch_size,)` from one shuffled pass after another."""
    generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(rows, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def train(run: dict, digits: Digits) -> dict:
    """Train one model on this rank; return its accuracy in per cent, that of the mean of all ranks, bytes, seconds."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    method, seed, steps, is_ddp = run["method"], run["seed"], run["steps"], run["method"] == "ddp"
    share = run["batch_size"] // ranks
    torch.manual_seed(1000 * seed + rank)  # replicas differ; DDP makes its ranks equal
    model = build_model(run["hidden_size"])
    wrapped = DistributedDataParallel(model) if is_ddp else model
    decay, factor = run["weight_decay"], FallingWeightDecay(steps)
    learning_rate = run["learning_rate"] / (1 if is_ddp else ranks)  # in proportion to the batch
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=decay)
    falls = [round(fraction * steps) for fraction in factor.fractions]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)
    # The ranks of DDP share one order; replicas that exchange predictions see the same batches.
    order_seed = 1000 * seed + (0 if is_ddp or method == "predictions" else rank)
    draws = batches_of(len(digits.labels), run["batch_size"] if is_ddp else share, order_seed)
    settings = {name: run[name] for name in ("exchange_every", "alpha", "temperature")}
    schedule = factor if run["falling"] else None
    context = nullcontext()
    if method in ("predictions", "checkpoints"):
        context = Codistillation(model, optimizer, exchange=method, weight_decay_schedule=schedule, **settings)
    with context as codistillation:
        sent = 0 if codistillation is None else codistillation.bytes_sent
        dist.barrier()
        started = time.perf_counter()
        for step in range(steps):
            rows = next(draws)[rank * share : (rank + 1) * share] if is_ddp else next(draws)
            logits = wrapped(digits.images[rows])
            loss = nn.functional.cross_entropy(logits, digits.labels[rows])
            if codistillation is not None:
                loss = loss + codistillation.loss(logits, digits.images[rows])
            elif run["falling"]:
                optimizer.param_groups[0]["weight_decay"] = decay * factor(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if codistillation is not None:
                codistillation.step()
        seconds = time.perf_counter() - started
        dist.barrier()
        sent = 0 if codistillation is None else codistillation.bytes_sent - sent
    payload = sum(p.numel() * p.element_size() for p in model.parameters())
    if is_ddp:
        sent = steps * 2 * payload * (ranks - 1) // ranks  # as a ring sends it
    with torch.no_grad():
        own = model.eval()(digits.test_images).softmax(-1)
        total = own.clone()
        dist.all_reduce(total)
    own, of_mean = (100 * (p.argmax(-1) == digits.test_labels).double().mean().item() for p in (own, total))
    return {**run, "accuracy": own, "accuracy_of_mean": of_mean, "bytes_sent": sent, "seconds": seconds}


def run_rank(rank: int, ranks: int, runs: list[dict], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    digits = Digits()
    results = [train(run, digits) for run in runs]
    write_json(Path(folder, f"{rank}.json"), results)
    dist.barrier()
    dist.destroy_process_group()


def train_all(args: ComparisonArguments, runs: list[dict]) -> list[list[dict]]:
    """Return the result of each rank in each run."""
    with tempfile.TemporaryDirectory() as folder:
        call = (args.ranks, runs, folder)
        torch.multiprocessing.spawn(run_rank, call, nprocs=args.ranks)
        by_rank = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(args.ranks)]
    return [list(rows) for rows in zip(*by_rank)]


# The comparison


def summarize(found: list[list[dict]]) -> list[dict]:
    """Return a row per method, weight decay and schedule: (mean, standard deviation) over the seeds."""
    groups: dict[tuple, list[list[dict]]] = {}
    for ranks in found:
        groups.setdefault(tuple(ranks[0][name] for name in ("weight_decay", "method", "falling")), []).append(ranks)
    summary = [
        {
            "method": method,
            "weight_decay": weight_decay,
            "falling": falling,
            "first_replica": spread([ranks[0]["accuracy"] for ranks in runs]),
            "replicas": spread([mean(row["accuracy"] for row in ranks) for ranks in runs]),
            "mean_of_predictions": spread([ranks[0]["accuracy_of_mean"] for ranks in runs]),
            "bytes_sent": mean(row["bytes_sent"] for ranks in runs for row in ranks),
            "seconds": mean(row["seconds"] for ranks in runs for row in ranks),
        }
        for (weight_decay, method, falling), runs in groups.items()
    ]
    baseline = next(row for row in summary if row["method"] == "ddp" and not row["falling"])
    for row in summary:
        row["points_to_ddp"] = row["replicas"][0] - baseline["replicas"][0]
        row["times_fewer_bytes"] = baseline["bytes_sent"] / row["bytes_sent"] if row["bytes_sent"] else None
    return summary


def spread(values: list[float]) -> tuple[float, float | None]:
    return mean(values), stdev(values) if len(values) > 1 else None


def as_table(summary: list[dict]) -> str:
    titles = "weight decay|method|first replica, %|mean of replicas, %|mean of predictions, %|points to DDP".split("|")
    titles += ["MB sent per rank", "times fewer", "s"]
    lines = []
    for row in summary:
        cells = [decay_of(row), row["method"]]
        for value, deviation in (row[name] for name in ("first_replica", "replicas", "mean_of_predictions")):
            cells.append(f"{value:.2f}" if deviation is None else f"{value:.2f} ± {deviation:.2f}")
        fewer = "-" if row["times_fewer_bytes"] is None else f"{row['times_fewer_bytes']:.0f}"
        cells += [f"{row['points_to_ddp']:+.2f}", f"{row['bytes_sent'] / 1e6:.2f}", fewer, f"{row['seconds']:.1f}"]
        lines.append(cells)
    return markdown_table(titles, lines)


def decay_of(row: dict) -> str:
    return f"{row['weight_decay']:g} {'falling' if row['falling'] else 'unchanged'}"


def verdict(summary: list[dict]) -> list[str]:
    """Return which rows are within `GOAL` of DDP, and the effect of a falling weight decay."""
    lines = []
    for row in summary:
        if row["method"] != "ddp" and row["weight_decay"] == summary[0]["weight_decay"]:
            within = "within" if row["points_to_ddp"] >= -GOAL else "NOT within"
            points = f"{row['points_to_ddp']:+.2f}"
            lines.append(f"{row['method']}, {decay_of(row)}: {within} {GOAL:g} point of DDP ({points}).")
    unchanged = {(row["method"], row["weight_decay"]): row["replicas"][0] for row in summary if not row["falling"]}
    for row in summary:
        if row["falling"]:
            gain = row["replicas"][0] - unchanged[row["method"], row["weight_decay"]]
            lines.append(f"{row['method']}, weight decay {row['weight_decay']:g}: falling changes {gain:+.2f}.")
    return lines


def plot(summary: list[dict], path: Path) -> None:
    decays = list(dict.fromkeys(row["weight_decay"] for row in summary))
    methods = list(dict.fromkeys(row["method"] for row in summary))
    figure, axes = subplots((4.5 * (len(decays) + 1), 4), 1, len(decays) + 1)
    for axis, decay in zip(axes, decays):
        for falling, color in ((False, "tab:gray"), (True, "tab:blue")):
            rows = [row for row in summary if row["weight_decay"] == decay and row["falling"] == falling]
            places = [methods.index(row["method"]) + (0.2 if falling else -0.2) for row in rows]
            values, errors = zip(*(row["replicas"] for row in rows))
            label = "falling" if falling else "unchanged"
            bars = axis.bar(places, values, 0.4, yerr=[error or 0.0 for error in errors], color=color, label=label)
            axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=8)
        axis.set_ylim(max(0.0, min(row["replicas"][0] for row in summary) - 3.0), 100.0)
        axis.set_xticks(range(len(methods)), methods)
        axis.set(ylabel="test accuracy, % (mean of replicas)", title=f"weight decay {decay:g}")
        axis.legend(loc="lower right")
    rows = [row for row in summary if not row["falling"] and row["weight_decay"] == decays[0] and row["bytes_sent"]]
    bars = axes[-1].bar([row["method"] for row in rows], [row["bytes_sent"] / 1e6 for row in rows], color="tab:orange")
    axes[-1].bar_label(bars, [f"{row['bytes_sent'] / 1e6:.2f}" for row in rows])
    axes[-1].set(yscale="log", ylabel="MB sent per rank", title="alone sends nothing")
    axes[-1].margins(y=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses()
    rows = product(args.weight_decays, args.methods, (False, True), range(args.seeds))
    runs = [args.run(method, seed, weight_decay=decay, falling=falling) for decay, method, falling, seed in rows]
    print(f"{len(runs)} runs on {args.ranks} processes", flush=True)
    found = train_all(args, runs)
    summary = summarize(found)
    heading = (
        f"Test accuracy after {args.steps} updates, mean ± standard deviation of {args.seeds} seeds. Batch: "
        f"{args.batch_size} digits over {args.ranks} ranks with DDP, {args.batch_size // args.ranks} per replica. "
        f"Differences are from DDP with weight decay {args.weight_decays[0]:g}, unchanged."
    )
    text = "\n\n".join([heading, as_table(summary), "\n".join(verdict(summary))])
    print(f"\n{text}")
    if args.output:
        folder = Path(args.output)
        results = {"settings": asdict(args), "machine": machine(1), "summary": summary, "runs": found}
        write_json(folder / "results.json", results)
        write_text(folder / "table.md", text + "\n")
        plot(summary, folder / "plot.png")
        print(f"Written to {folder}.")


if __name__ == "__main__":
    run_script(main)
