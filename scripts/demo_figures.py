"""The pictures of `scripts/demo.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.manifold import TSNE

NAMES = {
    "msn": "MSN",
    "pixels": "raw pixels",
    "untrained": "untrained encoder",
    "paws": "PAWS",
    "supervised": "supervised encoder",
}
COLORS = {
    "msn": "#0b6e99",
    "pixels": "#6b6b6b",
    "untrained": "#d9822b",
    "paws": "#7b3294",
    "supervised": "#b5446e",
}
_RIGHT, _WRONG = "#2e8b57", "#cc3333"
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}


def draw_low_shot(scores: dict[str, dict[str, dict[str, float]]], num_splits: int, num_test: int, path: Path) -> None:
    """Draw accuracy over the number of labelled images per class.

    A curve with error bars shows each kind of features, a point each network that was trained with labels.

    Args:
        scores (`dict`): `scores["msn"]["5"]["mean"]` and `["std"]`, in per cent.
        num_splits (`int`): Splits that mean and standard deviation are over.
        num_test (`int`): Images that accuracy is measured on.
        path (`Path`): The file to write.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
        curves = {name: by_count for name, by_count in scores.items() if len(by_count) > 1}
        # labels at the curves' ends, pushed apart where two curves end close together
        ends = {name: by_count[max(by_count, key=int)]["mean"] for name, by_count in curves.items()}
        heights = _spread(ends, gap=5.0)
        for name, by_count in curves.items():
            counts = np.array([int(count) for count in by_count])
            means, stds = (np.array([entry[key] for entry in by_count.values()]) for key in ("mean", "std"))
            style = {"color": COLORS[name], "marker": "o", "linewidth": 2.4 if name == "msn" else 1.8, "capsize": 4}
            # a little apart, so that error bars do not cover each other
            places = counts * {"msn": 1.02, "pixels": 0.98}.get(name, 1.0)
            axes.errorbar(places, means, yerr=stds, **style)
            above = name == "msn"
            for place, mean, std in zip(places, means, stds):
                _annotate_value(axes, name, place, mean + std if above else mean - std, mean, above)
            axes.annotate(
                NAMES[name],
                (counts[-1], heights[name]),
                xytext=(22, 0),
                textcoords="offset points",
                va="center",
                color=COLORS[name],
                fontweight="bold" if name == "msn" else "normal",
                annotation_clip=False,
            )
        for name, by_count in scores.items():
            if name in curves:
                continue
            ((count, entry),) = by_count.items()
            place = int(count) * 1.18  # beside the points of the curves
            axes.errorbar([place], [entry["mean"]], yerr=[entry["std"]], color=COLORS[name], marker="D", capsize=4)
            name_and_value = f"{NAMES[name]} {entry['mean']:.1f}"
            is_paws = name == "paws"
            axes.annotate(
                name_and_value if is_paws else name_and_value.replace(" ", "\n", 1),
                (place, entry["mean"]),
                xytext=(8, 5) if is_paws else (-8, 4),  # between two curves, the other one below them
                textcoords="offset points",
                ha="left" if is_paws else "right",
                va="baseline" if is_paws else "top",
                color=COLORS[name],
                fontsize=9.5,
                fontweight="bold" if is_paws else "normal",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
        axes.set_ylim(0, 105)
        axes.set_yticks(range(0, 101, 20))
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.set_xlabel("labelled images per class")
        axes.set_ylabel(f"accuracy on {num_test} test digits")
        axes.set_title(
            f"Few labels, mean ± standard deviation of {num_splits} splits. Curves: logistic regression", loc="left"
        )
        _save(figure, path)


def draw_training(log_history: list[dict[str, float]], num_prototypes: int, path: Path) -> None:
    """Draw the two parts of the loss, and how many prototypes are the target of some image between two logs.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        num_prototypes (`int`): K.
        path (`Path`): The file to write.
    """
    logs = [entry for entry in log_history if "prototypes_in_use" in entry]
    steps = [entry["step"] for entry in logs]
    panels = (
        ("cross_entropy", "nats", "Cross-entropy, anchors against targets"),
        ("me_max", "nats", "log K − entropy of the mean assignment"),
        ("prototypes_in_use", f"of {num_prototypes}", "Prototypes in use"),
    )
    with plt.rc_context(_STYLE):
        figure, row = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        for axes, (key, label, title) in zip(row, panels):
            axes.plot(steps, [entry[key] for entry in logs], color=COLORS["msn"], linewidth=1.8)
            axes.set_title(title, loc="left", fontsize=10.5)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        row[2].axhline(num_prototypes, color="#999999", linestyle="--", linewidth=1)
        row[2].set_ylim(0, 1.1 * num_prototypes)
        _save(figure, path)


def draw_neighbours(
    test_images: np.ndarray,
    test_labels: np.ndarray,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    neighbours: np.ndarray,
    path: Path,
) -> None:
    """Draw test images, each with its nearest training images, outlined by whether the class is the same.

    Shown are the first test image of each class, and the two whose neighbours are most often of another class.

    Args:
        test_images, train_images (`np.ndarray` of shape `(N, H, W)`): Gray images.
        test_labels, train_labels (`np.ndarray` of shape `(N,)`): Their classes.
        neighbours (`np.ndarray` of shape `(num_test, k)`): Rows of the training images, nearest first.
        path (`Path`): The file to write.
    """
    right = train_labels[neighbours] == test_labels[:, None]
    first_of_class = [int(np.flatnonzero(test_labels == label)[0]) for label in np.unique(test_labels)]
    hardest = [row for row in np.argsort(right.sum(axis=1), kind="stable") if row not in first_of_class][:2]
    rows = [*first_of_class, *map(int, hardest)]
    half, shown = (len(rows) + 1) // 2, neighbours.shape[1]
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure = plt.figure(figsize=(11, 0.66 * half + 0.9))
        # each half: the test image, a gap, its neighbours; a wider gap between the halves
        widths = [1, 0.35, *[1] * shown, 0.9, 1, 0.35, *[1] * shown]
        grid = GridSpec(half, len(widths), figure, width_ratios=widths, wspace=0.12, hspace=0.14)
        grid.update(left=0.01, right=0.99, bottom=0.01, top=1 - 0.86 / figure.get_figheight())
        for place, row in enumerate(rows):
            line, left = place % half, 0 if place < half else shown + 3
            _show_image(figure.add_subplot(grid[line, left]), test_images[row], "#222222", 1.2)
            for rank, neighbour in enumerate(neighbours[row]):
                axes = figure.add_subplot(grid[line, left + 2 + rank])
                _show_image(axes, train_images[neighbour], _RIGHT if right[row, rank] else _WRONG, 2.4)
        figure.text(
            0.01, 0.985, "Test digits and their nearest training digits, by MSN features", va="top", fontsize=13
        )
        figure.text(
            0.01,
            1 - 0.36 / figure.get_figheight(),
            "Left: the first test digit of each class and, last, the two with most wrong neighbours. Outline green: "
            f"same class, red: another.\nOver all {len(right)} test digits the nearest one is of the same class for "
            f"{100 * right[:, 0].mean():.1f} %.",
            va="top",
            fontsize=9.5,
            color="#444444",
        )
        _save(figure, path)


def draw_embedding(features: dict[str, np.ndarray], labels: np.ndarray, path: Path, seed: int = 0) -> None:
    """Draw a t-SNE projection of each kind of features to the plane; every image is drawn as its class, in its colour.

    Args:
        features (`dict[str, np.ndarray]`): By name, each of shape `(N, D)`.
        labels (`np.ndarray` of shape `(N,)`): Classes, 0 to 9.
        path (`Path`): The file to write.
        seed (`int`, *optional*, defaults to 0): Of the projection.
    """
    colors = plt.get_cmap("tab10")
    perplexity = min(30.0, (len(labels) - 1) / 3)
    with plt.rc_context(_STYLE):
        figure, row = plt.subplots(1, len(features), figsize=(11, 4.1), layout="constrained", squeeze=False)
        for axes, (name, vectors) in zip(row[0], features.items()):
            projection = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed)
            points = projection.fit_transform(vectors)
            for label in np.unique(labels):
                of_class = points[labels == label]
                marker = {"marker": f"${label}$", "s": 34, "linewidths": 0.2}
                axes.scatter(of_class[:, 0], of_class[:, 1], color=colors(int(label) % 10), **marker)
            _bare(axes)
            axes.set_title(NAMES[name], color=COLORS[name], fontweight="bold" if name == "msn" else "normal")
        figure.suptitle(
            f"t-SNE of the features of {len(labels)} test digits; t-SNE does not see the classes", fontsize=12
        )
        _save(figure, path)


def _annotate_value(axes: Axes, name: str, place: float, height: float, mean: float, above: bool) -> None:
    axes.annotate(
        f"{mean:.1f}",
        (place, height),
        xytext=(0, 4 if above else -5),
        textcoords="offset points",
        ha="center",
        va="bottom" if above else "top",
        color=COLORS[name],
        fontsize=9.5,
    )


def _spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Return the same heights, the closest pushed up until they are `gap` apart."""
    placed: dict[str, float] = {}
    lowest = -np.inf
    for name in sorted(heights, key=heights.get):
        lowest = placed[name] = max(heights[name], lowest + gap)
    return placed


def _show_image(axes: Axes, image: np.ndarray, color: str, width: float) -> None:
    axes.imshow(image, cmap="gray_r", interpolation="nearest")
    _bare(axes)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=width)


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color="#cccccc")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
