"""Steps per second, bytes and time to a loss of low-communication training, against DDP in the same call.

Real gloo processes on one machine. With `--rate` (root on Linux) each runs in a network namespace of its own behind a
rate-limited link. Computing is replaced by sleeping, so that the ranks wait for the network and not for the cores of
this machine; by default so long that DDP waits for two thirds of its step.

    python scripts/benchmarks/sync.py --rate 200mbit --output runs/sync.json
    python scripts/benchmarks/sync.py --rate 200mbit --methods none ddp adpsgd async_push_sum --straggler 3
    python scripts/benchmarks/sync.py --rate 200mbit --methods none ddp diloco streaming_int8 --steps 96
    python scripts/benchmarks/sync.py --ranks 2 4 --hidden_sizes 256 1024 --compute_ms 20
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from report import bars, check_known, machine, markdown_table, option, save, summarize
from slow_network import SlowNetwork
from sync_workload import METHODS
from transformers import HfArgumentParser

from hf_msn.checks import check_integer
from hf_msn.cli.main import run_script


@dataclass
class BenchmarkArguments:
    methods: list[str] = option(
        f"Of {', '.join(METHODS)}. ddp is the baseline, none exchanges nothing.", tuple(METHODS)
    )
    ranks: list[int] = option("Numbers of ranks.", (4,))
    hidden_sizes: list[int] = option("Widths of the model: 704 has 1 million parameters, 4 MB.", (704,))
    rate: str | None = option("Limit of each rank's link, as tc writes it: 200mbit. Without it, the loopback.")
    compute_ms: float | None = option("Computing per step. Without it, balanced by `waiting`.")
    waiting: float = option("Part of DDP's step that is spent waiting, in (0, 1).", 2 / 3)
    straggler: float = option("Factor by which the last rank computes slower.", 1.0)
    steps: int = option("Timed steps per run.", 36)
    warmup_steps: int = option("Steps before them.", 4)
    repeats: int = option("Runs of each method, in turns.", 3)
    learning_rate: float = option("Learning rate of SGD with momentum 0.9.", 0.1)
    target_loss: float = option("Smoothed training loss for the time to a loss.", 1.0)
    timeout: float = option("Seconds after which the ranks of one setting are killed.", 1800.0)
    output: str | None = option("JSON file; a picture goes beside it.")

    def __post_init__(self):
        check_known("methods", self.methods, METHODS)
        if "ddp" not in self.methods:
            raise ValueError("`methods` must have ddp, the baseline.")
        for name in ("steps", "repeats"):
            check_integer(name, getattr(self, name))
        if min(self.ranks) < 2 or not 0.0 < self.waiting < 1.0 or self.straggler < 1.0:
            raise ValueError(
                f"`ranks` must be >= 2, `waiting` in (0, 1) and `straggler` >= 1, but they are {self.ranks}, "
                f"{self.waiting} and {self.straggler}."
            )


def run_ranks(args: BenchmarkArguments, ranks: int, hidden_size: int) -> list[dict]:
    """Run all methods with one number of ranks and one model. Return the measurements of each rank in each run."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SlowNetwork(ranks, args.rate) if args.rate else nullcontext() as network,
    ):
        spec = {**asdict(args), "hidden_size": hidden_size, "folder": folder}
        command = [sys.executable, str(Path(__file__).with_name("sync_workload.py")), json.dumps(spec)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
    """Wait until all have succeeded. Kill the rest when one fails or the time is up."""
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if any(process.poll() != 0 for process in processes):
            codes = [process.poll() for process in processes]
            raise RuntimeError(f"A rank failed, or {seconds} seconds are over. Exit codes by rank: {codes}.")
    finally:
        for process in processes:
            process.kill()


def summarize_runs(rows: list[dict]) -> list[dict]:
    """Return a row per method and setting: medians over the runs, of healthy ranks and of the slowest."""
    summary = []
    for ranks, hidden_size in sorted({(row["ranks"], row["hidden_size"]) for row in rows}):
        here = [row for row in rows if (row["ranks"], row["hidden_size"]) == (ranks, hidden_size)]
        baseline = {
            row["repeat"]: row["steps_per_second"] for row in here if row["method"] == "ddp" and row["rank"] == 0
        }
        for method in dict.fromkeys(row["method"] for row in here):
            own = [row for row in here if row["method"] == method]
            healthy = [row for row in own if row["rank"] != ranks - 1]
            slowest = [row["steps_per_second"] for row in own if row["rank"] == ranks - 1]
            times = [row["seconds_to_loss"] for row in own]
            computing = [row["seconds_in_sync_per_step"] - row["seconds_waiting_per_step"] for row in healthy]
            summary.append(
                {
                    "ranks": ranks,
                    "model_megabytes": own[0]["model_bytes"] / 1e6,
                    "method": method,
                    "compute_ms": 1000 * own[0]["compute_seconds"],
                    "steps_per_second": summarize([row["steps_per_second"] for row in healthy]),
                    "slowest_rank": median(slowest),
                    "times_ddp": summarize([row["steps_per_second"] / baseline[row["repeat"]] for row in healthy]),
                    "megabytes_per_step": median(row["bytes_per_step"] for row in own) / 1e6,
                    "megabytes_peak": max(row["peak_bytes"] for row in own) / 1e6,
                    "own_ms_per_step": 1000 * median(computing),
                    "seconds_to_loss": median(times) if all(times) else None,
                }
            )
    return summary


def as_table(summary: list[dict]) -> str:
    """Return the summary as a Markdown table."""
    columns = ["ranks", "model", "method", "steps/s", "slowest rank", "times DDP", "MB sent per step", "MB at most"]
    rows = [
        [
            row["ranks"],
            f"{row['model_megabytes']:.1f} MB",
            row["method"],
            row["steps_per_second"],
            f"{row['slowest_rank']:.2f}",
            row["times_ddp"],
            f"{row['megabytes_per_step']:.2f}",
            f"{row['megabytes_peak']:.2f}",
            f"{row['own_ms_per_step']:.1f}",
            "-" if row["seconds_to_loss"] is None else f"{row['seconds_to_loss']:.1f}",
        ]
        for row in summary
    ]
    return markdown_table([*columns, "own ms per step", "s to loss"], rows)


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    rows = [
        row for ranks in args.ranks for hidden_size in args.hidden_sizes for row in run_ranks(args, ranks, hidden_size)
    ]
    summary = summarize_runs(rows)
    network = f"links of {args.rate}" if args.rate else "loopback"
    print(f"\n{network}, medians of {args.repeats} runs of {args.steps} steps, torch {torch.__version__}\n")
    print(as_table(summary))
    named = {
        f"{row['method']}, {row['ranks']} ranks, {row['model_megabytes']:.1f} MB": row["times_ddp"] for row in summary
    }
    results = {"arguments": asdict(args), "machine": machine(1), "summary": summary, "runs": rows}
    save(results, args.output, bars(named, "steps per second, times DDP", network) if args.output else None)


if __name__ == "__main__":
    run_script(main)
