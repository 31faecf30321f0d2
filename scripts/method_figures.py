"""The pictures of docs/methods/: how data flow in a pretraining method, and which ranks wait for which in training.

python scripts/method_figures.py
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
BLUE, ORANGE, GRAY, GREEN = "#0b6e99", "#d9822b", "#6b6b6b", "#2e8b57"

# Boxes by name: (column, row, text, color). Arrows: (from, to), dashed where no gradient goes.
FLOWS = {
    "msn": (
        {
            "image": (0, 0.5, "image", GRAY),
            "target": (1, 1, "target view", ORANGE),
            "anchor": (1, 0, "anchors: patches\ndropped, small crops", BLUE),
            "average": (2, 1, "encoder, head:\nmoving average", ORANGE),
            "network": (2, 0, "encoder, head", BLUE),
            "prototypes": (3, 0.5, "K prototypes", GREEN),
            "sharp": (4, 1, "target p,\nsharpened", ORANGE),
            "p": (4, 0, "p of each anchor", BLUE),
            "loss": (5, 0.5, "cross-entropy\n- entropy of mean p", GRAY),
        },
        [("image", "anchor"), ("anchor", "network"), ("network", "p"), ("prototypes", "p"), ("p", "loss")],
        [("image", "target"), ("target", "average"), ("average", "sharp"), ("prototypes", "sharp"), ("sharp", "loss")],
    ),
    "paws": (
        {
            "image": (0, 1, "image", GRAY),
            "support": (0, 0, "labelled images", GREEN),
            "views": (1, 1, "two large views,\nsmall crops", BLUE),
            "support views": (1, 0, "views of the support", GREEN),
            "network": (2, 0.5, "encoder, heads", BLUE),
            "neighbours": (3, 0.5, "similarity to the\nsupport, times labels", BLUE),
            "p": (4, 0, "p of a view", BLUE),
            "sharp": (4, 1, "p of the other\nview, sharpened", ORANGE),
            "loss": (5, 0.5, "cross-entropy\n- entropy of mean p", GRAY),
        },
        [
            ("image", "views"),
            ("support", "support views"),
            ("views", "network"),
            ("support views", "network"),
            ("network", "neighbours"),
            ("neighbours", "p"),
            ("p", "loss"),
        ],
        [("neighbours", "sharp"), ("sharp", "loss")],
    ),
    "suncet": (
        {
            "image": (0, 1, "images", GRAY),
            "labelled": (0, 0, "labelled images", GREEN),
            "views": (1, 1, "two views", BLUE),
            "support": (1, 0, "views", GREEN),
            "network": (2, 0.5, "encoder, head", BLUE),
            "simclr": (3, 1, "find the other view\namong all views", BLUE),
            "suncet": (3, 0, "find the own class\namong labelled views", GREEN),
            "loss": (4, 0.5, "NT-Xent + SuNCEt", GRAY),
        },
        [
            ("image", "views"),
            ("labelled", "support"),
            ("views", "network"),
            ("support", "network"),
            ("network", "simclr"),
            ("network", "suncet"),
            ("simclr", "loss"),
            ("suncet", "loss"),
        ],
        [],
    ),
    "byol": (
        {
            "image": (0, 0.5, "image", GRAY),
            "one": (1, 0, "one view", BLUE),
            "other": (1, 1, "the other view", ORANGE),
            "network": (2, 0, "encoder, head", BLUE),
            "average": (2, 1, "moving average (BYOL)\nor itself (SimSiam)", ORANGE),
            "predictor": (3, 0, "predictor: trained,\nor set from F", GREEN),
            "loss": (4, 0.5, "2 - 2 cos,\nboth ways", GRAY),
        },
        [("image", "one"), ("one", "network"), ("network", "predictor"), ("predictor", "loss")],
        [("image", "other"), ("other", "average"), ("average", "loss")],
    ),
}

# Rows of a timeline: per rank (start, length) of computing in steps; exchanges (time, rank, time of use, other rank).
_STEPS = [(float(step), 0.9) for step in range(8)]
_MEANS = [(time, rank, time + 0.45, other) for time in (3.9, 8.35) for rank in range(4) for other in range(4)]
_PERIODS = [(step + 0.45 * (step >= 4), 0.9) for step in range(8)]
_WAITING = [(1.35 * step, 0.9) for step in range(6)]
TIMELINES = {
    "local_sgd": ("mean of the parameters every 4 steps", [_PERIODS] * 4, _MEANS),
    "slowmo": ("mean of the parameters, then a step of slow momentum, every 4 steps", [_PERIODS] * 4, _MEANS),
    "gossip": {
        "Gossip: one peer after every step": (
            [_WAITING] * 4,
            [(1.35 * s + 0.9, r, 1.35 * (s + 1), (r + 2 ** (s % 2)) % 4) for s in range(6) for r in range(4)],
        ),
        "OverlapGossip: sent without waiting, used one step later": (
            [_STEPS] * 4,
            [(s + 0.9, r, s + 1.9, (r + 2 ** (s % 2)) % 4) for s in range(0, 7) for r in range(4)],
        ),
        "AsyncGossip: rank 3 is slow, nobody waits": (
            [_STEPS, _STEPS, _STEPS, [(2.7 * step, 2.6) for step in range(3)]],
            [
                (0.9, 0, 1.6, 1),
                (1.9, 1, 2.6, 2),
                (2.9, 2, 3.6, 0),
                (2.6, 3, 3.4, 1),
                (4.9, 1, 5.5, 2),
                (5.3, 3, 6.1, 0),
            ],
        ),
    },
    "codistillation": (
        "predictions on the same batch at every step, or checkpoints now and then; no parameter is averaged",
        [_STEPS] * 2,
        [(s + 0.45, rank, s + 0.75, 1 - rank) for s in range(8) for rank in range(2)],
    ),
}


def flow(boxes: dict[str, tuple], arrows: list[tuple], without_gradient: list[tuple]) -> Figure:
    figure, axes = plt.subplots(figsize=(1.85 * (1 + max(column for column, *_ in boxes.values())), 1.9))
    frames = {}
    for name, (column, row, text, color) in boxes.items():
        frame = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color}
        shown = axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8, bbox=frame)
        frames[name] = shown.get_bbox_patch()
    axes.set(xlim=(-0.5, max(column for column, *_ in boxes.values()) + 0.55), ylim=(-0.4, 1.4))
    axes.axis("off")
    figure.canvas.draw()  # lays out the boxes, at which arrows begin and end
    for pairs, style in ((arrows, "-"), (without_gradient, "--")):
        for start, end in pairs:
            ends = {"patchA": frames[start], "patchB": frames[end], "shrinkA": 1, "shrinkB": 1}
            properties = {"arrowstyle": "-|>", "color": GRAY, "linestyle": style, **ends}
            axes.annotate("", boxes[end][:2], boxes[start][:2], arrowprops=properties)
    return figure


def timeline(axes: Axes, title: str, ranks: list[list[tuple]], exchanges: list[tuple]) -> None:
    for rank, steps in enumerate(ranks):
        axes.broken_barh(steps, (rank - 0.3, 0.6), color=BLUE, alpha=0.75)
    for start, rank, end, other in exchanges:
        if rank != other:
            axes.annotate("", (end, other), (start, rank), arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 0.9})
    axes.set_title(title, fontsize=9, loc="left")
    axes.set(yticks=range(len(ranks)), yticklabels=[f"rank {rank}" for rank in range(len(ranks))], xticks=[])
    axes.invert_yaxis()
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("time; a bar is an optimizer step", fontsize=8)


def main() -> None:
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "methods", "savefig.facecolor": "white"}):
        figures = {name: flow(*parts) for name, parts in FLOWS.items()}
        for name, parts in TIMELINES.items():
            panels = parts if isinstance(parts, dict) else {parts[0]: parts[1:]}
            figure, rows = plt.subplots(
                len(panels), squeeze=False, figsize=(8, 1.9 * len(panels)), layout="constrained"
            )
            for axes, (title, panel) in zip(rows[:, 0], panels.items()):
                timeline(axes, title, *panel)
            figures[name] = figure
        for name, figure in figures.items():
            figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
