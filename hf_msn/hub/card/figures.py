"""Figures of a model card: accuracy against labels, and PNG files that are given."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...evaluation.results import LowShotResults
from .measured import read_results

_PNG = b"\x89PNG\r\n\x1a\n"
_COLORS = ("#0b6e99", "#d9822b", "#7b3294", "#2e8b57")


def check_png(path: str | os.PathLike) -> None:
    """Raises a `ValueError` unless the file is a PNG."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no figure '{path}'. Check `figures`.")
    with path.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            raise ValueError(f"A figure must be a PNG file, but '{path}' is none. Save it as PNG.")


def plot_low_shot(results: str | os.PathLike | Sequence[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Draws top-1 accuracy against labelled images a class, with 95 % intervals, from files of results.

    A task that is no number of images a class stands at the number that its splits have on average.

    Args:
        results (path or `Sequence[path]`): Files of `LowShotResults.save`; a curve each.
        path (`str` or `os.PathLike`): The PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: A file is not whole, or there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The plot of a card needs matplotlib, which is not installed: pip install 'hf_msn[demo]', or leave out "
            "`plot`."
        ) from error
    given = [results] if isinstance(results, (str, os.PathLike)) else list(results)
    if not given:
        raise ValueError("There is nothing to plot: give a file of results, or leave out `plot`.")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    ticks: set[float] = set()
    for number, file in enumerate(given):
        one, color = read_results(file), _COLORS[number % len(_COLORS)]
        points = sorted((_images_per_class(task), task.summary) for task in one.tasks) if one.tasks else []
        places = [place for place, _ in points]
        ticks.update(places)
        means, halves = ([summary[key] for _, summary in points] for key in ("top1", "top1_ci95"))
        below = [min(half, mean) for mean, half in zip(means, halves)]
        above = [min(half, 100 - mean) for mean, half in zip(means, halves)]
        axes.errorbar(places, means, yerr=[below, above], color=color, marker="o", capsize=4, label=_label(one))
        for place, mean, half in zip(places, means, above):
            shift = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes.annotate(f"{mean:.1f}", (place, mean + half), color=color, **shift)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.12)
    axes.set(xlabel="labelled images a class", ylabel="top-1 accuracy [%]")
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return path


def _images_per_class(task) -> float:
    found = re.fullmatch(r"(\d+)_per_class", task.name)
    if found:
        return float(found[1])
    return sum(split.num_images for split in task.splits) / (len(task.splits) * task.num_classes)


def _label(results: LowShotResults) -> str:
    several = max(len(task.splits) for task in results.tasks)
    probe = str(results.probe.get("probe", "probe")).replace("_", " ")
    return f"{probe}, {results.data['test']['num_images']} test images, mean of {several} splits, 95 % interval"
