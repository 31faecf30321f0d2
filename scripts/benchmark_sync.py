"""Steps a second, bytes and time to a loss of training with little communication, against DDP in the same call.

Real gloo processes on one machine. With `--rate` (root on Linux) each is in a network namespace of its own behind a
rate-limited link. Computing is slept away, so that the ranks wait for the network and not for this machine's cores;
by default so long that DDP waits for two thirds of its step.

    python scripts/benchmark_sync.py --rate 200mbit --output runs/benchmark_sync
    python scripts/benchmark_sync.py --rate 200mbit --methods none ddp adpsgd async_push_sum --straggler 3
    python scripts/benchmark_sync.py --ranks 2 4 --hidden_sizes 256 1024 --compute_ms 20
    python scripts/benchmark_sync.py --overhead    # each method's own arithmetic and memory, of a ViT-S/16 step
"""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from benchmark_report import check_methods
from slow_network import SlowNetwork
from sync_workload import METHODS
from transformers import HfArgumentParser


def option(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass
class BenchmarkArguments:
    methods: list[str] = field(
        default_factory=lambda: [*METHODS],
        metadata={"help": f"Of {', '.join(METHODS)}. ddp is the baseline, none exchanges nothing."},
    )
    ranks: list[int] = field(default_factory=lambda: [4], metadata={"help": "Numbers of ranks."})
    hidden_sizes: list[int] = field(
        default_factory=lambda: [704], metadata={"help": "Widths of the model: 704 has 1 million parameters, 4 MB."}
    )
    rate: str | None = option("Limit of each rank's link, as tc writes it: 200mbit. Without it, the loopback.")
    compute_ms: float | None = option("Computing of a step. Without it, balanced by `waiting`.")
    waiting: float = option("Part of DDP's step that is spent waiting, in (0, 1).", 2 / 3)
    straggler: float = option("How many times slower the last rank computes.", 1.0)
    steps: int = option("Timed steps of a run.", 36)
    warmup_steps: int = option("Steps before them.", 4)
    overhead: bool = option("Measure own arithmetic and memory on a ViT-S/16 instead, over the loopback.", False)
    repeats: int = option("Runs of each method, in turn.", 3)
    learning_rate: float = option("Of SGD with momentum 0.9.", 0.1)
    target_loss: float = option("Smoothed training loss for the time to a loss.", 1.0)
    timeout: float = option("Seconds after which the ranks of one setting are killed.", 1800.0)
    output: str | None = option("Folder for results.json, table.md and plot.png.")

    def __post_init__(self):
        check_methods(self.methods, METHODS)
        if min(self.ranks) < 2 or min(self.hidden_sizes) < 1:
            raise ValueError(
                f"`ranks` must be >= 2 and `hidden_sizes` >= 1, but are {self.ranks} and {self.hidden_sizes}."
            )
        if not 0.0 < self.waiting < 1.0:
            raise ValueError(f"`waiting` is a part of DDP's step and must be in (0, 1), but is {self.waiting}.")
        if self.steps < 1 or self.repeats < 1 or self.warmup_steps < 0 or self.straggler < 1.0:
            raise ValueError("`steps` and `repeats` must be >= 1, `warmup_steps` >= 0 and `straggler` >= 1.")


def run_ranks(args: BenchmarkArguments, script: str, ranks: int, hidden_size: int) -> list[dict]:
    """All methods with one number of ranks and one model: what each rank measured in each run."""
    rate = None if args.overhead else args.rate
    with (
        tempfile.TemporaryDirectory() as folder,
        SlowNetwork(ranks, rate) if rate else nullcontext() as network,
    ):
        spec = {**asdict(args), "hidden_size": hidden_size, "folder": folder}
        command, port = [sys.executable, str(Path(__file__).with_name(script)), json.dumps(spec)], free_port()
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": network.address(0) if network else "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": network.interface if network else "lo",
                "OMP_NUM_THREADS": "1",
            }
            processes.append(subprocess.Popen(network.command(rank, command) if network else command, env=environment))
        wait_for(processes, args.timeout)
        return [
            {**row, "ranks": ranks, "hidden_size": hidden_size}
            for rank in range(ranks)
            for row in json.loads(Path(folder, f"{rank}.json").read_text())
        ]


def wait_for(processes: list[subprocess.Popen], seconds: float) -> None:
    """Until all have ended well; kills the rest when one fails or the time is up."""
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed:
                raise RuntimeError(f"Rank {failed[0]} failed; its message is above.")
            if time.monotonic() > deadline:
                raise RuntimeError(f"The ranks have not ended within `timeout` {seconds} seconds.")
            time.sleep(0.1)
        if any(process.returncode for process in processes):
            raise RuntimeError("A rank failed; its message is above.")
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def summarize(rows: list[dict]) -> list[dict]:
    """A row for each method and setting: medians over the runs, of healthy ranks and of the slowest."""
    summary = []
    for setting in sorted({(row["ranks"], row["hidden_size"]) for row in rows}):
        here = [row for row in rows if (row["ranks"], row["hidden_size"]) == setting]
        last = setting[0] - 1
        baseline = {}
        for row in here:
            if row["method"] == "ddp" and row["rank"] == 0:
                baseline[row["repeat"]] = row["steps_per_second"]
        for method in dict.fromkeys(row["method"] for row in here):
            own = [row for row in here if row["method"] == method]
            healthy = [row for row in own if row["rank"] != last]
            ratios = [row["steps_per_second"] / baseline[row["repeat"]] for row in healthy]
            times = [row["seconds_to_loss"] for row in own]
            summary.append(
                {
                    "ranks": setting[0],
                    "model_megabytes": own[0]["model_bytes"] / 1e6,
                    "method": method,
                    "compute_ms": 1000 * own[0]["compute_seconds"],
                    "steps_per_second": median(row["steps_per_second"] for row in healthy),
                    "slowest_rank": median(row["steps_per_second"] for row in own if row["rank"] == last),
                    "times_ddp": median(ratios),
                    "times_ddp_range": (min(ratios), max(ratios)),
                    "megabytes_per_step": median(row["bytes_per_step"] for row in own) / 1e6,
                    "waiting_ms": 1000 * median(row["seconds_waiting_per_step"] for row in healthy),
                    "seconds_to_loss": median(times) if all(times) else None,
                }
            )
    return summary


def as_table(summary: list[dict]) -> str:
    lines = [
        "| ranks | model | method | steps/s | slowest rank | x DDP (range) | MB sent a step | s to loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        low, high = row["times_ddp_range"]
        reached = "-" if row["seconds_to_loss"] is None else f"{row['seconds_to_loss']:.1f}"
        lines.append(
            f"| {row['ranks']} | {row['model_megabytes']:.1f} MB | {row['method']} | {row['steps_per_second']:.2f} | "
            f"{row['slowest_rank']:.2f} | {row['times_ddp']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{row['megabytes_per_step']:.2f} | {reached} |"
        )
    return "\n".join(lines)


def overhead_table(rows: list[dict]) -> str:
    lines = [
        "| ranks | method | own arithmetic a step, ms | part of a ViT-S/16 step | memory beside training, models |",
        "|---|---|---|---|---|",
    ]
    for ranks, method in dict.fromkeys((row["ranks"], row["method"]) for row in rows):
        own = [row for row in rows if (row["ranks"], row["method"]) == (ranks, method)]
        seconds, step = (median(row[name] for row in own) for name in ("own_seconds", "step_seconds"))
        memory = max(row["extra_memory"] for row in own)
        lines.append(f"| {ranks} | {method} | {1000 * seconds:.1f} | {seconds / step:.2%} | {memory:.2f} |")
    return "\n".join(lines)


def plot(summary: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = list(dict.fromkeys((row["ranks"], row["model_megabytes"]) for row in summary))
    figure, axes = plt.subplots(len(settings), 1, figsize=(8, 1 + 3.2 * len(settings)), squeeze=False)
    for axis, setting in zip(axes[:, 0], settings):
        rows = [row for row in summary if (row["ranks"], row["model_megabytes"]) == setting]
        colors = ["tab:gray" if row["method"] in ("ddp", "none") else "tab:blue" for row in rows]
        bars = axis.bar([row["method"] for row in rows], [row["steps_per_second"] for row in rows], color=colors)
        axis.bar_label(bars, [f"{row['times_ddp']:.1f}x" for row in rows])
        axis.set_ylabel("steps per second")
        axis.set_title(f"{setting[0]} ranks, {setting[1]:.1f} MB, {rows[0]['compute_ms']:.0f} ms of computing a step")
        plt.setp(axis.get_xticklabels(), rotation=30, ha="right")
        axis.margins(y=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    if args.overhead:
        rows = [row for ranks in args.ranks for row in run_ranks(args, "sync_overhead.py", ranks, 0)]
        summary, table = None, overhead_table(rows)
        heading = f"own arithmetic and memory, medians of {args.repeats} periods"
    else:
        rows = [
            row
            for ranks in args.ranks
            for hidden_size in args.hidden_sizes
            for row in run_ranks(args, "sync_workload.py", ranks, hidden_size)
        ]
        summary = summarize(rows)
        table = as_table(summary)
        network = f"links of {args.rate}" if args.rate else "loopback"
        heading = f"{network}, medians of {args.repeats} runs of {args.steps} steps"
    print(f"\n{heading}, torch {torch.__version__}\n{table}")
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
        results = {"settings": asdict(args), "machine": machine, "summary": summary, "runs": rows}
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        (folder / "table.md").write_text(table + "\n")
        if summary:
            plot(summary, folder / "plot.png")
        print(f"Written to {folder}.")


if __name__ == "__main__":
    main()
