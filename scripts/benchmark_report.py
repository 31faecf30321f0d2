"""What the benchmark scripts share: medians with spread, JSON, and a picture of bars or lines beside it."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch


def summarize(values: list[float]) -> dict[str, float | list[float]]:
    """Median, quartiles, smallest and largest."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "quartiles": [low, high], "range": [min(values), max(values)]}


def cell(summary: dict[str, Any] | None) -> str:
    """Median and quartiles as a table shows them."""
    if summary is None:
        return "-"
    low, high = summary["quartiles"]
    return f"{summary['median']:.2f} ({low:.2f} - {high:.2f})"


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """Rows of cells, which may be summaries, as a table for terminal and README."""
    rows = [[cell(entry) if isinstance(entry, dict) or entry is None else str(entry) for entry in row] for row in rows]
    widths = [max(len(line[place]) for line in [columns, *rows]) for place in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines
    )


def check_methods(methods: list[str], known: Iterable[str]) -> None:
    """Refuses methods that a comparison with DDP does not know, and one without DDP."""
    unknown = sorted(set(methods) - set(known))
    if unknown:
        raise ValueError(f"`methods` are of {', '.join(known)}, but {', '.join(unknown)} is not.")
    if "ddp" not in methods:
        raise ValueError("`methods` must have ddp, which the others are compared with.")


def machine(threads: int | None = None) -> dict[str, Any]:
    """Where it was measured."""
    return {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(results: dict[str, Any], output: str | Path | None, figure: Any = None) -> None:
    """Writes `results` to the JSON file `output`, and a figure of matplotlib beside it as PNG."""
    if output is None:
        return
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    if figure is not None:
        figure.savefig(output.with_suffix(".png"), dpi=150, bbox_inches="tight")
    print(f"\nwritten: {output}" + (f", {output.with_suffix('.png')}" if figure is not None else ""))


def bars(named: dict[str, dict[str, Any]], label: str, title: str) -> Any:
    """A figure with a horizontal bar for each name: its median, and the quartiles as a line."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.4 * len(named)))
    medians = [summary["median"] for summary in named.values()]
    spread = [
        [summary["median"] - summary["quartiles"][0] for summary in named.values()],
        [summary["quartiles"][1] - summary["median"] for summary in named.values()],
    ]
    axes.barh(list(named), medians, xerr=spread, color="tab:blue", ecolor="black", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _processor() -> str:
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        first = {name.strip(): value.strip() for name, value in reversed(lines)}
    except OSError:
        first = {}
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in first.get("flags", "").split()]
    return f"{first.get('model name', platform.machine())}" + (f" ({', '.join(flags)})" if flags else "")
