"""Medians with spread, tables, JSON and pictures: the common part of the benchmark scripts."""

import json
import platform
import time
from dataclasses import field
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import Any

import torch

from hf_msn.hub.run_record import cpu_name


def option(help: str, default: Any = None) -> Any:
    """Return a dataclass field for `HfArgumentParser`. A tuple is the default of a list."""
    metadata = {"help": help.replace("%", "%%")}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_known(name: str, values: list[str], known: Any) -> None:
    """Check that the values of a list argument are known."""
    if not values or set(values) - set(known):
        raise ValueError(f"`{name}` must be some of {', '.join(known)}, but is {values}.")


def now() -> float:
    """Return the time in seconds, after the work that the GPU has been given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def summarize(values: list[float]) -> dict[str, float | list[float]]:
    """Return median, quartiles and range."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "quartiles": [low, high], "range": [min(values), max(values)]}


def cell(summary: dict[str, Any] | None) -> str:
    """Return "median (quartile - quartile)"."""
    if summary is None:
        return "-"
    low, high = summary["quartiles"]
    return f"{summary['median']:.2f} ({low:.2f} - {high:.2f})"


def mean_and_deviation(values: list[float], digits: int = 1) -> str:
    """Return "mean ± deviation" of several runs."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table. A cell may be a summary, a number or a string."""
    rows = [[cell(entry) if isinstance(entry, dict) or entry is None else str(entry) for entry in row] for row in rows]
    widths = [max(len(line[place]) for line in [columns, *rows]) for place in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines
    )


def machine(threads: int | None = None) -> dict[str, Any]:
    """Return processor, threads and versions."""
    return {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(results: dict[str, Any], output: str | Path | None, figure: Any = None) -> None:
    """Write `results` to the JSON file `output`, and a matplotlib figure beside it as PNG."""
    if output is None:
        return
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    if figure is not None:
        figure.savefig(output.with_suffix(".png"), dpi=150, bbox_inches="tight")
    print(f"\nwritten: {output}" + (f", {output.with_suffix('.png')}" if figure is not None else ""))


def subplots(size: tuple[float, float], rows: int = 1, columns: int = 1, squeeze: bool = True) -> tuple[Any, Any]:
    """Return a figure of `size` inches and its axes. matplotlib is needed from here on alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=squeeze)


def bars(named: dict[str, dict[str, Any]], label: str, title: str) -> Any:
    """Return a figure with one horizontal bar per summary: its median, with the quartiles as a line."""
    figure, axes = subplots((7, 0.6 + 0.4 * len(named)))
    medians = [summary["median"] for summary in named.values()]
    spread = [[abs(s["median"] - s["quartiles"][side]) for s in named.values()] for side in (0, 1)]
    axes.barh(list(named), medians, xerr=spread, color="tab:blue", ecolor="black", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    known = set(info.read_text().split()) if info.is_file() else set()
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in known]
    return f"{cpu_name()}" + (f" ({', '.join(flags)})" if flags else "")
