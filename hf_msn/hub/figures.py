"""Figures of a model card: accuracy against labels, and given PNG files."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..evaluation.results import LowShotResults
from .results import as_paths, read_results

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The chunks of a PNG that make the picture. Text, times and EXIF data are not published.
_CHUNKS = set(b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB sBIT bKGD pHYs".split())
_COLORS = ("#0b6e99", "#d9822b", "#7b3294", "#2e8b57")


def read_png(path: str | os.PathLike) -> bytes:
    """Read the picture of a PNG file, without the text that may be stored beside it."""
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    if not data.startswith(_SIGNATURE):
        raise ValueError(f"`figures` must be PNG files, but '{path}' is not one. Save it as PNG.")
    kept, start = [_SIGNATURE], len(_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, type, content, checksum
        if data[start + 4 : start + 8] in _CHUNKS:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def plot_low_shot(results: str | os.PathLike | Iterable[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Draw top-1 accuracy against labelled images per class, with 95 % intervals; one curve per file of results.

    A task that is not a number of images per class stands at the number that its splits have on average.

    Args:
        results (path or `Iterable[path]`): Files of `LowShotResults.save`.
        path (`str` or `os.PathLike`): The PNG file to write.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no file, or one is not complete.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib, which is not installed: pip install 'hf_msn[demo]'.") from error
    measured = [read_results(file) for file in as_paths(results)]
    if not measured:
        raise ValueError("A plot needs at least one file of `results`. Measure first, or leave out `plot`.")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    ticks: set[float] = set()
    for number, one in enumerate(measured):
        color = _COLORS[number % len(_COLORS)]
        points = sorted((task.images_per_class, task.summary["top1"], task.interval) for task in one.tasks)
        places, means, intervals = zip(*points)
        ticks.update(places)
        below = [mean - low for mean, (low, _) in zip(means, intervals)]
        above = [high - mean for mean, (_, high) in zip(means, intervals)]
        axes.errorbar(places, means, yerr=[below, above], color=color, marker="o", capsize=4, label=_label(one))
        for place, mean, (_, high) in zip(places, means, intervals):
            text, above_it = f"{mean:.1f}", (0, 5)
            axes.annotate(
                text, (place, high), xytext=above_it, textcoords="offset points", ha="center", color=color, fontsize=9
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.12)
    axes.set(xlabel="labelled images per class", ylabel="top-1 accuracy [%]")
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return Path(path)


def _label(results: LowShotResults) -> str:
    most = max(len(task.splits) for task in results.tasks)
    probe = str(results.probe.get("probe", "probe")).replace("_", " ")
    return f"{probe}, {results.data['test']['num_images']} test images, mean of {most} splits, 95 % interval"
