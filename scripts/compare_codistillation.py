"""Codistillation of replicas with a part of the batch each against DDP with all of it, on scikit-learn's digits.

All have the same number of updates. Real gloo processes on one machine, one for each replica. `alone` is the control:
replicas with a part of the batch each that never hear of one another. Each is trained with an unchanged weight decay
and with FallingWeightDecay, the lesson of arXiv 2010.02838.

    python scripts/compare_codistillation.py --output runs/codistillation
    python scripts/compare_codistillation.py --search    # how the defaults were chosen

`--search` never sees a test digit: for each seed it draws 360 training digits to measure on, and trains on the rest.
It chooses learning rate and weight decay for DDP alone. Replicas get the same weight decay, and the part of the
learning rate that their batch is of DDP's (linear scaling: half of it with 2 replicas). Only what is codistillation's
own is chosen for them: `alpha`, `temperature` and `exchange_every`.

What it shows: replicas reach DDP's accuracy with a part of its bytes, and a weight decay that is too high costs less
if it falls. What it can't: digits are so easy that `alone` does as well, and falling helps all methods alike.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from benchmark_report import check_methods
from benchmark_sync import free_port, option, wait_for
from transformers import HfArgumentParser

METHODS = ("ddp", "alone", "predictions", "checkpoints")
GOAL = 1.0  # points of accuracy below DDP
SEARCHED = {
    "learning_rate": (0.05, 0.1, 0.2, 0.4),
    "weight_decay": (0.001, 0.003, 0.01),
    "alpha": (0.1, 0.3, 1.0),
    "temperature": (1.0, 3.0),
    "exchange_every": (25, 50, 100),
}
# Far from the seeds of the comparison: another order and other initial models too.
SEARCH_SEED = 100


@dataclass
class ComparisonArguments:
    methods: list[str] = field(
        default_factory=lambda: [*METHODS],
        metadata={"help": f"Of {', '.join(METHODS)}. ddp is what the others are compared with."},
    )
    ranks: int = option("Ranks of DDP, and replicas.", 2)
    batch_size: int = option("Of DDP over all ranks. A replica has `1 / ranks` of it.", 64)
    steps: int = option("Updates of every run.", 600)
    seeds: int = option("Runs of each row, with seeds 0, 1 and so on.", 3)
    hidden_size: int = option("Width of the perceptron's two hidden layers.", 256)
    learning_rate: float = option(
        "Of DDP's SGD with momentum 0.9; a replica has `1 / ranks` of it. A tenth after each third of the updates.",
        0.2,
    )
    weight_decays: list[float] = field(
        default_factory=lambda: [0.003, 0.03],
        metadata={"help": "The first is for the comparison; further ones show what falling does where it is high."},
    )
    alpha: float = option("Weight of the distance from the other replicas.", 0.3)
    temperature: float = option("Of the softmax in that distance.", 3.0)
    exchange_every: int = option("Updates from one checkpoint to the next.", 25)
    search: bool = option("Choose settings on held-out training digits instead.", False)
    timeout: float = option("Seconds after which the ranks are killed.", 1800.0)
    output: str | None = option("Folder for results.json, table.md and plot.png.")

    def __post_init__(self):
        check_methods(self.methods, METHODS)
        if self.ranks < 2 or self.steps < 1 or self.seeds < 1 or self.hidden_size < 1:
            raise ValueError(
                "`ranks` must be >= 2, `steps`, `seeds` and `hidden_size` >= 1, but they are "
                f"{self.ranks}, {self.steps}, {self.seeds} and {self.hidden_size}."
            )
        if self.batch_size < 1 or self.batch_size % self.ranks:
            raise ValueError(
                "`batch_size` is shared by the ranks and must be a multiple of `ranks`, but is "
                f"{self.batch_size} with {self.ranks} ranks."
            )
        if not self.weight_decays or min(self.weight_decays) < 0.0 or not self.learning_rate > 0.0:
            raise ValueError(
                "`weight_decays` must be one number >= 0 or more and `learning_rate` > 0, but they are "
                f"{self.weight_decays} and {self.learning_rate}."
            )

    def run(self, method: str, seed: int, **settings) -> dict:
        """What a rank needs to know of one run."""
        shared = "steps batch_size hidden_size learning_rate alpha temperature exchange_every".split()
        run = {**{name: getattr(self, name) for name in shared}, "weight_decay": self.weight_decays[0]}
        return {**run, "falling": False, **settings, "method": method, "seed": seed}


def train_all(args: ComparisonArguments, runs: list[dict], held_out: bool = False) -> list[list[dict]]:
    """All runs, one after another: what each rank found in each, first rank first."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "spec.json")
        spec.write_text(json.dumps({"runs": runs, "held_out": held_out, "folder": folder}))
        port = free_port()
        processes = []
        for rank in range(args.ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(args.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, str(Path(__file__).with_name("codistillation_workload.py")), str(spec)]
            processes.append(subprocess.Popen(command, env=environment))
        wait_for(processes, args.timeout)
        of_ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(args.ranks)]
    return [list(rows) for rows in zip(*of_ranks)]


def summarize(found: list[list[dict]]) -> list[dict]:
    """A row for each method, weight decay and its schedule: (mean, standard deviation) over the seeds."""
    groups: dict[tuple, list[list[dict]]] = {}
    for ranks in found:
        groups.setdefault(tuple(ranks[0][name] for name in ("weight_decay", "method", "falling")), []).append(ranks)
    summary = []
    for (weight_decay, method, falling), runs in groups.items():
        summary.append(
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
        )
    # What is usual: the weight decay that was chosen for it, unchanged.
    baseline = next(row for row in summary if row["method"] == "ddp" and not row["falling"])
    for row in summary:
        row["points_to_ddp"] = row["replicas"][0] - baseline["replicas"][0]
        row["times_fewer_bytes"] = baseline["bytes_sent"] / row["bytes_sent"] if row["bytes_sent"] else None
    return summary


def spread(values: list[float]) -> tuple[float, float | None]:
    return mean(values), stdev(values) if len(values) > 1 else None


def as_table(summary: list[dict]) -> str:
    lines = [
        "| weight decay | method | first replica, % | mean of replicas, % | mean of predictions, % | points to DDP | "
        "MB sent a rank | times fewer | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        accuracies = " | ".join(shown(row[name]) for name in ("first_replica", "replicas", "mean_of_predictions"))
        fewer = "-" if row["times_fewer_bytes"] is None else f"{row['times_fewer_bytes']:.0f}"
        lines.append(
            f"| {decay_of(row)} | {row['method']} | {accuracies} | {row['points_to_ddp']:+.2f} | "
            f"{row['bytes_sent'] / 1e6:.2f} | {fewer} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def shown(value: tuple[float, float | None]) -> str:
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def decay_of(row: dict) -> str:
    return f"{row['weight_decay']:g} {'falling' if row['falling'] else 'unchanged'}"


def verdict(summary: list[dict]) -> list[str]:
    """Which rows come within `GOAL` of DDP with the weight decay of the comparison, and what falling changes."""
    lines = []
    for row in summary:
        if row["method"] == "ddp" or row["weight_decay"] != summary[0]["weight_decay"]:
            continue
        says = "within" if row["points_to_ddp"] >= -GOAL else "NOT within"
        lines.append(f"{row['method']}, {decay_of(row)}: {says} {GOAL:g} point of DDP ({row['points_to_ddp']:+.2f}).")
    for unchanged, falling in product(summary, summary):
        same = all(unchanged[name] == falling[name] for name in ("method", "weight_decay"))
        if same and falling["falling"] and not unchanged["falling"]:
            gain = falling["replicas"][0] - unchanged["replicas"][0]
            lines.append(
                f"{falling['method']}, weight decay {falling['weight_decay']:g}: falling changes {gain:+.2f}."
            )
    return lines


def search(args: ComparisonArguments) -> dict:
    """The settings of the highest accuracy on held-out training digits, the first of equals; prints all."""
    seeds = range(SEARCH_SEED, SEARCH_SEED + args.seeds)

    def runs(methods: tuple[str, ...], **settings) -> list[dict]:
        return [args.run(method, seed, **settings) for method in methods for seed in seeds]

    print("For DDP, weight decay unchanged:")
    names = ("learning_rate", "weight_decay")
    best = best_of(args, names, lambda settings: runs(("ddp",), **settings))
    print("For both exchanges, the mean of them, weight decay falling:")
    names = ("alpha", "temperature")
    best |= best_of(
        args, names, lambda settings: runs(("predictions", "checkpoints"), **best, **settings, falling=True)
    )
    print("For checkpoints, weight decay falling:")
    names = ("exchange_every",)
    return best | best_of(args, names, lambda settings: runs(("checkpoints",), **best, **settings, falling=True))


def best_of(args: ComparisonArguments, names: tuple[str, ...], runs_of: Callable[[dict], list[dict]]) -> dict:
    grid = [dict(zip(names, values)) for values in product(*(SEARCHED[name] for name in names))]
    runs = [runs_of(settings) for settings in grid]
    found = iter(train_all(args, [run for of_settings in runs for run in of_settings], held_out=True))
    scores = [mean(row["accuracy"] for _ in of_settings for row in next(found)) for of_settings in runs]
    for settings, score in zip(grid, scores):
        print(f"  {score:.2f} %  " + "  ".join(f"{name} {value:g}" for name, value in settings.items()), flush=True)
    return grid[scores.index(max(scores))]


def plot(summary: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    decays = list(dict.fromkeys(row["weight_decay"] for row in summary))
    methods = list(dict.fromkeys(row["method"] for row in summary))
    figure, axes = plt.subplots(1, len(decays) + 1, figsize=(4.5 * (len(decays) + 1), 4))
    for axis, decay in zip(axes, decays):
        for falling, color in ((False, "tab:gray"), (True, "tab:blue")):
            rows = [row for row in summary if row["weight_decay"] == decay and row["falling"] == falling]
            places = [methods.index(row["method"]) + (0.2 if falling else -0.2) for row in rows]
            values, errors = zip(*(row["replicas"] for row in rows))
            label = "falling" if falling else "unchanged"
            bars = axis.bar(places, values, 0.4, yerr=[error or 0.0 for error in errors], color=color, label=label)
            axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=8)
        lowest = min(row["replicas"][0] for row in summary)
        axis.set_ylim(max(0.0, lowest - 3.0), 100.0)
        axis.set_xticks(range(len(methods)), methods)
        axis.set_ylabel("test accuracy, % (mean of replicas)")
        axis.set_title(f"weight decay {decay:g}")
        axis.legend(loc="lower right")
    rows = [row for row in summary if not row["falling"] and row["weight_decay"] == decays[0] and row["bytes_sent"]]
    bars = axes[-1].bar([row["method"] for row in rows], [row["bytes_sent"] / 1e6 for row in rows], color="tab:orange")
    axes[-1].bar_label(bars, [f"{row['bytes_sent'] / 1e6:.2f}" for row in rows])
    axes[-1].set_yscale("log")
    axes[-1].margins(y=0.15)
    axes[-1].set_ylabel("MB sent by a rank")
    axes[-1].set_title("alone sends nothing")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    (args,) = HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses()
    if args.search:
        print("Chosen: " + ", ".join(f"{name} {value:g}" for name, value in search(args).items()))
        return
    rows = product(args.weight_decays, args.methods, (False, True), range(args.seeds))
    runs = [args.run(method, seed, weight_decay=decay, falling=falling) for decay, method, falling, seed in rows]
    print(f"{len(runs)} runs on {args.ranks} processes", flush=True)
    found = train_all(args, runs)
    summary = summarize(found)
    table, lines = as_table(summary), verdict(summary)
    heading = (
        f"Test accuracy after {args.steps} updates, mean ± standard deviation of {args.seeds} seeds. A batch: DDP "
        f"{args.batch_size} digits over {args.ranks} ranks, the others {args.batch_size // args.ranks} a replica. "
        f"Differences are from DDP with weight decay {args.weight_decays[0]:g}, unchanged."
    )
    print(f"\n{heading}\n\n{table}\n")
    print("\n".join(lines))
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
        results = {"settings": asdict(args), "machine": machine, "summary": summary, "runs": found}
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        (folder / "table.md").write_text(f"{heading}\n\n{table}\n\n" + "\n".join(lines) + "\n")
        plot(summary, folder / "plot.png")
        print(f"Written to {folder}.")


if __name__ == "__main__":
    main()
